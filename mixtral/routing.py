"""Which experts the router chose for a text, as in Figure 8 of arXiv:2401.04088.

`route` asks the model, `split` cuts the text into one piece for each token, and `show` and
`svg` put each piece on the colour of its first expert, the one with the largest weight.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .model import MoE, Span, Transformer
from .tokenizer import Tokenizer

# A text is read in passes of this many tokens, which bounds the memory for activations.
PASS_TOKENS = 512


def route(model: Transformer, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """The experts of each token, best first, and their weights: both (n_layers, T, top_k).

    Overwrites row 0 of the cache.
    """
    with gate_logits(model) as logits:
        start = 0
        for part in torch.tensor(tokens).split(PASS_TOKENS):
            model.forward_packed(part, [Span(0, start, len(part))], last_only=True)
            start += len(part)
    by_layer = torch.stack([torch.cat(parts) for parts in logits])  # (n_layers, T, num_experts)
    weights, chosen = by_layer.float().topk(model.params.num_experts_per_tok)
    return chosen.cpu(), weights.softmax(dim=-1).cpu()


@contextmanager
def gate_logits(model: Transformer) -> Iterator[list[list[Tensor]]]:
    """Within this context, each forward pass adds its gates' logits to the lists given.

    There is a list for each layer, and a tensor (T, num_experts) in it for each pass.
    """
    gates = [module.gate for module in model.modules() if isinstance(module, MoE)]
    logits: list[list[Tensor]] = [[] for _ in gates]
    hooks = []
    decoder = model.decoder
    model.decoder = None  # It replays recorded steps, in which hooks do not run.
    try:
        for gate, passes in zip(gates, logits):
            hooks.append(gate.register_forward_hook(append_output(passes)))
        yield logits
    finally:
        model.decoder = decoder
        for hook in hooks:
            hook.remove()


def append_output(outputs: list[Tensor]) -> Callable[[nn.Module, tuple, Tensor], None]:
    """A forward hook that appends a module's output to outputs."""

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs.append(output)

    return hook


def split(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """decode(tokens) in one piece for each token.

    If several tokens spell one character, the first of them has it, and the others have "".
    """
    pieces: list[str] = []
    # Decoded alone, a token would lose its leading space: so it follows the one before it.
    before: list[int] = []
    while len(pieces) < len(tokens):
        unit = first_unit(tokenizer, tokens[len(pieces) :])
        text = tokenizer.decode(before + unit)
        pieces.append(text[len(tokenizer.decode(before)) :])
        pieces += [""] * (len(unit) - 1)
        if not tokenizer.is_special(unit[0]):
            before = unit
    return pieces


def first_unit(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens that spell the first character, if they are its bytes, or one token."""
    if tokenizer.is_byte(tokens[0]):
        for length in (4, 3, 2):
            unit = tokens[:length]
            if len(tokenizer.decode(unit)) == 1:
                return unit
    return tokens[:1]


class Colour(NamedTuple):
    rgb: str
    xterm: int  # its number in xterm's palette
    ink: str
    xterm_ink: int


# Expert e has colour e % 8. Any two differ by 16.9 or more (CIEDE2000), in normal vision and
# each kind of dichromacy.
COLOURS = (
    Colour("#005faf", 25, "#fff", 231),
    Colour("#d70000", 160, "#fff", 231),
    Colour("#5f5f5f", 59, "#fff", 231),
    Colour("#ff8700", 208, "#000", 16),
    Colour("#00af87", 36, "#000", 16),
    Colour("#ffff5f", 227, "#000", 16),
    Colour("#afd7ff", 153, "#000", 16),
    Colour("#af87af", 139, "#000", 16),
)

# Characters that a terminal would obey, or that XML forbids.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


class Cell(NamedTuple):
    """A part of a line: text on its expert's colour, or plain if expert is None."""

    text: str
    expert: int | None


LINE_END = Cell("\n", None)


def cells(
    pieces: list[str], chosen: Tensor, n_experts: int, numbers: bool = False
) -> Iterator[Cell]:
    """What is shown of the first and the last layer; if numbers, each expert's number too."""
    for layer in sorted({0, len(chosen) - 1}):
        experts = chosen[layer, :, 0]  # (T,)
        same = experts.diff().eq(0).sum().item() / max(len(experts) - 1, 1)
        title = f"Layer {layer}: {same:.1%} of neighbours share their first expert"
        yield Cell(f"{title} ({1 / n_experts:.1%} by chance)", None)
        yield LINE_END
        yield Cell("Share of tokens: ", None)
        for expert, count in enumerate(experts.bincount(minlength=n_experts).tolist()):
            yield Cell(f" {expert}: {count / len(experts):.0%} ", expert)
        yield LINE_END
        for piece, expert in zip(pieces, experts.tolist()):
            # Only so many colours can be told apart.
            number = f"[{expert}]" if numbers or n_experts > len(COLOURS) else ""
            *ended, rest = UNSAFE.sub("\ufffd", piece).split("\n")
            for text in ended:
                yield Cell(f"{text}↵{number}", expert)
                yield LINE_END
            if rest:
                yield Cell(f"{rest}{number}", expert)
        yield LINE_END
        yield LINE_END


def show(pieces: list[str], chosen: Tensor, n_experts: int) -> str:
    """For standard output: colours, or numbers without a terminal or with NO_COLOR."""
    in_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown = ""
    for text, expert in cells(pieces, chosen, n_experts, numbers=not in_colours):
        if in_colours and expert is not None:
            colour = COLOURS[expert % len(COLOURS)]
            shown += f"\x1b[48;5;{colour.xterm};38;5;{colour.xterm_ink}m{text}\x1b[0m"
        else:
            shown += text
    return shown


WIDTH = 830
MARGIN = 16
LINE_HEIGHT = 21
CHARACTER_WIDTH = 8.4


def svg(pieces: list[str], chosen: Tensor, n_experts: int) -> str:
    """A picture of the text, which is wrapped to its width."""
    boxes = ""
    texts = ""
    x = float(MARGIN)
    y = MARGIN + 11  # the baseline of the first line
    for text, expert in cells(pieces, chosen, n_experts):
        if text == "\n":
            x = float(MARGIN)
            y += LINE_HEIGHT
            continue
        width = CHARACTER_WIDTH * len(text)
        is_full = x + width > WIDTH - MARGIN / 2
        # Near the end, a line is left at a word's beginning, so that words stay whole.
        if is_full or (x > WIDTH - 90 and text.startswith(" ")):
            x = float(MARGIN)
            y += LINE_HEIGHT
        ink = "#000"
        if expert is not None:
            colour = COLOURS[expert % len(COLOURS)]
            ink = colour.ink
            boxes += f'<rect x="{x:.1f}" y="{y - 15}" width="{width - 1:.1f}" height="20"'
            boxes += f' fill="{colour.rgb}"/>\n'
        # A line break between two tspans would be drawn as a space: so it is inside the tag.
        texts += f'<tspan\nx="{x:.1f}" y="{y}" textLength="{width:.1f}" fill="{ink}">'
        texts += f"{escape(text)}</tspan>"
        x += width
    height = y - LINE_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        f' viewBox="0 0 {WIDTH} {height}">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n'
        f"{boxes}"
        f'<text font-family="monospace" font-size="14" xml:space="preserve">{texts}</text>\n'
        f"</svg>\n"
    )
