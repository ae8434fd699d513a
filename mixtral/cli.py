"""The command line of example_text_completion.py: its options, its output, its errors.

The options are the parameters of the script's main, and their help is its docstring. Importing
PyTorch takes seconds, so only what needs it does, within its function: --help and most refusals
come at once.
"""

import functools
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from .generation import Mixtral
    from .tokenizer import Message, Tokenizer

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
PATHS = ("ckpt_dir", "tokenizer_path", "experts_svg")
RULE = "=================================="

Options = Mapping[str, inspect.Parameter]


class Sampling(NamedTuple):
    """How new tokens are drawn: the last arguments of Mixtral.stream_tokens."""

    temperature: float
    top_p: float
    max_gen_len: int


class CacheSize(NamedTuple):
    """How many tokens and prompts there is room for: the third and fourth of Mixtral.build."""

    max_seq_len: int
    max_batch_size: int


# The command line


def run(main: Callable[..., None], argv: list[str]) -> int:
    """Call main with the options in argv and return the exit code.

    An error becomes one line on stderr.
    """
    replace_closed_outputs()
    # What cannot be decoded is marked, as it is in argv, and the tokenizer refuses it. What
    # cannot be encoded is printed as an escape. In a notebook the streams are of other types.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 0
    try:
        if "-h" in argv or "--help" in argv:
            print_help(main)
        else:
            call(main, argv)
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # The reader of stdout has gone, as in `| head -1`.
    except KeyboardInterrupt:
        code = 130  # what shells give for Ctrl-C
        say("")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        code = 1
        say(f"error: {' '.join(str(error).splitlines())}")
    flush_outputs()
    return code


def call(main: Callable[..., None], argv: list[str]) -> None:
    """Let fire call main, with nothing left that it would have to guess."""
    options = options_of(main)
    arguments = join_values(argv, options)
    import fire  # takes 0.2 s, too long for --help

    parsers = {}
    for name, option in options.items():
        parsers[name] = functools.partial(parse, name, option.annotation)
    fire.Fire(fire.decorators.SetParseFns(**parsers)(main), arguments)


def options_of(main: Callable[..., None]) -> Options:
    return inspect.signature(main, eval_str=True).parameters


def print_help(main: Callable[..., None]) -> None:
    """Print main's docstring: a summary, an empty line, and "name: text" for each option."""
    summary, _, lines = (inspect.getdoc(main) or "").rpartition("\n\n")
    print("usage: python example_text_completion.py CKPT_DIR TOKENIZER_PATH [OPTIONS]")
    print(f"\n{summary}\n\nOptions, their defaults, and what they do:")
    options = options_of(main)
    for line in lines.splitlines():
        name, text = line.split(": ", 1)
        option = f"--{name.replace('_', '-')}"
        print(f"  {option:<17} {options[name].default!s:<9} {text}")


def join_values(argv: list[str], options: Options) -> list[str]:
    """The same arguments, but each option as --name=value, which fire cannot misread.

    Raises ValueError for unknown options, options without their value or given twice, and
    for more or fewer than two paths.
    """
    paths = []
    values: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            paths.append(argument)
            continue
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if name not in options:
            raise ValueError(f"there is no option {option}: --help lists them all")
        if name in values:
            raise ValueError(f"{option} is given twice")
        if equals:
            values[name] = value
        elif options[name].annotation is bool:
            values[name] = "True"
        elif rest and not rest[0].startswith("--"):
            values[name] = rest.pop(0)
        else:
            raise ValueError(f"{option} needs a value: write {option}=VALUE")
    named = [values[name] for name in ("ckpt_dir", "tokenizer_path") if name in values]
    if len(paths + named) != 2 or "" in paths + named:
        raise ValueError(
            "give two paths, the checkpoint's folder and its tokenizer.model, "
            f"not {' '.join(paths) or 'none'}"
        )
    return paths + [f"--{name}={value}" for name, value in values.items()]


