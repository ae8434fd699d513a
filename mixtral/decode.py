"""How one new token a row is computed fast on GPUs: `step`, run once and then recorded.

`step` is the arithmetic of model.py once more, one or two kernel launches a line. The
work of one device between two copies is recorded as a CUDA graph, so that the host's
part of a step is a list of calls: on N devices N + 1 replays and 2 (N - 1) copies a
layer, on one device a single replay for the whole step.

Nothing is overwritten before it is read, although all layers and steps share their
buffers and no events are used: a copy between two devices makes the source's stream
wait for the destination's, runs on the source's stream, and then makes the destination's
stream wait for it. So the packing, the copy out, the experts, the copy back and the sum
of a layer, and those of the next, run one after the other.
"""

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels

# Numbers of rows for which a step is recorded; in between, the last row is repeated.
ROWS = (1, 2, 4, 8, 16)


class Launch:
    """Runs a step as it is written."""

    def __init__(self, devices: Sequence[torch.device]):
        self.devices, self.open = devices, contextlib.ExitStack()

    def on(self, i: int) -> None:
        """What follows is work of device i."""
        self.open.close()
        self.open.enter_context(torch.cuda.device(self.devices[i]))

    def host(self, function: Callable, *args) -> None:
        """The host makes this call: a copy, or experts in its memory."""
        self.open.close()
        function(*args)


class Tape(Launch):
    """Records a step as the calls that repeat it."""

    def __init__(self, places: Sequence[tuple[torch.cuda.Stream, tuple[int, int]]]):
        self.places, self.open = places, contextlib.ExitStack()
        self.calls: list[Callable] = []

    def on(self, i: int) -> None:
        self.open.close()  # ends the graph that is being recorded
        (stream, pool), graph = self.places[i], torch.cuda.CUDAGraph()
        self.open.enter_context(torch.cuda.stream(stream))
        graph.capture_begin(pool)
        self.open.callback(graph.capture_end)
        self.calls.append(graph.replay)  # on the current stream of its own device

    def host(self, function: Callable, *args) -> None:
        self.open.close()
        self.calls.append(functools.partial(function, *args))


