"""Completes the prompts below with a Mixtral checkpoint: edit them, or pass --prompt."""

import functools
import inspect
import itertools
import os
import re
import sys
from contextlib import suppress

PROMPTS = [
    "Mistral.ai is a company that",
    "Simply put, the theory of relativity states that",
    """A brief message congratulating the team on the launch:

        Hi everyone,

        I just""",
    """Translate English to French:

        sea otter => loutre de mer
        peppermint => menthe poivrée
        plush girafe => girafe peluche
        cheese =>""",
]


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
    num_gpus: int = 2,
    prompt: str | None = None,
    stream: bool = False,
    cpu_layers: int = 0,
    int8: bool = False,
    experts: bool | str = False,
):
    """Complete the prompts in this script, or the one given, and print the completions.
    CKPT_DIR is a downloaded folder, and TOKENIZER_PATH the tokenizer.model in it.

    temperature: 0 takes the likeliest token; higher values vary the text more
    top_p: draw from the likeliest tokens that have this probability together
    max_seq_len: room for a prompt and its completion, in tokens
    max_gen_len: the largest number of new tokens for a prompt
    max_batch_size: the largest number of prompts that are completed together
    num_gpus: spread the experts over 1, 2, 4 or 8 GPUs; 0 runs on the CPU
    prompt: complete this text instead of the script's prompts
    stream: complete one prompt after the other and print the text as it comes
    cpu_layers: keep the experts of the last N layers in host memory
    int8: keep the experts in 8 bits
    experts: show which expert each token had; --experts FILE.svg draws it as well
    """
    check_options(max_gen_len, experts, prompt)
    prompts = PROMPTS if prompt is None else [prompt]
    new = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len}
    room = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    kept = {"num_gpus": num_gpus, "cpu_layers": cpu_layers, "int8": int8}
    tokens = check_prompts(tokenizer_path, prompts, stream, room, new)
    if isinstance(experts, str):
        open(experts, "a").close()  # fails now if it cannot be written
    from mixtral import Mixtral

    generator = Mixtral.build(ckpt_dir, tokenizer_path, **room, **kept)
    if stream:
        completions = (generator.stream_tokens(each, **new) for each in tokens)
    else:
        completions, _ = generator.generate(tokens, **new)
    for text, before, completion in zip(prompts, tokens, completions):
        show(generator, text, before, completion, experts)


def check_options(max_gen_len: int, experts: bool | str, prompt: str | None) -> None:
    if max_gen_len < 1:
        raise ValueError(f"--max-gen-len must be at least 1, not {max_gen_len}")
    if isinstance(experts, str):
        folder = os.path.dirname(experts) or "."
        if not experts.endswith(".svg") or not os.path.isdir(folder):
            where = "an .svg file in a folder that exists"
            raise ValueError(f"--experts must name {where}, not {experts!r}")
        if prompt is None:
            raise ValueError("--experts FILE.svg draws a single text: give --prompt")


def check_prompts(
    tokenizer_path: str, prompts: list[str], stream: bool, room: dict, new: dict
) -> list[list[int]]:
    """The prompts' tokens, if they can be completed: known before minutes of loading."""
    from mixtral import ModelArgs, Tokenizer  # takes seconds: PyTorch
    from mixtral.generation import check_request

    tokenizer = Tokenizer(tokenizer_path)
    tokens = [tokenizer.encode(text, bos=True, eos=False) for text in prompts]
    args = ModelArgs(vocab_size=tokenizer.n_words, **room)
    for together in [[each] for each in tokens] if stream else [tokens]:
        check_request(together, args, **new)
    return tokens


def show(generator, text: str, before: list[int], completion, experts) -> None:
    """Print a prompt and its completion, as it comes."""
    print(text, end="\n> ", flush=True)
    shown, new = itertools.tee(completion)
    for piece in generator.tokenizer.decode_stream(shown):
        print(piece, end="", flush=True)
    if experts:
        show_experts(generator, [*before, *new], experts)
    print("\n\n==================================\n", flush=True)


