"""How one new token per row is computed fast on GPUs: `step`, run once and then recorded.

`step` repeats the arithmetic of model.py, with one or two kernel launches per line. The work of a
device up to the next copy is one CUDA graph, so that the host's part of a step is a list of calls.
With one device that is a single replay for the whole step; with N it is N + 1 replays and
2 (N - 1) copies per layer.
"""

import contextlib
import functools
import gc
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from . import kernels
from .model import MoE, Transformer

logger = logging.getLogger(__name__)

# The numbers of rows that a step is recorded for. In between, the last row is repeated.
RECORDED_ROWS = (1, 2, 4, 8, 16)


class Decoder:
    """A model's decode step for up to max_rows rows, recorded for as many as it needs.

    It is made before the first prompt, as running a step writes to the first slot of the cache.
    Raises RuntimeError if the devices are too old for the kernels.
    """

    @torch.inference_mode()
    def __init__(self, model: Transformer):
        capability = min(map(torch.cuda.get_device_capability, model.devices))
        if capability < (8, 0):
            raise RuntimeError("the kernels need compute capability 8.0")
        if model.params.num_experts > 64:  # a program compares each logit with all others
            raise RuntimeError("the kernels choose among at most 64 experts")
        # The numbers up to the first that is at least max_batch_size, or all if none is.
        numbers = [n for n in RECORDED_ROWS if n < 2 * model.params.max_batch_size]
        self.max_rows = numbers[-1]
        # Tokens, rows and positions. Each begins at a multiple of 16 bytes, whatever the number
        # of rows, so that Triton compiles a kernel once.
        self.inputs = torch.zeros(3, RECORDED_ROWS[-1], dtype=torch.long, device=model.device)
        # The model holds its decoder. A weak reference back avoids a reference cycle, so that both
        # leave memory as soon as they are no longer used.
        weak_model = cast(Transformer, weakref.proxy(model))
        recorder = Recorder(model.devices)
        model.n_passes += 1  # the steps that are run below write to the cache
        gc.collect()  # frees now what must not be freed during a recording
        self.steps: dict[int, Callable[[], Tensor]] = {}
        begin = time.time()
        for n in numbers:
            self.steps[n] = record(weak_model, self.inputs[:, :n], recorder)
            if time.time() - begin > 1:  # as when Triton compiles
                logger.info("Recorded the decode step for %d of %d rows", n, self.max_rows)

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits, float32 (T, vocab), after a new token in each of T rows."""
        T = len(tokens)
        n = min(n for n in self.steps if n >= T)
        inputs = torch.stack((tokens, rows, positions))  # (3, T)
        self.inputs[:, :T] = inputs
        self.inputs[:, T:n] = inputs[:, -1:]  # writes the same key and value again
        return self.steps[n]()[:T].clone()  # the next step overwrites its logits


def step(run: "Launch", model: Transformer, inputs: Tensor, buffers: "Buffers") -> Tensor:
    """Logits, float32 (T, vocab), given the T tokens, their rows and positions."""
    run.on(0)
    tokens, rows, positions = inputs  # (3, T)
    h = model.tok_embeddings(tokens)  # (T, dim)
    for layer in model.layers:
        attention = layer.attention
        moe = layer.feed_forward
        cache = (attention.cache_k, attention.cache_v, rows, positions)
        # (T, (n_heads + 2 n_kv_heads) head_dim)
        qkv = kernels.linear(layer.attention_norm(h), attention.wqkv)
        q = kernels.rope_and_cache(qkv, model.freqs_cis, *cache)  # (T, n_heads, head_dim)
        heads = kernels.attention(q, *cache)  # (T, n_heads head_dim)
        h = kernels.linear(heads, attention.wo.weight, residual=h)
        x = layer.ffn_norm(h)
        gate_logits = kernels.linear(x, moe.gate.weight)  # (T, num_experts)
        h = add_mixture(run, moe, x, gate_logits, h, buffers)
    return kernels.linear(model.norm(h), model.output.weight).float()


def add_mixture(
    run: "Launch", moe: MoE, x: Tensor, logits: Tensor, h: Tensor, buffers: "Buffers"
) -> Tensor:
    """h (T, dim) plus the mixture of experts of x (T, dim)."""
    if not moe.stacks:
        return experts_on_host(run, moe, x, logits, h, buffers)
    if len(moe.stacks) == 1:
        return local_experts(moe, 0, x, logits, residual=h)
    return experts_on_devices(run, moe, x, logits, h, buffers)


def local_experts(
    moe: MoE,
    i: int,
    x: Tensor,
    logits: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What the experts of the i-th stack add to the mixture, on the current device."""
    stack = moe.stacks[i]
    return kernels.experts(
        x,
        logits,
        stack.w1,
        stack.w2,
        stack.w3,
        first=stack.first,
        top_k=moe.top_k,
        residual=residual,
        out=out,
        scales=stack.scales,
    )


def experts_on_devices(
    run: "Launch", moe: MoE, x: Tensor, logits: Tensor, h: Tensor, buffers: "Buffers"
) -> Tensor:
    """Send all tokens to every device, and add up the sums that come back.

    All layers share the same buffers. Nothing is overwritten before it is read, because a copy
    between two devices makes each one's stream wait for the other's: packing, copies, experts and
    sum of a layer are done before the next layer packs.
    """
    others = range(1, len(moe.stacks))
    buffers.pack(x, logits)
    for i in others:
        run.host(buffers.packed[i].copy_, buffers.packed[0])
        run.on(i)
        local_experts(moe, i, *buffers.unpack(i), out=buffers.sums[i])
    run.on(0)
    local_experts(moe, 0, x, logits, out=buffers.sums[0])
    for i in others:
        run.host(buffers.gathered[i].copy_, buffers.sums[i])
    run.on(0)  # once more, since a host call ends a device's part
    return h.add_(buffers.gathered.sum(0))  # (T, dim)