class Room:
    """Buffers for the mixture of experts of T tokens, which all layers share.

    They exist before a recording, in which no memory of another device can be had.
    """

    def __init__(self, T: int, model: nn.Module):
        dim, n_experts = model.params.dim, model.params.num_experts
        self.shapes, devices = ((T, dim), (T, n_experts)), model.devices
        empty = functools.partial(torch.empty, dtype=torch.float32)
        # What crosses in one copy: the tokens and then their gate logits.
        size, dtype = T * (dim + n_experts), model.norm.weight.dtype
        self.packed = [empty(size, device=d, dtype=dtype) for d in devices]
        # Sums over a device's experts come back in float32, so that the number of
        # devices changes the text as little as it can.
        self.parts = empty(len(devices), T, dim, device=devices[0])
        self.sums = [empty(T, dim, device=device) for device in devices]
        self.sums[0] = self.parts[0]

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, dim) and logits (T, E), without a copy."""
        parts = packed.split([math.prod(shape) for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes))


def stacks(experts: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor] | None]:
    """w1, w2 and w3 (n, ...) of the n experts on a device, and their scales, if any.

    The weights of these experts are slices of such stacks.
    """

    def whole(first: Tensor) -> Tensor:
        shape, strides = (len(experts), *first.shape), (first.numel(), *first.stride())
        return first.as_strided(shape, strides)

    first = experts[0].w1, experts[0].w2, experts[0].w3
    scales = [whole(w.scale) for w in first if w.scale is not None]
    return [whole(w.weight) for w in first], scales or None


def grouped(experts: Sequence[nn.Module], x: Tensor, counts: Tensor) -> Tensor:
    """The slices of x, counts[e] tokens for expert e, after their experts.

    Three products serve all experts, and the host need not wait for the counts.
    """
    (w1, w2, w3), _ = stacks(experts)
    product = functools.partial(F.grouped_mm, offs=counts.cumsum(0, dtype=torch.int32))
    hidden = F.silu(product(x, w1.mT), inplace=True).mul_(product(x, w3.mT))
    return product(hidden, w2.mT)


def mix_on_host(moe: nn.Module, room: Room) -> None:
    x, logits = room.unpack(room.packed[0].cpu())  # the layer's only wait
    room.parts[0].copy_(moe.mix(x, logits), non_blocking=True)


def mixture(
    run: Launch, moe: nn.Module, x: Tensor, logits: Tensor, h: Tensor, room: Room
) -> Tensor:
    """h (T, dim) plus the mixture of experts of x (T, dim)."""
    n_devices, on_host = len(moe.places), moe.places[0]["device"].type == "cpu"
    n = len(moe.experts) // n_devices

    def local(i: int, x: Tensor, logits: Tensor, **options: Tensor) -> Tensor:
        weights, scales = stacks(moe.experts[i * n : (i + 1) * n])
        kind = {"first": i * n, "top_k": moe.top_k, "scales": scales}
        return kernels.experts(x, logits, *weights, **kind, **options)

    if n_devices == 1 and not on_host:
        return local(0, x, logits, residual=h)
    torch.cat((x.flatten(), logits.flatten()), out=room.packed[0])
    if on_host:
        run.host(mix_on_host, moe, room)
        run.on(0)
        return h.add_(room.parts[0])
    for i in range(1, n_devices):
        run.host(room.packed[i].copy_, room.packed[0])
        run.on(i)
        local(i, *room.unpack(room.packed[i]), out=room.sums[i])
    run.on(0)
    local(0, x, logits, out=room.sums[0])
    for i in range(1, n_devices):
        run.host(room.parts[i].copy_, room.sums[i])
    run.on(0)
    return h.add_(room.parts.sum(0))


def step(run: Launch, model: nn.Module, inputs: Tensor, room: Room) -> Tensor:
    """Logits, float32 (T, vocab), given the T tokens, their rows and positions."""
    run.on(0)
    tokens, rows, positions = inputs  # (3, T)
    h = model.tok_embeddings(tokens)  # (T, dim)
    for layer in model.layers:
        attention, moe = layer.attention, layer.feed_forward
        cache = attention.cache_k, attention.cache_v, rows, positions
        qkv = kernels.linear(layer.attention_norm(h), attention.wqkv)
        q = kernels.rope_and_cache(qkv, model.freqs_cis, *cache)
        heads = kernels.attention(q, *cache)
        h = kernels.linear(heads, attention.wo.weight, residual=h)
        x = layer.ffn_norm(h)
        h = mixture(run, moe, x, kernels.linear(x, moe.gate.weight), h, room)
    return kernels.linear(model.norm(h), model.output.weight).float()


class Decoder:
    """A model's decode step for up to max_rows rows, recorded for each number in ROWS.

    To be made before the first prompt, as running a step writes to the first slot of
    the cache. Raises RuntimeError if the devices are too old for the kernels.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, report: Callable[[str], None]):
        self.model, self.devices = model, model.devices
        capability = min(map(torch.cuda.get_device_capability, self.devices))
        if capability < (8, 0):
            raise RuntimeError("the kernels need compute capability 8.0")
        for moe in (layer.feed_forward for layer in model.layers):
            weight = moe.experts[0].w1.weight
            multiples = not any(size % 8 for size in weight.shape)
            here = len(moe.places) == 1 and weight.is_cuda and capability >= (9, 0)
            if here and multiples and weight.dtype == torch.bfloat16:
                moe.grouped = functools.partial(grouped, moe.experts)
        numbers = [n for n in ROWS if n < 2 * model.params.max_batch_size]
        self.max_rows = numbers[-1]
        # Tokens, rows and positions. Each begins at a multiple of 16 bytes, whatever
        # the number of rows, so that Triton compiles a kernel once.
        self.inputs = torch.zeros(3, ROWS[-1], dtype=torch.long, device=model.device)
        self.places = []  # a stream and a pool of memory for each entry of the list
        for device in self.devices:
            with torch.cuda.device(device):
                pool = torch.cuda.graph_pool_handle()
                self.places.append((torch.cuda.Stream(), pool))
        gc.collect()  # frees now what must not be freed during a recording
        self.steps, begin = {}, time.time()
        for n in numbers:
            self.steps[n] = self.record(n, report)
            if time.time() - begin > 1:
                report(f"Recorded the decode step for {n} of {self.max_rows} rows")

    def record(self, n: int, report: Callable[[str], None]) -> Callable[[], Tensor]:
        """A function that makes the step for the n rows of self.inputs."""
        inputs, room = self.inputs[:, :n], Room(n, self.model)

        def launch() -> Tensor:
            run = Launch(self.devices)
            with run.open:
                return step(run, self.model, inputs, room)

        def replay() -> Tensor:
            for call in tape.calls:
                call()
            return logits

        launch()  # compiles, which a recording cannot
        for device in self.devices:
            torch.cuda.synchronize(device)
        tape = Tape(self.places)
        try:
            with tape.open:  # whatever happens, no stream stays current
                logits = step(tape, self.model, inputs, room)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            report(f"warning: decoding {n} rows without CUDA graphs, slower: {why}")
            return launch
        return replay

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits, float32 (T, vocab), after a new token in each of T rows."""
        T, values = len(tokens), torch.stack((tokens, rows, positions))
        n = min(n for n in self.steps if n >= T)
        self.inputs[:, :T] = values
        self.inputs[:, T:n] = values[:, -1:]  # writes the same key and value again
        return self.steps[n]()[:T].clone()  # the next step overwrites its logits