def parse(name: str, kind: object, text: str) -> object:
    """An option's value of type kind. fire's own parser would evaluate Python literals."""
    if kind is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{name} must be True or False, not {text!r:.60}")
        return text == "True"
    if kind is int:
        return parse_int(name, text)
    if kind is float:
        with suppress(ValueError):
            return float(text)
        raise ValueError(f"{name} must be a number, not {text!r:.60}")
    if name in PATHS:
        return os.path.expanduser(text)  # A shell leaves the ~ of --option=~/path to us.
    return text


def parse_int(name: str, text: str) -> int:
    with suppress(ValueError):
        number = int(text)
        if number < 2**63:
            return number
    raise ValueError(f"{name} must be a whole number below 2**63, not {text!r:.60}")


def replace_closed_outputs() -> None:
    """Python sets an output to None if it was closed at the start: let it swallow its text."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - likewise


def flush_outputs() -> None:
    for output in (sys.stdout, sys.stderr):
        try:
            output.flush()
        except OSError:
            # Python flushes again when it exits, and would complain: give it another file.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, output.fileno())
            os.close(null)


def say(line: str) -> None:
    with suppress(OSError):
        print(line, file=sys.stderr)


# What is refused before PyTorch is imported or weights are read


def check_options(
    max_gen_len: int, dtype: str, prompt: str | None, chat: bool, experts_svg: str | None
) -> None:
    """Raise ValueError or OSError for options that cannot work, whatever the model is."""
    if max_gen_len < 1:
        raise ValueError(f"max_gen_len must be at least 1, not {max_gen_len}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype!r:.60}")
    if sys.stdin is None and (prompt == "-" or (chat and prompt is None)):
        raise ValueError("standard input is closed: give --prompt TEXT")
    if experts_svg is not None:
        check_picture(experts_svg, prompt, chat)


def check_picture(path: str, prompt: str | None, chat: bool) -> None:
    folder = os.path.dirname(path) or "."
    if not path.endswith(".svg") or not os.path.isdir(folder):
        raise ValueError(
            f"experts_svg must name an .svg file in a folder that exists, not {path!r:.200}"
        )
    if chat:
        raise ValueError("experts_svg draws a completion, not a conversation: leave out chat")
    if prompt is None:
        raise ValueError("experts_svg draws a single text: give --prompt")
    with open(path, "a"):
        pass  # It can be written: known now, not after minutes of work.


def read_prompts(prompt: str | None, chat: bool, default: list[str]) -> list[str]:
    """The texts to complete or to answer: none if a conversation asks for them later.

    The prompt "-" is what standard input has, without the newline that ends its last line.
    """
    if prompt == "-":
        return [sys.stdin.read().removesuffix("\n")]
    if prompt is not None:
        return [prompt]
    return [] if chat else default


def dtype_of(name: str) -> "torch.dtype":
    import torch

    return getattr(torch, name)


def check_prompts(
    tokenizer_path: str,
    prompts: list[str],
    chat: bool,
    one_by_one: bool,
    cache_size: CacheSize,
    sampling: Sampling,
) -> list[list[int]]:
    """The tokens of each prompt.

    Raises FileNotFoundError or ValueError if they cannot be completed with these options.
    What is likely to disappoint is logged as a warning.
    """
    from . import ModelArgs, Tokenizer
    from .generation import check_request

    tokenizer = Tokenizer(tokenizer_path)
    if chat:
        tokens = [tokenizer.encode_dialog([user(prompt)]) for prompt in prompts]
    else:
        tokens = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    # Of a model's sizes only these three matter to a request.
    args = ModelArgs(vocab_size=tokenizer.n_words, **cache_size._asdict())
    requests = [[each] for each in tokens] if one_by_one and tokens else [tokens]
    for request in requests:
        check_request(request, args, *sampling)
    if not chat:
        warn_of_chat_formats(tokenizer, prompts)
    if tokens:
        warn_of_cuts(max(map(len, tokens)), cache_size.max_seq_len, sampling.max_gen_len)
    return tokens


def user(text: str) -> "Message":
    return {"role": "user", "content": text}


def warn_of_chat_formats(tokenizer: "Tokenizer", prompts: list[str]) -> None:
    for prompt in prompts:
        hint = tokenizer.chat_hint(prompt)
        if hint:
            logger.warning("%s", hint)


def warn_of_cuts(longest: int, max_seq_len: int, max_gen_len: int) -> None:
    needed = longest + max_gen_len
    if needed > max_seq_len:
        logger.warning(
            "max_seq_len %d leaves room for %d of max_gen_len %d new tokens: %d would hold all",
            max_seq_len,
            max_seq_len - longest,
            max_gen_len,
            needed,
        )


# What is printed


def show(
    generator: "Mixtral",
    prompt: str,
    tokens: list[int],
    completion: Iterable[int],
    experts: bool,
    experts_svg: str | None,
) -> None:
    """Print a prompt, its completion as it comes and, if asked for, the experts of both."""
    print(prompt, end="\n> ", flush=True)
    new: list[int] = []
    print_text(generator.tokenizer, completion, new)
    if experts or experts_svg is not None:
        show_experts(generator, tokens + new, experts, experts_svg)
    print(f"\n\n{RULE}\n", flush=True)


def print_text(tokenizer: "Tokenizer", tokens: Iterable[int], printed: list[int]) -> None:
    """Print the text of tokens as they come; those that have come are added to printed."""

    def each() -> Iterator[int]:
        for token in tokens:
            printed.append(token)
            yield token

    for piece in tokenizer.decode_stream(each()):
        print(piece, end="", flush=True)


def show_experts(
    generator: "Mixtral", tokens: list[int], experts: bool, experts_svg: str | None
) -> None:
    """Print and draw which experts the tokens had."""
    from . import routing

    chosen, _ = routing.route(generator.model, tokens)
    pieces = routing.split(generator.tokenizer, tokens)
    n_experts = generator.model.params.num_experts
    if experts:
        print("\n\n" + routing.show(pieces, chosen, n_experts), end="")
    if experts_svg is not None:
        with open(experts_svg, "w", encoding="utf-8") as file:
            file.write(routing.svg(pieces, chosen, n_experts))


# Conversations


def hold_conversation(
    generator: "Mixtral", prompts: list[str], sampling: Sampling, experts: bool
) -> None:
    """Answer the prompt or, without one, each line of standard input until that ends.

    At a terminal Ctrl-C ends an answer. Raises ValueError at the end of max_seq_len.
    """
    conversation = Conversation(generator, sampling, experts)
    if prompts:
        conversation.answer(prompts[0])
        return
    at_terminal = sys.stdin.isatty()
    for text in ask() if at_terminal else read_lines():
        try:
            conversation.answer(text)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()
        conversation.check_room()


def ask() -> Iterator[str]:
    """What a person types at the terminal, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits long lines with it, where there is one
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if text.strip():
            yield text


