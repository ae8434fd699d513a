"""Whether dot_kernels.py beats mixtral/kernels.py on a GPU: python tests/bench/try_dot_kernels.py

It should take about three minutes on one GPU of capability 8.0 or later, most of it compiling.
First the products of a layer of 8x7B, with each tiling; then whole steps, recorded with the
kernels of today and with the others in turn, A B B A.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from unittest import mock

import dot_kernels
import torch
from ceilings import DATA_SHEETS
from contenders import SIZES, draw_prompts, randomise
from dot_kernels import Tiling
from measuring import figures, seconds_of
from torch import Tensor

from mixtral import Transformer, decode, kernels
from mixtral.model import Span

TILINGS = [
    Tiling(rows=16, block_k=256, stages=4, warps=4),
    Tiling(rows=16, block_k=512, stages=3, warps=4),
    Tiling(rows=32, block_k=128, stages=4, warps=4),
    Tiling(rows=32, block_k=256, stages=3, warps=4),
    Tiling(rows=64, block_k=64, stages=6, warps=4),
    Tiling(rows=64, block_k=128, stages=4, warps=4),
]
ROWS = (1, 4, 16)
REPEATS = 5
STEPS = 32

Product = Callable[["Layer"], object]


@dataclass
class Layer:
    """A layer's weights, and what its products are given. Every layer has weights of its own."""

    wqkv: Tensor
    x: Tensor  # (T, dim)
    experts: dict  # the arguments of kernels.experts

    def bytes_of_experts(self) -> int:
        """How many bytes the experts have that some token chose."""
        used = self.experts["logits"].topk(self.experts["top_k"]).indices.unique()
        return len(used) * 3 * self.experts["w1"][0].nbytes


def layers_of(model: Transformer, rows: int) -> list[Layer]:
    layers = []
    for block in model.layers:
        stack = block.feed_forward.stacks[0]
        x = torch.randn(rows, model.params.dim, device=model.device, dtype=torch.bfloat16)
        experts = {
            "x": x,
            "logits": torch.randn(rows, model.params.num_experts, device=model.device).bfloat16(),
            "w1": stack.w1,
            "w2": stack.w2,
            "w3": stack.w3,
            "first": stack.first,
            "top_k": model.params.num_experts_per_tok,
        }
        layers.append(Layer(block.attention.wqkv, x, experts))
    return layers


def seconds_per_layer(product: Product, layers: Sequence[Layer]) -> float:
    """The time of a product, replayed for all layers: their weights do not fit into a cache."""
    product(layers[0])  # compiles, which a recording cannot
    torch.cuda.synchronize()
    tape = decode.Tape(decode.Recorder([layers[0].x.device]))
    with tape.segment:
        tape.on(0)
        for layer in layers:
            product(layer)
    (replay,) = tape.calls
    replay()
    return median(seconds_of(replay) for _ in range(REPEATS)) / len(layers)


def compare_products(model: Transformer, sheet: float) -> list[Tiling]:
    """Print the time of each product with each tiling. Returns the best of `linear`, up and down.

    The best is the one with the least time in the sum over ROWS.
    """
    totals: dict[str, dict[Tiling, float]] = {"linear": {}, "up": {}, "down": {}}
    for rows in ROWS:
        layers = layers_of(model, rows)
        linear_bytes = layers[0].wqkv.nbytes
        experts_bytes = sum(layer.bytes_of_experts() for layer in layers) / len(layers)
        today = seconds_per_layer(lambda layer: kernels.linear(layer.x, layer.wqkv), layers)
        show("linear", rows, "today", today, linear_bytes / sheet)
        today = seconds_per_layer(lambda layer: kernels.experts(**layer.experts), layers)
        show("experts", rows, "today", today, experts_bytes / sheet)
        for tiling in TILINGS:
            for name, product in products_with(tiling).items():
                seconds = seconds_per_layer(product, layers)
                size = linear_bytes if name == "linear" else experts_bytes
                show(name, rows, f"{tuple(tiling)}", seconds, size / sheet)
                totals[name][tiling] = totals[name].get(tiling, 0) + seconds
    return [min(by_tiling, key=lambda tiling: by_tiling[tiling]) for by_tiling in totals.values()]


