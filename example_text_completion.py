"""Completes the prompts below with a Mixtral checkpoint: edit them, or pass --prompt."""

import sys

import mixtral
from mixtral import cli

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
    chat: bool = False,
    cpu_layers: int = 0,
    int8: bool = False,
    dtype: str = "bfloat16",
    seed: int = 1,
    experts: bool = False,
    experts_svg: str | None = None,
) -> None:
    """Complete the prompts in this script, or the one given, and print the completions.
    CKPT_DIR is a downloaded folder, TOKENIZER_PATH the tokenizer.model or tokenizer.json in it.

    temperature: 0 takes the likeliest token; higher values vary the text more
    top_p: draw only from the likeliest tokens, as many as it takes to reach this probability
    max_seq_len: room for a prompt and its completion, or for a conversation, in tokens
    max_gen_len: the largest number of new tokens for a prompt, or for an answer
    max_batch_size: the largest number of prompts that are completed together
    num_gpus: spread the experts over this many GPUs; 0 runs on the CPU
    prompt: complete this text instead of the script's prompts; - reads standard input
    stream: complete one prompt after the other and print the text as it comes
    chat: an Instruct model answers the prompt, or what you type; raise max_seq_len and max_gen_len
    cpu_layers: keep the experts of the last N layers in host memory
    int8: keep the experts in 8 bits
    dtype: compute in bfloat16, float16 (for GPUs without bfloat16) or float32
    seed: the same number draws the same tokens
    experts: show which expert processed each token
    experts_svg: draw the same as a picture and write it to this .svg file; needs --prompt
    """
    cli.check_options(max_gen_len, dtype, prompt, chat, experts_svg)
    prompts = cli.read_prompts(prompt, chat, PROMPTS)
    sampling = cli.Sampling(temperature, top_p, max_gen_len)
    size = cli.cache_size(max_seq_len, prompts, one_by_one=chat or stream)
    tokens = cli.check_prompts(tokenizer_path, prompts, chat, size, max_batch_size, sampling)
    generator = mixtral.Mixtral.build(
        ckpt_dir, tokenizer_path, *size, num_gpus, seed, cli.dtype_of(dtype), cpu_layers, int8
    )
    if chat:
        cli.hold_conversation(generator, prompts, sampling, experts)
    else:
        cli.complete(generator, prompts, tokens, stream, sampling, experts, experts_svg)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
