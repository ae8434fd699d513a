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
    """How new tokens are drawn: the last arguments of Mixtral.stream_tokens.

    generation.py has a Sampling of its own, but importing it imports PyTorch.
    """

    temperature: float
    top_p: float
    max_gen_len: int


class CacheSize(NamedTuple):
    """The tokens in a row of the cache, and its rows: the third and fourth parameters of build."""

    max_seq_len: int
    rows: int


# The command line


def run(main: Callable[..., None], argv: list[str]) -> int:
    """Call main with the options in argv and return the exit code.

    An error becomes one line on stderr.
    """
    replace_closed_outputs()
    set_encodings()
    code = 0
    try:
        if wants_help(argv, options_of(main)):
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
    """Let fire call main, and have it parse each value by the type of main's parameter."""
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


def wants_help(argv: list[str], options: Options) -> bool:
    """Whether -h or --help stands where an option can. After --prompt, -h is a text."""
    for before, argument in zip(["", *argv], argv):
        if argument == "--help" or (argument == "-h" and not takes_next(before, options)):
            return True
    return False


def takes_next(argument: str, options: Options) -> bool:
    """Whether it is an option whose value is the argument after it."""
    option = options.get(name_of(argument))
    return argument.startswith("--") and option is not None and option.annotation is not bool