def read_lines() -> Iterator[str]:
    """The lines of standard input, each printed as it would look at a terminal."""
    for line in sys.stdin:
        text = line.removesuffix("\n")
        if text.strip():
            print(f"> {text}", flush=True)
            yield text


class Conversation:
    """A dialog with an Instruct model, whose answers are printed as they come."""

    def __init__(self, generator: "Mixtral", sampling: Sampling, experts: bool):
        self.generator = generator
        self.sampling = sampling
        self.experts = experts
        self.dialog: list[Message] = []
        self.length = 0  # tokens

    def answer(self, text: str) -> None:
        """Print the answer to a user's message.

        If it is interrupted, what has come of the answer stays in the dialog.
        """
        tokenizer = self.generator.tokenizer
        self.dialog.append(user(text))
        tokens = tokenizer.encode_dialog(self.dialog)
        self.length = len(tokens)
        self.check_room()
        new: list[int] = []
        try:
            print_text(tokenizer, self.generator.stream_tokens(tokens, *self.sampling), new)
        finally:
            self.dialog.append({"role": "assistant", "content": tokenizer.decode(new)})
            self.length += len(new)
        if self.experts:
            show_experts(self.generator, tokens + new, experts=True, experts_svg=None)
        print(flush=True)

    def check_room(self) -> None:
        max_seq_len = self.generator.model.params.max_seq_len
        if self.length >= max_seq_len:
            raise ValueError(
                f"max_seq_len is {max_seq_len}, and the conversation has {self.length} tokens: "
                "raise max_seq_len to go on"
            )
