"""Experts in 8 bits: how little they change what the demo knows, and the logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from mixtral import Tokenizer, Transformer
from mixtral.checkpoint import load_checkpoint, read_params
from mixtral.model import Span


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, text: str) -> float:
    """Of chapters with an empty line between them, as tests/demo/README.md counts.

    A window has at most 512 tokens; all of a chapter but the first score their second
    half only.
    """
    bits = 0.0
    for chapter in text.split("\n\n"):
        chapter = chapter.removesuffix("\n") + "\n"
        ids = [*tokenizer.encode(chapter, bos=False, eos=True)]
        for start in range(0, len(ids), 256):
            scored = len(ids[start : start + 256])
            context = ids[max(0, start - 255) : start + 256]
            window = torch.tensor([tokenizer.bos_id, *context])
            span = Span(0, 0, len(window) - 1)
            logits = model.forward_packed(window[:-1], [span])[-scored:]
            loss = F.cross_entropy(logits, window[-scored:], reduction="sum")
            bits += loss.item() / math.log(2)
    return bits / len(text.encode())


def test_bits_per_byte(demo):
    """8 bits cost at most 0.1 %."""
    tokenizer = Tokenizer(demo / "tokenizer.model")
    text = (demo / "heldout.txt").read_text(encoding="utf-8")
    figures = {}
    for int8 in (False, True):
        model = Transformer(read_params(demo, 512, 1), int8=int8)
        load_checkpoint(model, demo)
        figures[int8] = bits_per_byte(model, tokenizer, text)
    print(figures)
    assert figures[False] == pytest.approx(1.178, abs=2e-3)
    assert figures[True] <= 1.001 * figures[False]
