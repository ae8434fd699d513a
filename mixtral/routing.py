"""Which experts the router chose for a text, as in Figure 8 of arXiv:2401.04088."""

import os
import re
import sys
from html import escape

import torch
from torch import Tensor

from .generation import prefill_tokens
from .model import Span, Transformer
from .tokenizer import Tokenizer

# Backgrounds, the first three for white text, and their numbers in xterm's palette. Any
# two differ by 16.9 or more (CIEDE2000), in normal vision and each kind of dichromacy.
RGB = "005faf", "d70000", "5f5f5f", "ff8700", "00af87", "ffff5f", "afd7ff", "af87af"
XTERM, PLAIN = (25, 160, 59, 208, 36, 227, 153, 139), 8
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")  # for terminals and XML


def route(model: Transformer, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Each token's experts and weights (n_layers, T, top_k); overwrites cache row 0."""
    moes = [layer.feed_forward for layer in model.layers]
    logits, start, decoder = [], 0, model.decoder
    hooks = [m.gate.register_forward_hook(lambda *a: logits.append(a[2])) for m in moes]
    try:
        model.decoder = None  # a recorded step runs no hooks
        for part in torch.tensor(tokens).split(prefill_tokens(model.device)):
            model.forward_packed(part, [Span(0, start, len(part))], last_only=True)
            start += len(part)
    finally:
        model.decoder = decoder
        for hook in hooks:
            hook.remove()
    by_layer = [torch.cat(logits[i :: len(moes)]) for i in range(len(moes))]
    weights, chosen = torch.stack(by_layer).float().topk(moes[0].top_k)
    return chosen.cpu(), weights.softmax(dim=-1).cpu()


def split(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """decode(tokens) in a piece for each token; a character is in its first token's."""
    model, decode, pieces, before = tokenizer.sp_model, tokenizer.decode, [], []
    while unit := tokens[len(pieces) : len(pieces) + 4]:
        # Shorten it to the bytes of one character, or else to one token.
        while unit[1:] and not (model.is_byte(unit[0]) and len(decode(unit)) == 1):
            unit.pop()
        text = decode(before + unit)[len(decode(before)) :]
        pieces += [text] + [""] * (len(unit) - 1)
        before = before if model.is_control(unit[0]) else unit
    return pieces


def paint(pieces: list[str], chosen: Tensor, n_experts: int, numbers: bool):
    """Yield the parts of what is shown, each with its colour, an index of RGB."""
    for layer in sorted({0, (len(chosen) - 1) // 2, len(chosen) - 1}):
        first, every = chosen[layer, :, 0], chosen[layer].flatten()
        same = first.diff().eq(0).sum() / max(len(first) - 1, 1)
        title = f"Layer {layer}: {same:.1%} of neighbours share a first expert"
        yield f"{title}, by chance {1 / n_experts:.1%}. Shares of choices:\n", PLAIN
        shares = every.bincount(minlength=n_experts) / len(every)
        yield from ((f" {e}: {share:.1%} ", e % 8) for e, share in enumerate(shares))
        yield "\n", PLAIN
        for piece, expert in zip(pieces, first.tolist()):
            mark = f"[{expert}]" if piece and (numbers or n_experts > 8) else ""
            text = mark + piece if piece == "\n" else piece + mark
            yield UNSAFE.sub("\ufffd", text), expert % 8
        yield "\n\n", PLAIN


def show(pieces: list[str], chosen: Tensor, n_experts: int) -> str:
    """For standard output: colours, or numbers without a terminal or with NO_COLOR."""
    colours, shown = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), ""
    for text, i in paint(pieces, chosen, n_experts, numbers=not colours):
        if colours and text and i != PLAIN:
            style = f"\x1b[48;5;{XTERM[i]};38;5;{231 if i < 3 else 16}m"
            text = f"{style}{text}\x1b[0m".replace("\n\x1b[0m", " \x1b[0m\n")
        shown += text
    return shown


def svg(pieces: list[str], chosen: Tensor, n_experts: int) -> str:
    """A picture 830 wide; a newline is an empty cell at the end of its line."""
    texts = '<text font-family="monospace" font-size="14" xml:space="preserve">'
    boxes, x, y = '<rect width="100%" height="100%" fill="#fff"/>\n', 16.0, 27
    for text, i in paint(pieces, chosen, n_experts, numbers=False):
        width, ink = 8.4 * len(text), "fff" if i < 3 else "000"
        if x + width > 822 or (x > 740 and text[:1] == " "):
            x, y = 16.0, y + 21
        if text and i != PLAIN:
            box = f'x="{x:.1f}" y="{y - 15}" width="{width - 1:.1f}" height="20"'
            boxes += f'<rect {box} fill="#{RGB[i]}"/>\n'
        place = f'x="{x:.1f}" y="{y}" textLength="{width:.1f}"'
        texts += f'<tspan\n{place} fill="#{ink}">{escape(text)}</tspan>'
        x, y = (16.0, y + 21 * text.count("\n")) if "\n" in text else (x + width, y)
    size = f'width="830" height="{y}" viewBox="0 0 830 {y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n'
    return f"{head}{boxes}{texts}</text></svg>\n"
