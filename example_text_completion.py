"""Completes the prompts below with a Mixtral checkpoint: edit them, or pass --prompt."""

import sys

import fire

fire.decorators.FIRE_METADATA = (
    "_fire"  # else --help lists the decorator's own attribute as a command
)

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


@fire.decorators.SetParseFns(ckpt_dir=str, tokenizer_path=str, prompt=str)
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
    **unknown,
):
    """Complete the prompts in this script, or the one given, and print the completions.

    Args:
        ckpt_dir: the downloaded folder, with the weights and their sizes
        tokenizer_path: the checkpoint's tokenizer.model
        temperature: 0 takes the likeliest token; the higher, the more varied the text
        top_p: draw from the likeliest tokens that have this probability together
        max_seq_len: room for a prompt and its completion, in tokens
        max_gen_len: at most so many new tokens for a prompt
        max_batch_size: room for so many prompts
        num_gpus: spread the experts over 1, 2, 4 or 8 GPUs; 0 runs on the CPU
        prompt: complete this text instead of the script's prompts
        stream: complete one prompt after the other and print the text as it comes
    """
    values = locals()
    if unknown:
        raise ValueError(f"there is no option --{min(unknown)}: --help lists them")
    for name, kind in main.__annotations__.items():
        value = values[name]
        if kind in (int, float) and type(value) not in (int, kind):
            whole = "whole " * (kind is int)
            raise ValueError(f"--{name} is a {whole}number, not {value!r}")
        if kind is bool and type(value) is not bool:
            raise ValueError(f"--{name} takes no value, so not {value!r}")
        if kind is int and name != "num_gpus" and value < 1:
            raise ValueError(f"--{name} is at least 1, not {value}")

    from mixtral import Mixtral, ModelArgs, Tokenizer  # takes seconds: PyTorch
    from mixtral.generation import check_request

    prompts = PROMPTS if prompt is None else [prompt]
    tokenizer = Tokenizer(tokenizer_path)
    tokens = [tokenizer.encode(text, bos=True, eos=False) for text in prompts]
    room = ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    check_request(tokens, room, temperature, top_p)  # before minutes of loading
    generator = Mixtral.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, num_gpus
    )
    if stream:
        options = temperature, top_p, max_gen_len
        texts = (generator.stream_completion(text, *options) for text in prompts)
    else:
        results = generator.text_completion(prompts, temperature, top_p, max_gen_len)
        texts = ([result["generation"]] for result in results)
    for text, pieces in zip(prompts, texts):
        print(text, end="\n> ", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print("\n\n==================================\n")


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
