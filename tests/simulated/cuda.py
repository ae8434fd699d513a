"""Real arithmetic over pretend CUDA devices, for machines that have none.

A tensor "on" ``cuda:1`` is a :class:`Labelled` wrapper around CPU data: operations run
on that data, so values are those of the CPU, while the label answers ``.device``.
What a real GPU would notice is checked or counted: mixed devices, copies between
devices, waits of the host, kernel launches and memory. When things are done is in
queues.py.
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from simulated.queues import Event, Graph, Queues, Storage, Stream

aten = torch.ops.aten
CPU = torch.device("cpu")
real_to = torch.Tensor.to
active: list["Simulation"] = []

# Ops that make the host wait whatever their arguments. Composite ops are listed beside
# their parts, since inference mode shows them undecomposed.
SYNCS = {"item", "is_nonzero", "equal", "nonzero", "where.default", "masked_select"}
SYNCS |= {"_local_scalar_dense", "_unique", "_unique2", "unique_dim", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL |= {"_local_scalar_dense", "item", "is_nonzero", "_unsafe_view"}
# Composites that build tensors from C++ options, where no label can show: run whole.
WHOLE = {
    F.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    F.rms_norm: aten.rms_norm.default,
    F.one_hot: aten.one_hot.default,
}


class Labelled(torch.Tensor):
    """CPU data (``inner``) under a device label; C++ takes it for a CPU tensor."""

    inner: torch.Tensor
    storage: Storage
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.storage.device)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner: torch.Tensor, storage: Storage) -> "Labelled":
        # A view of a normal tensor is a normal tensor, in inference mode too.
        with torch.inference_mode(inner.is_inference()):
            self = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
            )
        self.inner, self.storage = inner, storage
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Modes are per thread: this serves the other threads of a simulation.
        if not active:
            raise RuntimeError(f"{func}: a simulated tensor outlived its simulation")
        return active[-1].__torch_dispatch__(func, types, args, kwargs)

    # C++ would answer these for a CPU tensor (or refuse), without a dispatch.
    def cpu(self, **kwargs: Any) -> torch.Tensor:
        return self.to("cpu", **kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.inner!r} on {self.device}"


class Simulation(Queues, TorchDispatchMode):
    """What the simulated devices did: see :func:`simulated_cuda`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # spares every op a detour through torch.compile's guards

    def __init__(self, count: int, capability: tuple[int, int]) -> None:
        TorchDispatchMode.__init__(self)
        self.count, self.capability = count, capability
        self.storages = weakref.WeakValueDictionary[int, Storage]()
        self.peak: Counter[str] = Counter()  # the most bytes in use, since it was cleared
        self.launches: Counter[str] = Counter()
        Queues.__init__(self, count)
        self.reset()

    def reset(self) -> None:
        """Forget copies, waits, launches and replays."""
        self.copies: list[tuple[str, str, int]] = []
        self.syncs: list[str] = []
        self.replays: list[str] = []
        self.launches.clear()

    def bytes(self, device: Any) -> int:
        """Memory in use, of the distinct live storages."""
        live, device = list(self.storages.values()), self.resolve(device)
        return sum(storage.size for storage in live if storage.device == device)

    def resolve(self, device: Any) -> torch.device:
        """The device meant by ``device``, with an index if it is CUDA."""
        device = torch.device("cuda", device) if type(device) is int else device
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", self.current)
        if device.type == "cuda" and device.index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device})")
        return device

    def index(self, device: Any = None) -> int:
        return self.current if device is None else self.resolve(device).index

    def exchange(self, index: int) -> int:
        """Make ``index`` current unless negative (torch's "no change"); the old one."""
        old, self.current = self.current, self.current if index < 0 else index
        return old

    def waited(self, name: str) -> None:
        if self.recording:
            raise RuntimeError(f"the host waits for a device that is recorded ({name})")
        self.syncs.append(name)

    def copy(
        self, to: torch.Tensor, data: torch.Tensor, work: Callable, non_blocking: bool
    ) -> None:
        """Between two devices."""
        source, place = data.device, to.device
        if self.recording:
            raise RuntimeError(f"a copy to {place} while a device is recorded")
        # PyTorch converts where the data is, before it crosses.
        self.copies.append((str(source), str(place), to.nbytes))
        if place == CPU and not non_blocking:
            self.waited("copy_")
        if CPU in (source, place):
            self.compute(source if place == CPU else place, work, [to, data], 0)
        else:
            self.cross(source.index, place.index, work)

    def compute(self, device: torch.device, work: Callable, met: list, launches: int | None) -> Any:
        """What work returns, done with the tensors met, on this device.

        It counts as so many launches; None is one if a tensor is new, and not a view.
        """
        if device.type == "cuda":
            self.enter(device)
        out, on = work(), [tensor for tensor in met if isinstance(tensor, Labelled)]
        if launches is None:
            outs = out if isinstance(out, (list, tuple)) else (out,)
            ours = {address(tensor.inner) for tensor in on}
            launches = int(any(address(tensor) not in ours for tensor in outs))
        if launches and device.type == "cuda":
            self.launches[str(device)] += launches
            if self.recording:
                self.recording.record([t.storage for t in on], work, out)
        return self.wrap(out, device, {id(t.inner): t for t in on})

    def wrap(self, out: Any, label: torch.device, known: dict[int, Labelled]) -> Any:
        if isinstance(out, (list, tuple)):
            return type(out)(self.wrap(item, label, known) for item in out)
        if not isinstance(out, torch.Tensor) or label.type != "cuda":
            return out
        if (same := known.get(id(out))) is not None:  # in place, or nothing to do
            if same.shape != out.shape:
                raise NotImplementedError("resizing a simulated tensor")
            return same
        if (storage := self.storages.get(key := address(out))) is None:
            pool, size = self.recording and self.recording.pool, out.untyped_storage()
            storage = self.storages[key] = Storage(label, size.nbytes(), pool)
            self.peak[str(label)] = max(self.peak[str(label)], self.bytes(label))
            if self.recording:
                self.enter(label)  # allocates nothing but on the recorded device
                pool.append((weakref.ref(storage), out))
        return Labelled(out, storage)

    def check(self, func: Any, args: Any, met: list[torch.Tensor]) -> torch.device:
        """The one device of an op's tensors; refuses a mixture as CUDA would."""
        # A scalar of the CPU may come along, but not be written to.
        used = [t for t in met if isinstance(t, Labelled) or t.dim() or t is args[0]]
        devices = sorted({str(tensor.device) for tensor in used}, reverse=True)
        if len(devices) > 1:
            raise RuntimeError(f"Expected one device in {func}, not {devices}")
        return used[0].device

    def waits(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this op makes the host wait."""
        name = func.overloadpacket.__name__
        if name in INDEXING:
            return any(i is not None and i.dtype == torch.bool for i in args[1])
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name == "one_hot":
            return [*args[1:], *kwargs.values(), -1][0] == -1
        if name == "_grouped_mm":  # older devices read the offsets and loop
            return self.capability < (9, 0)
        return name in SYNCS or func.__name__ in SYNCS

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = self.resolve(kwargs["device"]) if kwargs.get("device") else None
        if Labelled not in types and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        met: list[torch.Tensor] = []
        name = func.overloadpacket.__name__
        if name in INDEXING and isinstance(args[0], Labelled):  # may be on the CPU
            indices = [i if i is None else i.to(args[0].device) for i in args[1]]
            args = (args[0], indices, *args[2:])
        raw, raw_kwargs = unwrap((args, kwargs), met)
        if target is not None:
            raw_kwargs["device"] = CPU if target.type == "cuda" else target
        work = functools.partial(func, *raw, **raw_kwargs)
        if name in ("_to_copy", "to") and target not in (None, args[0].device):
            new = torch.empty_like(raw[0], dtype=kwargs.get("dtype"))
            args = (self.wrap(new, target, {}), args[0], kwargs.get("non_blocking"))
            name, work = "copy_", functools.partial(new.copy_, raw[0])
        if name == "copy_" and args[0].device != args[1].device:
            self.copy(*args[:2], work, [*args[2:], *kwargs.values(), False][0])
            return args[0]
        if target is None:
            target = self.check(func, args, met)
        if self.waits(func, args, kwargs):
            self.waited(name)
        count = 0 if name in NO_KERNEL else 1 if func._schema.is_mutable else None
        return self.compute(target, work, met, count)


class Devices(TorchFunctionMode):
    """Completes "cuda" to the current device, and keeps :data:`WHOLE` ops whole."""

    def __init__(self, sim: Simulation) -> None:
        super().__init__()
        self.sim = sim

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = self.sim.resolve(kwargs["device"])
        generator = kwargs.get("generator")  # whose label is lost on the way to C++
        place = kwargs.get("device") or getattr([*args, 0][0], "device", CPU)
        if generator is not None and generator.device.type != place.type:
            raise RuntimeError(f"{func}: the generator is for {generator.device}")
        if func in WHOLE and CausalBias not in types:  # that one computes a mask first
            func, values = WHOLE[func], (*args, *kwargs.values())
            if any(isinstance(value, Labelled) for value in values):
                return self.sim.__torch_dispatch__(func, (Labelled,), args, kwargs)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A CPU generator under a device label."""

    def __new__(cls, device: Any = "cpu") -> "Labelled":
        self = super().__new__(cls)
        self.label = active[-1].resolve(device)
        return self

    device = property(lambda self: self.label)


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def unwrap(value: Any, met: list[torch.Tensor]) -> Any:
    """``value`` with CPU data for labelled tensors; lists all tensors met."""
    if isinstance(value, torch.Tensor):
        met.append(value)
        return value.inner if isinstance(value, Labelled) else value
    if isinstance(value, dict):
        return {key: unwrap(item, met) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [unwrap(item, met) for item in value]
    return value


def kernel(launches: int) -> Callable[[Callable], Callable]:
    """A kernel's stand-in, of so many launches: a function that computes the same."""

    def wrapper(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, out: Labelled | None = None, **kwargs: Any) -> Labelled:
            met: list[torch.Tensor] = []
            raw, raw_kwargs, target = unwrap((args, kwargs, out), met)
            sim, places = active[-1], {str(tensor.device) for tensor in met}
            if places != {f"cuda:{sim.current}"}:
                raise RuntimeError(f"launched on cuda:{sim.current}, not {places}")

            def work() -> torch.Tensor:
                new = function(*raw, **raw_kwargs)
                return new if target is None else target.copy_(new)

            return sim.compute(met[0].device, work, met, launches)

        return run

    return wrapper


def to(self: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``, which otherwise compares devices where no label can show."""
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    target = self.device if device is None else active[-1].resolve(device)
    if target == self.device or "cuda" not in (target.type, self.device.type):
        place = {} if isinstance(self, Labelled) else {"device": target}
        return real_to(self, dtype=dtype or self.dtype, copy=copy, **place)
    more = {"dtype": dtype, "device": target, "non_blocking": non_blocking}
    with torch._C.DisableTorchFunction():
        return active[-1].__torch_dispatch__(aten._to_copy.default, (), (self,), more)


@contextlib.contextmanager
def simulated_cuda(
    count: int, memory: int = 80 << 30, capability: tuple[int, int] = (8, 0)
) -> Iterator[Simulation]:
    """Within the block, ``count`` CUDA devices exist; it yields their records.

    ``copies`` lists (source, destination, bytes), ``syncs`` names what made the host
    wait and ``replays`` the devices of the graphs replayed, in order; ``launches``
    counts kernels per device, in inference mode one for a composite op. Blocking copies
    to a device are no syncs. Other threads may use the tensors and ``.to``, but not
    create tensors with ``device=``.
    """
    sim = Simulation(count, capability)

    cuda = {
        "_lazy_init": lambda: None,  # called by C++ whenever a device argument is CUDA
        "_exchange_device": sim.exchange,
        "_maybe_exchange_device": sim.exchange,
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "current_device": lambda: sim.current,
        "get_device_capability": lambda device=None: capability,
        "memory_reserved": lambda device: sim.bytes(device),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (memory - sim.bytes(device), memory),
        "CUDAGraph": functools.partial(Graph, sim),
        "Event": functools.partial(Event, sim),
        "Stream": functools.partial(Stream, sim),
        "current_stream": lambda device=None: sim.streams[sim.index(device)],
        "graph_pool_handle": object,
        "stream": sim.stream,
        "synchronize": sim.synchronize,
    }
    tensor = {
        "to": to,
        "type_as": lambda self, other: self.to(other.device, other.dtype),
    }

    def new_bias(cls: type, *args: int) -> torch.Tensor:
        # A subclass cannot be made from what a dispatch mode returns.
        with torch._C._DisableTorchDispatch():
            return torch.Tensor.__new__(cls, *args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(torch.Tensor, **tensor))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(CausalBias, "__new__", new_bias))
        # torch.tensor(..., device=) then makes its copy where modes can see it.
        set_lift = torch._C._set_only_lift_cpu_tensors
        stack.callback(set_lift, torch._C._only_lift_cpu_tensors())
        set_lift(True)
        active.append(sim)
        stack.callback(active.pop)
        stack.enter_context(sim)
        stack.enter_context(Devices(sim))
        yield sim
