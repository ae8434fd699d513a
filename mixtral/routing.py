"""Which experts the router chose for a text, as in Figure 8 of arXiv:2401.04088.

`route` asks the model, `split` cuts the text into one piece for each token, and `show` and `svg`
give each piece the background colour of its first expert, the one with the largest weight.
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

from .generation import check_request, passes, prefill_tokens
from .model import MoE, Transformer
from .tokenizer import Tokenizer


def route(model: Transformer, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """The experts of each token, best first, and their weights: both (n_layers, T, top_k).

    Overwrites row 0 of the cache. Raises ValueError for tokens that do not fit into it, for none
    and for ids that are not in the vocabulary.
    """
    check_request([tokens], model.params)
    with gate_logits(model) as logits_by_layer:
        for (span,) in passes([tokens], prefill_tokens(model.device)):
            part = tokens[span.start : span.start + span.length]
            model.forward_packed(torch.tensor(part, device="cpu"), [span], last_only=True)
    layers = [torch.cat(logits_of_passes) for logits_of_passes in logits_by_layer]
    logits = torch.stack(layers).float()  # (n_layers, T, num_experts)
    top_logits, chosen = logits.topk(model.params.num_experts_per_tok)
    return chosen.cpu(), top_logits.softmax(dim=-1).cpu()


@contextmanager
def gate_logits(model: Transformer) -> Iterator[list[list[Tensor]]]:
    """Yield a list for each layer, to which every forward pass in the context adds gate logits.

    Each pass appends one tensor (T, num_experts) to the list of each layer.
    """
    gates = [module.gate for module in model.modules() if isinstance(module, MoE)]
    logits_by_layer: list[list[Tensor]] = [[] for _ in gates]
    hooks = []
    decoder = model.decoder
    model.decoder = None  # It replays recorded steps, in which hooks do not run.
    try:
        for gate, logits_of_passes in zip(gates, logits_by_layer):
            hooks.append(gate.register_forward_hook(append_output(logits_of_passes)))
        yield logits_by_layer
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
    """Cut decode(tokens) into one string per token.

    If several tokens spell one character, the first of them has it, and the others have "".
    """
    pieces: list[str] = []
    # Decoded alone a token loses its leading space: decode it after the one before.
    before: list[int] = []
    start = 0
    while start < len(tokens):
        unit = first_unit(tokenizer, tokens[start : start + 4])
        start += len(unit)
        text = tokenizer.decode(before + unit)
        pieces.append(text[len(tokenizer.decode(before)) :])
        pieces += [""] * (len(unit) - 1)
        if not tokenizer.is_special(unit[0]):
            before = unit
    return pieces


def first_unit(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The first token, or all that spell the first character if they are its bytes."""
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
    """The cells of the first and the last layer; if numbers, each shows its expert's number."""
    # More experts than colours: two share one.
    numbered = numbers or n_experts > len(COLOURS)
    for layer in sorted({0, len(chosen) - 1}):
        experts = chosen[layer, :, 0]  # (T,)
        yield from header_cells(layer, experts, n_experts)
        yield from text_cells(pieces, experts.tolist(), numbered)
        yield LINE_END
        yield LINE_END


def header_cells(layer: int, experts: Tensor, n_experts: int) -> Iterator[Cell]:
    """A layer's figures: two lines, given the first expert (T,) of each token."""
    share = experts.diff().eq(0).sum().item() / max(len(experts) - 1, 1)
    title = f"Layer {layer}: {share:.1%} of neighbours share their first expert"
    yield Cell(f"{title} ({1 / n_experts:.1%} by chance)", None)
    yield LINE_END
    yield Cell("Share of tokens: ", None)
    for expert, count in enumerate(experts.bincount(minlength=n_experts).tolist()):
        yield Cell(f" {expert}: {count / len(experts):.0%} ", expert)
    yield LINE_END


def text_cells(pieces: list[str], experts: list[int], numbered: bool) -> Iterator[Cell]:
    """Each piece with its expert. A piece is cut where it has a newline, which is shown as ↵."""
    for piece, expert in zip(pieces, experts):
        number = f"[{expert}]" if numbered else ""
        *ended, rest = UNSAFE.sub("\ufffd", piece).split("\n")
        for text in ended:
            yield Cell(f"{text}↵{number}", expert)
            yield LINE_END
        if rest:
            yield Cell(f"{rest}{number}", expert)


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


# In pixels. y is a line's baseline, on which its letters stand.
WIDTH = 830
MARGIN = 16
BASELINE = 11  # of the first line, below the margin
LINE_HEIGHT = 21
BOX_HEIGHT = 20
BOX_ASCENT = 15  # the part of a box above the baseline
CHARACTER_WIDTH = 8.4
BREAK_ZONE = 90  # before a line's end, in which the next word begins a new line


def svg(pieces: list[str], chosen: Tensor, n_experts: int) -> str:
    """A picture of the text, which is wrapped to its width."""
    boxes = ""
    texts = ""
    x = float(MARGIN)
    y = MARGIN + BASELINE
    for text, expert in cells(pieces, chosen, n_experts):
        if text == "\n" or is_wrapped(text, x):
            x = float(MARGIN)
            y += LINE_HEIGHT
        if text == "\n":
            continue
        width = CHARACTER_WIDTH * len(text)
        ink = "#000"
        if expert is not None:
            colour = COLOURS[expert % len(COLOURS)]
            ink = colour.ink
            boxes += f'<rect x="{x:.1f}" y="{y - BOX_ASCENT}"'
            boxes += f' width="{width - 1:.1f}" height="{BOX_HEIGHT}" fill="{colour.rgb}"/>\n'
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


def is_wrapped(text: str, x: float) -> bool:
    """Whether text that would begin at x begins the next line instead."""
    if x > WIDTH - BREAK_ZONE and text.startswith(" "):
        return True  # A word begins, which might not end on this line.
    return x + CHARACTER_WIDTH * len(text) > WIDTH - MARGIN / 2