def products_with(tiling: Tiling) -> dict[str, Product]:
    return {
        "linear": lambda layer: dot_kernels.linear(layer.x, layer.wqkv, tiling=tiling),
        "up": lambda layer: dot_kernels.experts(**layer.experts, up=tiling),
        "down": lambda layer: dot_kernels.experts(**layer.experts, down=tiling),
    }


def show(name: str, rows: int, how: str, seconds: float, at_data_sheet: float) -> None:
    share = at_data_sheet / seconds
    print(f"{name}, {rows} rows, {how}: {seconds * 1e6:.1f} us, {share:.2f} of the data sheet")
    sys.stdout.flush()


def compare_steps(model: Transformer, best: Sequence[Tiling]) -> None:
    """Print the time of whole steps in turn, and how far apart the logits at position 0 are."""
    decoders = {"today": decode.Decoder(model), "dot": decoder_with(model, best)}
    if torch.cuda.get_device_capability(model.device) >= (9, 0):
        early = [tiling._replace(early=True) for tiling in best]
        decoders["dot, early"] = decoder_with(model, early)
    for rows in decode.RECORDED_ROWS:
        tokens = torch.tensor(draw_prompts(model.params, rows, 1)).flatten().to(model.device)
        logits = {}
        for name, decoder in decoders.items():
            model.decoder = decoder
            take_steps(model, tokens)
            logits[name] = model.forward_packed(tokens, spans_of(rows, 0))
        for name, seconds in seconds_in_turn(model, decoders, tokens).items():
            speed = figures([STEPS * rows / each for each in seconds], " tok/s")
            apart = (logits[name] - logits["today"]).norm() / logits["today"].norm()
            print(f"step, {rows} rows, {name}: {speed}, logits {apart.item():.1%} apart")
            sys.stdout.flush()


def seconds_in_turn(
    model: Transformer, decoders: dict[str, decode.Decoder], tokens: Tensor
) -> dict[str, list[float]]:
    """The seconds that each decoder takes for STEPS steps, in REPEATS rounds: A B, B A, ..."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(REPEATS):
        for name in decoders if turn % 2 == 0 else reversed(decoders):
            model.decoder = decoders[name]
            seconds[name].append(seconds_of(lambda: take_steps(model, tokens)))
    return seconds


def decoder_with(model: Transformer, best: Sequence[Tiling]) -> decode.Decoder:
    """A decoder that is recorded with dot_kernels, given the tilings of linear, up and down."""
    linear, up, down = best
    module = SimpleNamespace(**vars(kernels))
    module.linear = with_options(dot_kernels.linear, tiling=linear)
    module.experts = with_options(dot_kernels.experts, up=up, down=down)
    with mock.patch.object(decode, "kernels", module):
        return decode.Decoder(model)


def with_options(function: Callable, **options: object) -> Callable:
    return lambda *args, **more: function(*args, **more, **options)


def spans_of(rows: int, position: int) -> list[Span]:
    return [Span(row, position, 1) for row in range(rows)]


def take_steps(model: Transformer, tokens: Tensor) -> None:
    for position in range(STEPS):
        tokens = model.forward_packed(tokens, spans_of(len(tokens), position)).argmax(-1)


@torch.inference_mode()
def main() -> None:
    name = torch.cuda.get_device_name()
    sheet = 1e9 * DATA_SHEETS[name]
    size = SIZES["8x7b"]
    free = torch.cuda.mem_get_info("cuda:0")[0] / 1e9
    n_layers = min(size.n_layers, int((free - 6) / 3))  # a layer has 2.91 GB of weights
    size = replace(size, n_layers=n_layers, max_batch_size=16, max_seq_len=256)
    model = Transformer(size, ["cuda:0"])
    randomise(model)
    print(f"{n_layers} layers of 8x7B on {name}", flush=True)
    best = compare_products(model, sheet)
    print(f"best: linear {best[0]}, up {best[1]}, down {best[2]}", flush=True)
    compare_steps(model, best)


if __name__ == "__main__":
    main()
