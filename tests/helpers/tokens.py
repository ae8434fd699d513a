"""Tokenizers as fine-tunes have them, and what a stream of tokens yields when."""

import json
import shutil
from pathlib import Path

from mixtral import Tokenizer

CHATML = {"<|im_end|>": 32000, "<|im_start|>": 32001}
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def fine_tune(folder: Path, model: Path, added: dict = CHATML, config: dict | None = None) -> Path:
    """Write a tokenizer.model with added tokens into folder, and return its path.

    config is that of tokenizer_config.json, which is left out if it is None.
    """
    folder.mkdir(exist_ok=True)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Path(shutil.copy(model, folder / "tokenizer.model"))


def added_tokens_decoder(added: dict = CHATML) -> dict:
    """What tokenizer_config.json says of all special tokens."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, **added}
    return {str(i): {"content": text, "special": True, **flags} for text, i in ids.items()}


def stream(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What decode_stream() has yielded after each token, and at the end."""
    text, states = "", []

    def one_at_a_time():
        for token in tokens:
            yield token
            states.append(text)

    for part in tokenizer.decode_stream(one_at_a_time()):
        assert part
        text += part
    return [*states, text]