def name_of(option: str) -> str:
    """The parameter that is set by an option, as max_seq_len is by --max-seq-len."""
    return option.removeprefix("--").replace("-", "_")


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
        name = name_of(option)
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
    given = named + paths
    if len(given) != 2 or "" in given:
        raise ValueError(
            "give two paths, the checkpoint's folder and the tokenizer.model in it, "
            f"not {' '.join(given) or 'none'}"
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
    """Replace outputs that were closed at the start, which Python sets to None, by /dev/null."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - likewise


def set_encodings() -> None:
    """Read and print any text.

    What cannot be decoded is marked, as it is in argv, and the tokenizer refuses it. What cannot
    be encoded is printed as an escape. In a notebook the streams are of other types.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # With newline=None, Windows' line ends become "\n".
        sys.stdin.reconfigure(errors="surrogateescape", newline=None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


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
    """Raise ValueError for options that cannot work, whatever the model is."""
    if max_gen_len < 1:
        raise ValueError(f"max_gen_len must be at least 1, not {max_gen_len}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r:.60}")
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
    # Whether it can be written is checked before minutes of work; nothing is created yet.
    if not os.path.lexists(path):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"experts_svg: no file can be made in {folder}")
    elif not os.path.isfile(path) or not os.access(path, os.W_OK):
        raise ValueError(f"experts_svg: {path} cannot be written, or is not a file")


def read_prompts(prompt: str | None, chat: bool, default: list[str]) -> list[str]:
    """The texts to complete or to answer: none for a conversation, which asks for them later.

    The prompt "-" stands for standard input, without the newline that ends its last line. Raises
    ValueError if a question to answer is blank.
    """
    if prompt is None:
        return [] if chat else default
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    if chat and not prompt.strip():
        raise ValueError("there is no question to answer: the prompt is blank")
    return [prompt]


def dtype_of(name: str) -> "torch.dtype":
    import torch

    return getattr(torch, name)


def cache_size(max_seq_len: int, prompts: list[str], one_by_one: bool) -> CacheSize:
    """Only prompts that are completed together need a row each."""
    rows = 1 if one_by_one or not prompts else len(prompts)
    return CacheSize(max_seq_len, rows)


def check_prompts(
    tokenizer_path: str,
    prompts: list[str],
    chat: bool,
    size: CacheSize,
    max_batch_size: int,
    sampling: Sampling,
) -> list[list[int]]:
    """The tokens of each prompt.

    Raises FileNotFoundError or ValueError if they cannot be completed with these options.
    What is legal but probably not wanted is logged as a warning.
    """
    from . import Tokenizer

    tokenizer = Tokenizer(tokenizer_path)
    tokens = encode_prompts(tokenizer, prompts, chat)
    check_fits(tokens, tokenizer.n_words, size, max_batch_size, sampling)
    if not chat:
        warn_of_chat_formats(tokenizer, prompts)
    if tokens:
        warn_beyond_max_seq_len(max(map(len, tokens)), size.max_seq_len, sampling.max_gen_len)
    return tokens


def encode_prompts(tokenizer: "Tokenizer", prompts: list[str], chat: bool) -> list[list[int]]:
    if chat:
        # A conversation has no prompt yet, but its format can be tried.
        tokenizer.encode_dialog([user("Hello")])
        return [tokenizer.encode_dialog([user(prompt)]) for prompt in prompts]
    return [tokenizer.encode(prompt, tokenizer.add_bos, eos=False) for prompt in prompts]


def check_fits(
    tokens: list[list[int]],
    n_words: int,
    size: CacheSize,
    max_batch_size: int,
    sampling: Sampling,
) -> None:
    """Raise ValueError unless the prompts fit into the cache and the options make sense."""
    from . import ModelArgs
    from .generation import check_request

    # The other sizes of a model do not matter to a request.
    args = ModelArgs(
        vocab_size=n_words, max_seq_len=size.max_seq_len, max_batch_size=max_batch_size
    )
    check_request([], args, *sampling)  # Before a conversation there are no prompts to check.
    for start in range(0, len(tokens), size.rows):
        check_request(tokens[start : start + size.rows], args, *sampling)


def user(text: str) -> "Message":
    return {"role": "user", "content": text}


def warn_of_chat_formats(tokenizer: "Tokenizer", prompts: list[str]) -> None:
    for prompt in prompts:
        hint = tokenizer.chat_hint(prompt)
        if hint:
            logger.warning("%s", hint)


def warn_beyond_max_seq_len(longest: int, max_seq_len: int, max_gen_len: int) -> None:
    needed = longest + max_gen_len
    if needed > max_seq_len:
        logger.warning(
            "only %d of the %d new tokens fit into max_seq_len %d: %d would hold all",
            max_seq_len - longest,
            max_gen_len,
            max_seq_len,
            needed,
        )


# What is printed


def complete(
    generator: "Mixtral",
    prompts: list[str],
    tokens: list[list[int]],
    stream: bool,
    sampling: Sampling,
    experts: bool,
    experts_svg: str | None,
) -> None:
    """Print each prompt and its completion; if stream, as it comes."""
    completions: Iterable[Iterable[int]]
    if stream:
        completions = [generator.stream_tokens(each, *sampling) for each in tokens]
    else:
        completions, _ = generator.generate(tokens, **sampling._asdict())
    for prompt, before, completion in zip(prompts, tokens, completions):
        print_completion(generator, prompt, before, completion, experts, experts_svg)


def print_completion(
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
    print_text(generator.tokenizer, noting(completion, new))
    if experts or experts_svg is not None:
        show_experts(generator, tokens + new, experts, experts_svg)
    print(f"\n\n{RULE}\n", flush=True)


def noting(tokens: Iterable[int], seen: list[int]) -> Iterator[int]:
    """The same tokens as they come. Each is added to seen, so that none is lost at Ctrl-C."""
    for token in tokens:
        seen.append(token)
        yield token


def print_text(tokenizer: "Tokenizer", tokens: Iterable[int]) -> None:
    """Print the text of tokens as they come."""
    for piece in tokenizer.decode_stream(tokens):
        print(piece, end="", flush=True)


def show_experts(
    generator: "Mixtral", tokens: list[int], experts: bool, experts_svg: str | None
) -> None:
    """Print and draw which experts processed the tokens."""
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

    At a terminal Ctrl-C ends an answer. Raises ValueError when the conversation has filled
    max_seq_len, and if standard input is not a terminal and has no question.
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
        conversation.check_room(conversation.length)
    if not at_terminal and not conversation.dialog:
        raise ValueError("there is no question to answer: standard input is blank")


def ask() -> Iterator[str]:
    """What a person types at the terminal, until Ctrl-D."""
    from .tokenizer import check_text

    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits long lines with it, where there is one
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        try:
            check_text(text)
        except ValueError as error:  # A wrong key does not end a conversation.
            say(f"error: {error}")
            continue
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
        self.has_warned = False

    def answer(self, text: str) -> None:
        """Print the answer to a user's message.

        If it is interrupted, what has come of the answer stays in the dialog. If nothing has, the
        message does not stay either.
        """
        tokenizer = self.generator.tokenizer
        question = user(text)
        tokens = tokenizer.encode_dialog([*self.dialog, question])
        self.check_room(len(tokens))
        new: list[int] = []
        try:
            stream = self.generator.stream_tokens(tokens, *self.sampling)
            print_text(tokenizer, noting(stream, new))
        except KeyboardInterrupt:
            if new:
                self.remember(question, tokens, new)
            raise
        self.remember(question, tokens, new)
        if self.experts:
            show_experts(self.generator, tokens + new, experts=True, experts_svg=None)
        print(flush=True)
        self.warn_at_max_gen_len(len(new))

    def remember(self, question: "Message", tokens: list[int], new: list[int]) -> None:
        """Add to the dialog a question, with which tokens end, and new, its answer."""
        answer = self.generator.tokenizer.decode(new)
        self.dialog += [question, {"role": "assistant", "content": answer}]
        self.length = len(tokens) + len(new)

    def warn_at_max_gen_len(self, n_new: int) -> None:
        """Say once that answers stop at max_gen_len."""
        max_gen_len = self.sampling.max_gen_len
        if n_new == max_gen_len and not self.has_warned:
            self.has_warned = True
            logger.warning("the answer stops at max_gen_len %d: raise it to see all", max_gen_len)

    def check_room(self, length: int) -> None:
        max_seq_len = self.generator.model.params.max_seq_len
        if length >= max_seq_len:
            raise ValueError(
                f"max_seq_len is {max_seq_len}, and the conversation has {length} tokens: "
                "raise max_seq_len to go on"
            )