def show_experts(generator, tokens: list[int], picture: bool | str) -> None:
    """Print which experts the tokens had; picture may name a file to draw it in."""
    from mixtral import routing

    chosen, _ = routing.route(generator.model, tokens)
    pieces = routing.split(generator.tokenizer, tokens)
    n_experts = generator.model.params.num_experts
    print("\n\n" + routing.show(pieces, chosen, n_experts), end="")
    if isinstance(picture, str):
        with open(picture, "w", encoding="utf-8") as file:
            file.write(routing.svg(pieces, chosen, n_experts))


OPTIONS = inspect.signature(main).parameters
KINDS = {int: "a whole number below 10**9", float: "a number", bool: "True or False"}


def print_help() -> None:
    summary, options = inspect.getdoc(main).split("\n\n")
    print("usage: python example_text_completion.py CKPT_DIR TOKENIZER_PATH [OPTIONS]")
    print(f"\n{summary}\n\nOptions, their defaults, and what they do:")
    for line in options.splitlines():
        name, text = line.split(": ", 1)
        option = f"--{name.replace('_', '-')}"
        print(f"  {option:<18}{OPTIONS[name].default!s:<7}{text}")


def value_follows(kind: type, rest: list[str]) -> bool:
    if kind is bool or not rest or rest[0] == "-" or rest[0].startswith("--"):
        return False
    return kind != bool | str or rest[0].endswith(".svg")


def normalize(argv: list[str]) -> list[str]:
    """The paths, then each option as --name=value, which leaves fire no choice."""
    values, paths, rest = {}, [], argv
    while rest:
        argument, *rest = rest
        if not argument.startswith("-"):
            paths.append(argument)
            continue
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if name not in OPTIONS:
            raise ValueError(f"there is no option {option}: --help lists them all")
        if name in values:
            raise ValueError(f"{option} is given twice")
        kind = OPTIONS[name].annotation
        if not equals and value_follows(kind, rest):
            value, *rest = rest
        elif not equals and kind in (bool, bool | str):
            value = "True"
        elif not equals:
            raise ValueError(f"{option} needs a value: write {option}=VALUE")
        values[name] = value
    given = len(paths) + len(values.keys() & {"ckpt_dir", "tokenizer_path"})
    if given != 2 or "" in paths:
        raise ValueError(
            f"give two paths, the checkpoint's folder and its tokenizer.model, "
            f"not {' '.join(paths) or 'none'}"
        )
    return paths + [f"--{name}={value}" for name, value in values.items()]


def read(name: str, text: str) -> object:
    """The value of an option; fire's own reading would evaluate Python literals."""
    kind = OPTIONS[name].annotation
    if kind == bool | str and text == "True":
        return True
    if kind not in KINDS:
        return text
    try:
        value = {"True": True, "False": False}[text] if kind is bool else kind(text)
        if kind is not int or value < 10**9:
            return value
    except (KeyError, ValueError):
        pass
    option = name.replace("_", "-")
    raise ValueError(f"--{option} must be {KINDS[kind]}, not {text!r:.60}")


def name_options(message: str) -> str:
    """A message of the library, with its arguments named as this script's options."""
    names = "|".join(name for name in OPTIONS if "_" in name or name == "int8")
    return re.sub(
        rf"(?<!\S)({names})(?=[\s,:]|$)|^({'|'.join(OPTIONS)})(?= must)",
        lambda match: f"--{match[0].replace('_', '-')}",
        message,
    )


def run(argv: list[str]) -> int:
    """Run the script and return its exit code; an error becomes one line on stderr."""
    null = os.open(os.devnull, os.O_WRONLY)  # in place of outputs that are closed
    sys.stdout = sys.stdout or os.fdopen(null, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(null, "w", closefd=False)
    sys.stdout.reconfigure(errors="backslashreplace")
    code, message = 0, ""
    try:
        if "-h" in argv or "--help" in argv:
            print_help()
        else:
            import fire

            readers = {name: functools.partial(read, name) for name in OPTIONS}
            fire.Fire(fire.decorators.SetParseFns(**readers)(main), normalize(argv))
    except BrokenPipeError:
        pass  # The reader of stdout has gone, as `| head -1` does.
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        code, message = 1, f"error: {name_options(' '.join(str(error).splitlines()))}"
    if code:
        with suppress(OSError):
            print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python flushes again when it exits, which must not fail.
            os.dup2(null, stream.fileno())
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