def experts_on_host(
    run: "Launch", moe: MoE, x: Tensor, logits: Tensor, h: Tensor, buffers: "Buffers"
) -> Tensor:
    buffers.pack(x, logits)
    run.host(mix_on_host, moe, buffers)
    run.on(0)
    return h.add_(buffers.gathered[0])


def mix_on_host(moe: MoE, buffers: "Buffers") -> None:
    x, logits = buffers.split(buffers.packed[0].cpu())  # the layer's only synchronization
    buffers.gathered[0].copy_(moe.mix(x, logits), non_blocking=True)


class Buffers:
    """The tensors that cross between devices: packed[i] to device i, sums[i] back to gathered[i].

    All layers share them. They exist before a recording, which can allocate on one device only.
    """

    def __init__(self, T: int, model: Transformer):
        self.x_shape = (T, model.params.dim)
        self.logits_shape = (T, model.params.num_experts)
        # What crosses in one copy: the tokens and then their gate logits.
        size = T * (model.params.dim + model.params.num_experts)
        dtype = model.norm.weight.dtype
        self.packed = [torch.empty(size, dtype=dtype, device=each) for each in model.devices]
        # Sums over a device's experts come back in float32, so that the number of devices
        # changes the text as little as it can.
        shape = (len(model.devices), *self.x_shape)
        self.gathered = torch.empty(shape, dtype=torch.float32, device=model.device)
        self.sums = [self.gathered[0]]  # the first device's sum need not travel
        for device in model.devices[1:]:
            self.sums.append(torch.empty(self.x_shape, dtype=torch.float32, device=device))

    def pack(self, x: Tensor, logits: Tensor) -> None:
        torch.cat((x.flatten(), logits.flatten()), out=self.packed[0])

    def unpack(self, i: int) -> tuple[Tensor, Tensor]:
        """x (T, dim) and logits (T, num_experts) as they arrived on device i."""
        return self.split(self.packed[i])

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        T, dim = self.x_shape
        x = packed[: T * dim].view(self.x_shape)
        logits = packed[T * dim :].view(self.logits_shape)
        return x, logits


class Launch:
    """Runs a step as it is written.

    on(i) opens a segment of work on device i, which the next on() or host() closes. Tape, below,
    records each segment as a CUDA graph.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self.devices = devices
        self.segment = contextlib.ExitStack()  # what is to be undone at the segment's end

    def on(self, i: int) -> None:
        """What follows is work of device i."""
        self.segment.close()
        self.segment.enter_context(torch.cuda.device(self.devices[i]))

    def host(self, function: Callable, *args: object) -> None:
        """The host makes this call: a copy, or experts in its memory."""
        self.segment.close()
        function(*args)


class Tape(Launch):
    """Records a step as the calls that repeat it."""

    def __init__(self, recorder: "Recorder"):
        super().__init__(recorder.devices)
        self.recorder = recorder
        self.calls: list[Callable] = []

    def on(self, i: int) -> None:
        self.segment.close()  # ends the graph that is being recorded
        graph = torch.cuda.CUDAGraph()
        # The stream's device becomes the current one too.
        self.segment.enter_context(torch.cuda.stream(self.recorder.streams[i]))
        # Other threads may call CUDA meanwhile, which the default mode would not allow.
        graph.capture_begin(self.recorder.pools[i], capture_error_mode="thread_local")
        self.segment.callback(graph.capture_end)  # before the stream is left
        self.calls.append(graph.replay)  # on the current stream of its own device

    def host(self, function: Callable, *args: object) -> None:
        self.segment.close()
        self.calls.append(functools.partial(function, *args))


class Recorder:
    """A stream and a pool of memory to record with, for each entry of the device list."""

    def __init__(self, devices: Sequence[torch.device]):
        self.devices = devices
        self.streams = [torch.cuda.Stream(device) for device in devices]
        self.renew_pools()

    def renew_pools(self) -> None:
        """A failed recording leaves its pool unusable."""
        self.pools = [torch.cuda.graph_pool_handle() for _ in self.devices]


def record(model: Transformer, inputs: Tensor, recorder: Recorder) -> Callable[[], Tensor]:
    """A function that runs the step on inputs (3, n) and returns the logits.

    It replays the recorded step or, if recording fails, runs the step as it is written.
    """
    buffers = Buffers(inputs.shape[1], model)

    def launch() -> Tensor:
        run = Launch(recorder.devices)
        with run.segment:  # closes the last segment, also after an error
            return step(run, model, inputs, buffers)

    launch()  # compiles, which a recording cannot
    # A recording uses another stream, which does not wait for what has been launched.
    for device in recorder.devices:
        torch.cuda.synchronize(device)
    tape = Tape(recorder)
    try:
        with tape.segment:  # ends the last graph, also after an error
            logits = step(tape, model, inputs, buffers)
    except RuntimeError as error:
        recorder.renew_pools()
        # The end of a failed recording may fail too; then the cause is the error's context. (A
        # variable for it would keep alive the frames of its traceback, and so the model.)
        why = str(error.__context__ or error).partition("\n")[0]
        logger.warning("decoding %d rows without CUDA graphs, slower: %s", inputs.shape[1], why)
        return launch

    def replay() -> Tensor:
        for call in tape.calls:
            call()
        return logits

    return replay
