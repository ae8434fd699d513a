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
    **unknown,
):
    """Complete the prompts in this script, or the one given, and print the completions.

    Args:
        ckpt_dir: folder with the downloaded weights and their params.json
        tokenizer_path: the checkpoint's tokenizer.model
        temperature: 0 takes the likeliest token each time; the higher, the more varied the text
        top_p: draw from the likeliest tokens that together have this probability
        max_seq_len: room for a prompt and its completion, in tokens
        max_gen_len: at most so many new tokens for each prompt
        max_batch_size: room for so many prompts at once
        num_gpus: spread the experts over 1, 2, 4 or 8 GPUs; 0 runs on the CPU
        prompt: complete this text instead of the script's prompts
    """
    if unknown:
        raise ValueError(
            f"there is no option --{next(iter(unknown))}: --help lists them"
        )
    numbers = {"temperature": temperature, "top_p": top_p}
    counts = {
        "max_seq_len": max_seq_len,
        "max_gen_len": max_gen_len,
        "max_batch_size": max_batch_size,
    }
    for name, value in (numbers | counts).items():
        if isinstance(value, bool) or not isinstance(
            value, int if name in counts else (int, float)
        ):
            raise ValueError(
                f"--{name} is a {'whole ' if name in counts else ''}number, not {value!r}"
            )
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name} is at least 1, not {value}")

    from mixtral import Mixtral, ModelArgs, Tokenizer
    from mixtral.generation import check_request

    prompts = PROMPTS if prompt is None else [prompt]
    tokenizer = Tokenizer(tokenizer_path)
    room = ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    check_request(
        [tokenizer.encode(p, bos=True, eos=False) for p in prompts],
        room,
        temperature,
        top_p,
    )
    generator = Mixtral.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, num_gpus
    )
    results = generator.text_completion(prompts, temperature, top_p, max_gen_len)
    for text, result in zip(prompts, results):
        print(text)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(
            f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno
            else f"error: {error}"
        )
    except KeyboardInterrupt:
        sys.exit(130)
