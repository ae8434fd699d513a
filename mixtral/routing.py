"""Which experts the router chose for a text, as in Figure 8 of arXiv:2401.04088."""

import os
import re
import shutil
import sys
from html import escape
from itertools import groupby, pairwise
from unicodedata import combining, east_asian_width

import torch
from torch import Tensor

from .generation import PREFILL_TOKENS
from .model import Span, Transformer
from .tokenizer import Tokenizer

# Backgrounds, the first three for white text, and their numbers in xterm's palette. Any
# two differ by 16.9 or more (CIEDE2000), in normal vision and each kind of dichromacy.
RGB = "005faf", "d70000", "5f5f5f", "ff8700", "00af87", "ffff5f", "afd7ff", "af87af"
XTERM = 25, 160, 59, 208, 36, 227, 153, 139
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")  # for terminals and XML


def route(model: Transformer, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Each token's experts, first choice first, and weights, both (n_layers, T, top_k).

    Reads the tokens again, into row 0 of the cache, which must not be in use.
    """
    moes, logits, start = [layer.feed_forward for layer in model.layers], [], 0

    def keep(gate, inputs, output):
        logits.append(output)

    hooks = [moe.gate.register_forward_hook(keep) for moe in moes]
    decoder, model.decoder = model.decoder, None  # a recorded step runs no hooks
    try:
        for part in torch.tensor(tokens).split(PREFILL_TOKENS[model.device.type]):
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


def layout(pieces, chosen, n_experts, columns):
    """Yield lines of (expert or None, text): unbroken and with numbers if columns is 0."""
    for layer in sorted({0, (len(chosen) - 1) // 2, len(chosen) - 1}):
        first, every = chosen[layer, :, 0].tolist(), chosen[layer].flatten()
        same = sum(a == b for a, b in pairwise(first)) / max(len(first) - 1, 1)
        title = f"Layer {layer}: {same:.1%} of neighbours share a first expert"
        yield [(None, f"{title}, by chance {1 / n_experts:.1%}. Shares of choices:")]
        shares = every.bincount(minlength=n_experts) / len(every)
        legend = [(e, f" {e}: {share:.1%} ") for e, share in enumerate(shares)]
        yield from (legend[i : i + 8] for i in range(0, n_experts, 8))
        marks = [f"[{e}]" if not columns or n_experts > 8 else "" for e in first]
        shown = [x and (m + x if x == "\n" else x + m) for x, m in zip(pieces, marks)]
        text = UNSAFE.sub("\ufffd", "".join(shown))
        owners = [i for i, piece in enumerate(shown) for _ in piece]
        n = max(2, (columns or 2 * len(text)) // max([1, *map(width, text)]))
        for line in re.finditer(rf".{{0,{n - 1}}}\n|.{{1,{n}}}(?= |$)|.{{{n}}}", text):
            parts = groupby(range(*line.span()), owners.__getitem__)
            yield [(first[i], "".join(text[k] for k in part)) for i, part in parts]
        yield []


def width(text: str) -> int:
    return sum((not combining(c)) + (east_asian_width(c) in "WF") for c in text)


def show(pieces: list[str], chosen: Tensor, n_experts: int) -> str:
    """For standard output: colours, or numbers without a terminal or with NO_COLOR."""
    colour, lines = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), []
    columns = shutil.get_terminal_size().columns if colour else 0
    for line in layout(pieces, chosen, n_experts, columns):
        lines.append("")
        for expert, text in line:
            if colour and expert is not None:
                text = re.sub(r"\s", " ", text)  # a newline has a colour too
                style = f"48;5;{XTERM[expert % 8]};38;5;{231 if expert % 8 < 3 else 16}"
                text = f"\x1b[{style}m{text}\x1b[0m"
            lines[-1] += text.rstrip("\n")
    return "\n".join(lines)


def svg(pieces: list[str], chosen: Tensor, n_experts: int) -> str:
    """A picture 830 wide; a newline is an empty cell at the end of its line."""
    boxes, texts, y = "", "", 6
    for line in layout(pieces, chosen, n_experts, 95):
        x, y, spans = 16.0, y + 21, ""
        for expert, text in line:
            size, ink = 8.4 * width(text), "black"
            if expert is not None:
                ink = "white" if expert % 8 < 3 else "black"
                box = f'x="{x:.1f}" y="{y - 15}" width="{size - 1:.1f}" height="20"'
                boxes += f'<rect {box} fill="#{RGB[expert % 8]}"/>\n'
            place = f'x="{x:.1f}" textLength="{size:.1f}" fill="{ink}"'
            spans += f"<tspan {place}>{escape(text)}</tspan>"
            x += size
        texts += f'<text y="{y}" xml:space="preserve">{spans}</text>\n'
    size = f'width="830" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 830 {y}">\n'
        "<title>The router at work</title>\n<desc>A text at the first, middle and last "
        "layer, each token on the colour of its first expert.</desc>\n"
        f'<rect {size} fill="#fff"/>\n{boxes}'
        f'<g font-family="monospace" font-size="14">\n{texts}</g>\n</svg>\n'
    )
