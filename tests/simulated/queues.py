"""The queues of simulated CUDA devices: streams, events and recorded graphs.

What a graph replays and what devices copy to one another is done when its turn comes, in
order within a stream and at random between streams, as far as no event forbids it. All
other work is done at once, after the work that its stream still has to do.
"""

import contextlib
import functools
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Event:
    """torch.cuda.Event, recorded once."""

    def __init__(self, queues: "Queues", **kwargs: bool) -> None:
        self.queues, self.done = queues, False

    def record(self, stream: "Stream | None" = None) -> None:
        stream = stream or self.queues.streams[self.queues.current]
        stream.add(functools.partial(setattr, self, "done", True))

    def synchronize(self) -> None:
        self.queues.waited("Event.synchronize")
        self.queues.advance(lambda: self.done)


class Stream:
    """torch.cuda.Stream: pieces of work, each with the event that it waits for."""

    def __init__(self, queues: "Queues", device: Any = None) -> None:
        self.queues, self.index, self.pace = queues, queues.index(device), 1.0
        self.work: deque[tuple[Event | None, Callable]] = deque()
        queues.every.append(self)

    def add(self, work: Callable, after: Event | None = None) -> None:
        self.work.append((after, work))
        if self.queues.random is None:
            self.queues.drain(self)
        elif self.queues.random.random() < self.queues.eager:
            self.queues.advance(lambda: self.queues.random.random() < 0.5)

    def ready(self) -> bool:
        return bool(self.work) and (self.work[0][0] is None or self.work[0][0].done)

    def record_event(self) -> Event:
        event = Event(self.queues)
        event.record(self)
        return event

    def wait_stream(self, other: "Stream") -> None:
        self.add(lambda: None, other.record_event())


class Storage:
    """A device's memory, alive as long as one of the tensors that share it."""

    def __init__(self, device: torch.device, size: int, pool: list | None) -> None:
        self.device, self.size, self.pool = device, size, pool


class Graph:
    """torch.cuda.CUDAGraph. What it records is computed at once, too.

    Memory of its pool that is no longer in use when something is recorded is overwritten
    at that point of every replay, for another tensor may be put there.
    """

    def __init__(self, queues: "Queues") -> None:
        self.queues = queues
        self.records: list[Callable] = []
        self.inputs: list[weakref.ref] = []  # storages that are not of the pool

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.stream = self.queues.streams[self.queues.current]
        if self.queues.recording or self.stream in self.queues.defaults:
            raise RuntimeError("a recording needs a stream of its own, and one at a time")
        self.pool = self.queues.pools.setdefault(pool or id(self), [])
        self.queues.recording = self

    def capture_end(self) -> None:
        if self.queues.streams[self.queues.current] is not self.stream:
            raise RuntimeError("a recording ends in the stream that it began in")
        self.queues.recording = None

    def record(self, storages: list[Storage], work: Callable, out: Any) -> None:
        """Work that returns out, or what has to be copied to it."""
        pool = self.pool
        dead = [tensor for storage, tensor in pool if storage() is None]
        pool[:] = [pair for pair in pool if pair[0]() is not None]
        self.records += [functools.partial(spoil, tensor) for tensor in dead]
        self.records.append(functools.partial(repeat, work, out))
        self.inputs += [weakref.ref(s) for s in storages if s.pool is not pool]

    def replay(self) -> None:
        if self.queues.recording or None in [storage() for storage in self.inputs]:
            raise RuntimeError("a replay in a recording, or of memory that was freed")
        self.queues.replays.append(f"cuda:{self.stream.index}")
        for record in self.records:
            self.queues.streams[self.stream.index].add(record)


def spoil(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().fill_(255)  # NaN, or -1


def repeat(work: Callable, out: Any) -> None:
    new = work()
    pairs = zip(out, new) if isinstance(out, (list, tuple)) else [(out, new)]
    for old, tensor in pairs:
        if tensor.data_ptr() != old.data_ptr():
            old.copy_(tensor)


class Queues:
    """A part of `simulated.Simulation`."""

    def __init__(self, count: int) -> None:
        self.current = 0  # device
        self.every: list[Stream] = []
        self.defaults = [Stream(self, torch.device("cuda", i)) for i in range(count)]
        self.streams = list(self.defaults)  # each device's current one
        self.pools: dict[Any, list[tuple[weakref.ref, torch.Tensor]]] = {}
        self.recording: Graph | None = None
        self.random: random.Random | None = None
        self.schedule(None)

    def schedule(self, seed: int | None, left_out: tuple[str, int] | None = None):
        """Do work in an order drawn with seed, or at once if that is None.

        left_out may name a wait of a copy between two devices: ("source", n) or
        ("destination", n) is not made to wait in the n-th copy from here on.
        """
        self.drain(*self.every)
        self.random = None if seed is None else random.Random(seed)
        self.left_out, self.crossings = left_out, 0
        self.eager = self.random.choice((0.0, 0.5)) if self.random else 0.0

    def advance(self, done: Callable[[], bool]) -> None:
        """Work in the streams until done, or until nothing is left to do."""
        with (
            torch.inference_mode(),
            torch._C._DisableTorchDispatch(),
            torch._C.DisableTorchFunction(),
        ):
            while not done():
                if not (ready := [stream for stream in self.every if stream.ready()]):
                    break
                stream = ready[0]
                if self.random:
                    paces = [stream.pace for stream in ready]
                    (stream,) = self.random.choices(ready, paces)
                stream.work.popleft()[1]()

    def drain(self, *streams: Stream) -> None:
        """All work of these streams is done."""
        if any(stream.work for stream in streams):
            for stream in self.every if self.random else ():
                stream.pace = self.random.choice((0.02, 1.0))
            self.advance(lambda: not any(stream.work for stream in streams))
        if any(stream.work for stream in streams):
            raise RuntimeError("the streams wait for one another")

    def enter(self, device: torch.device) -> None:
        """Work on the device follows, in its current stream."""
        if self.recording is None:
            self.drain(self.streams[device.index])
        elif self.recording.stream.index != device.index:
            raise RuntimeError(f"work on {device} while another device is recorded")

    def cross(self, source: int, to: int, copy: Callable) -> None:
        """A copy between two devices, with the waits that PyTorch makes for it."""
        there, here, n = self.streams[to], self.streams[source], self.crossings
        self.crossings += 1
        if self.left_out != ("source", n):
            here.wait_stream(there)
        here.add(copy)
        if self.left_out != ("destination", n):
            there.wait_stream(here)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """torch.cuda.stream."""
        before, device = self.streams[stream.index], self.exchange(stream.index)
        self.streams[stream.index] = stream
        try:
            yield
        finally:
            self.streams[stream.index] = before
            self.exchange(device)

    def synchronize(self, device: Any = None) -> None:
        self.waited("synchronize")
        self.drain(*(s for s in self.every if s.index == self.index(device)))
