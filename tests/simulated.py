"""Real arithmetic over pretend CUDA devices, for machines that have none.

A tensor "on" ``cuda:1`` is a :class:`Labelled` wrapper around CPU data: kernels run
on that data, so values are those of the CPU, while the label answers ``.device``.
What a real GPU would notice is checked or counted: mixed devices, copies between
devices, host synchronisations, kernel launches and memory.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
real_to = torch.Tensor.to
active: list["Simulation"] = []

# Ops that make the host wait whatever their arguments -> the name to report. Composite
# ops are listed beside their parts, since inference mode shows them undecomposed.
SYNCS = dict.fromkeys(("_local_scalar_dense", "item", "is_nonzero", "allclose"), "item")
SYNCS |= dict.fromkeys(("nonzero", "nonzero_numpy", "where.default"), "nonzero")
SYNCS |= dict.fromkeys(("_unique", "_unique2", "unique_dim"), "unique")
SYNCS |= {n: n for n in ("unique_consecutive", "masked_select", "equal", "bincount")}
SYNCS["argwhere"] = "nonzero"
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Ops that, unlike pointwise ones, take not even a 0-dim tensor from the CPU.
STRICT = {"embedding", "index_select", "gather", "scatter", "index_add", "cat", "stack"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL |= {"_local_scalar_dense", "item", "is_nonzero", "_unsafe_view"}
# Composites that build tensors from C++ options, where no label can show: run whole.
WHOLE = {
    F.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    F.rms_norm: aten.rms_norm.default,
    torch.rms_norm: aten.rms_norm.default,
    F.one_hot: aten.one_hot.default,
}


class Labelled(torch.Tensor):
    """CPU data (``inner``) under a device label; C++ takes it for a CPU tensor."""

    inner: torch.Tensor
    label: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.label)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: torch.Tensor, label: torch.device) -> Self:
        # A view of a normal tensor is a normal tensor, in inference mode too.
        mode: Any = contextlib.nullcontext()
        if inner.is_inference() != torch.is_inference_mode_enabled():
            mode = torch.inference_mode(inner.is_inference())
        with mode:
            self = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
            )
        self.inner, self.label = inner, label
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Modes are per thread: this serves the other threads of a simulation.
        if not active:
            raise RuntimeError(f"{func}: a simulated tensor outlived its simulation")
        return active[-1].__torch_dispatch__(func, types, args, kwargs)

    # C++ would answer these for a CPU tensor (or refuse), without a dispatch.
    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "Labelled") -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner, self.label = value.inner, value.label

    def get_device(self) -> int:
        return self.label.index

    def cpu(self, **kwargs: Any) -> torch.Tensor:
        return self.to("cpu", **kwargs)

    def read(self, sync: str) -> torch.Tensor:
        """The data, as the host reads it (uncounted once the simulation is over)."""
        if active:
            active[-1].copied(self.label, CPU, self.inner, sync)
        return self.inner

    def tolist(self) -> Any:
        return self.read("tolist").tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        kwargs = {"dtype": self.dtype, "device": self.label} | kwargs
        return torch.tensor(data, **kwargs)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict) -> "Labelled":  # keeps a Parameter's mark
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        copy.__dict__.update(self.__dict__ | copy.__dict__)
        return memo.setdefault(id(self), copy)

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.read('repr')!r} on {self.label}"


class Simulation(TorchDispatchMode):
    """What the simulated devices did: see :func:`simulated_cuda`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # spares every op a detour through torch.compile's guards

    def __init__(self, count: int, memory: int, capability: tuple[int, int]) -> None:
        super().__init__()
        self.count, self.memory, self.capability = count, memory, capability
        self.current = 0
        self.storages: dict[int, tuple[StorageWeakRef, str, int]] = {}
        self.launches: Counter[str] = Counter()
        self.reset()

    def reset(self) -> None:
        """Forget copies, synchronisations and launches."""
        self.copies: list[tuple[str, str, int]] = []
        self.syncs: list[str] = []
        self.launches.clear()

    def bytes(self) -> dict[str, int]:
        """Bytes of the distinct live storages of each device."""
        live = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.storages = live
        total: Counter[str] = Counter()
        for _, label, size in live.values():
            total[label] += size
        return dict(total)

    def resolve(self, device: Any) -> torch.device:
        """The device meant by ``device``, with an index if it is CUDA."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        device = CPU if device is None else torch.device(device)
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device})")
        return torch.device("cuda", index)

    def index(self, device: Any = None) -> int:
        return self.current if device is None else self.resolve(device).index

    def exchange(self, index: int) -> int:
        """Make ``index`` current unless negative (torch's "no change"); the old one."""
        old = self.current
        if index >= 0:
            self.current = self.resolve(index).index
        return old

    def copied(
        self, source: torch.device, to: torch.device, data: torch.Tensor, sync: str = ""
    ) -> None:
        self.copies.append((str(source), str(to), data.nbytes))
        if sync and to.type == "cpu":
            self.syncs.append(sync)

    def wrap(self, out: Any, label: torch.device, known: dict[int, Labelled]) -> Any:
        if isinstance(out, torch.Tensor):
            if (same := known.get(id(out))) is not None:  # in place, or nothing to do
                if same.shape != out.shape:
                    raise NotImplementedError("resizing a simulated tensor")
                return same
            if label.type != "cuda":
                return out
            # A held weak reference keeps the address from being used again.
            if (key := (storage := out.untyped_storage())._cdata) not in self.storages:
                if len(self.storages) % 1024 == 1023:
                    self.bytes()  # drops the dead ones
                weak = StorageWeakRef(storage)
                self.storages[key] = (weak, str(label), storage.nbytes())
            return Labelled(out, label)
        if isinstance(out, (list, tuple)):
            return type(out)(self.wrap(item, label, known) for item in out)
        return out

    def check(self, func: Any, args: Any, on: list, off: list) -> torch.device:
        """The one device of an op's tensors; refuses a mixture as CUDA would."""
        name, mutable, _ = traits(func)
        label, clash = on[0].label, [t.label for t in on if t.label != on[0].label]
        for tensor in off:
            if name in INDEXING and any(tensor is index for index in args[1]):
                if tensor.dtype in (torch.bool, torch.uint8):
                    tensor = tensor.nonzero()
                self.copied(CPU, label, tensor)
            elif tensor.dim() or tensor.device != CPU or name.rstrip("_") in STRICT:
                clash.append(tensor.device)
            elif mutable and tensor is args[0]:
                clash.append(CPU)
            elif name in INDEXING and not is_fill(args):
                self.copied(CPU, label, tensor)
        if clash:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two "
                f"devices, {label} and {clash[0]}! (in {func})"
            )
        return label

    def waits(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
        """The name under which this op synchronises with the host, if it does."""
        name, _, _ = traits(func)
        if name in INDEXING:
            masked = any(is_mask(index) for index in args[1])
            return name if masked and not (name != "index" and is_fill(args)) else None
        if func.__name__.startswith(
            ("repeat_interleave.Tensor", "repeat_interleave.self_T")
        ):
            return name if kwargs.get("output_size") is None else None
        if name == "one_hot":
            return "item" if [*args[1:], *kwargs.values(), -1][0] == -1 else None
        if name == "_grouped_mm":  # older devices read the offsets and loop
            return name if self.capability < (9, 0) else None
        return SYNCS.get(name) or SYNCS.get(func.__name__)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, mutable, reshapes = traits(func)
        target = self.resolve(kwargs["device"]) if kwargs.get("device") else None
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # would need a driver
        if name in ("_pin_memory", "pin_memory"):
            return args[0].clone()
        if Labelled not in types and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)

        on: list[Labelled] = []
        off: list[torch.Tensor] = []
        raw = [unwrap(a, on, off) for a in args]
        raw_kwargs = {k: unwrap(v, on, off) for k, v in kwargs.items()}
        if target is not None:
            raw_kwargs["device"] = CPU if target.type == "cuda" else target
        known = {id(t.inner): t for t in on}

        if target is not None and name in ("_to_copy", "to"):
            raw_kwargs.pop("copy", None)
            out = aten._to_copy.default(raw[0], **raw_kwargs)
            if args[0].device != target:
                sync = "" if kwargs.get("non_blocking") else "to"
                self.copied(args[0].device, target, out, sync)
                return self.wrap(out, target, {})
        elif name == "copy_" and args[0].device != args[1].device:
            sync = "" if [*args[2:], *kwargs.values(), False][0] else name
            self.copied(args[1].device, args[0].device, raw[0], sync)
            func(*raw, **raw_kwargs)
            return args[0]
        else:
            label = target or self.check(func, args, on, off)
            if wait := self.waits(func, args, kwargs):
                self.syncs.append(wait)
            out = func(*raw, **raw_kwargs)
            if reshapes:  # the wrapper's own sizes have to follow
                with torch._C._DisableTorchDispatch():
                    func(*args, **kwargs)
            target = label
        if target.type == "cuda" and name not in NO_KERNEL and not reshapes:
            # Views alone launch nothing: whatever they return aliases an argument.
            ours = {t.inner.untyped_storage()._cdata for t in on}
            outs = out if isinstance(out, (list, tuple)) else (out,)
            if mutable or any(
                not isinstance(t, torch.Tensor)
                or t.untyped_storage()._cdata not in ours
                for t in outs
            ):
                self.launches[str(target)] += 1
        return self.wrap(out, target, known)


class Devices(TorchFunctionMode):
    """Completes "cuda" to the current device, and keeps :data:`WHOLE` ops whole."""

    def __init__(self, sim: Simulation) -> None:
        super().__init__()
        self.sim = sim

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = self.sim.resolve(kwargs["device"])
        if kwargs.get("generator") is not None:  # its label is lost on the way to C++
            place = kwargs.get("device") or getattr([*args, 0][0], "device", CPU)
            if place.type != (found := kwargs["generator"].device.type):
                raise RuntimeError(
                    f"Expected a '{place.type}' device type for generator but found "
                    f"'{found}' (in {func.__name__})"
                )
        if func in WHOLE and CausalBias not in types:  # that one computes a mask first
            func, values = WHOLE[func], (*args, *kwargs.values())
            if any(isinstance(value, Labelled) for value in values):
                return self.sim.__torch_dispatch__(func, (Labelled,), args, kwargs)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A CPU generator under a device label."""

    def __new__(cls, device: Any = "cpu") -> Self:
        self = super().__new__(cls)
        self.label = active[-1].resolve(device)
        return self

    device = property(lambda self: self.label)


@functools.cache
def traits(func: Any) -> tuple[str, bool, bool]:
    """An op's name, whether it writes to an argument, whether it changes its sizes."""
    reshapes = torch.Tag.inplace_view in func.tags
    return func.overloadpacket.__name__, func._schema.is_mutable, reshapes


def unwrap(value: Any, on: list[Labelled], off: list[torch.Tensor]) -> Any:
    """``value`` with CPU data for labelled tensors; lists those met, and the others."""
    if isinstance(value, Labelled):
        on.append(value)
        return value.inner
    if isinstance(value, torch.Tensor):
        off.append(value)
    elif isinstance(value, (list, tuple)):
        return [unwrap(item, on, off) for item in value]
    return value


def is_mask(index: torch.Tensor | None) -> bool:
    return isinstance(index, Labelled) and index.dtype in (torch.bool, torch.uint8)


def is_fill(args: Any) -> bool:
    """Whether ``x[mask] = number``, which PyTorch turns into ``masked_fill_``."""
    indices = [index for index in args[1] if index is not None]
    value = args[2]
    one = value.numel() == 1 and value.device.type == "cpu"
    return one and len(indices) == 1 and is_mask(indices[0]) and args[3:] != (True,)


def to(
    self: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any
) -> torch.Tensor:
    """``Tensor.to``, which otherwise compares devices where no label can show."""
    other = kwargs.pop("other", args[0] if args else None)
    if isinstance(other, torch.Tensor):
        args = (other.device, other.dtype, *args[1:])
    elif type(other) is int:  # the parser would ask the driver
        args = (active[-1].resolve(other), *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    target = self.device if device is None else active[-1].resolve(device)
    layout = layout or torch.preserve_format
    if target == self.device or "cuda" not in (target.type, self.device.type):
        place = {} if isinstance(self, Labelled) else {"device": target}
        more = {"dtype": dtype or self.dtype, "copy": copy, "memory_format": layout}
        return real_to(self, non_blocking=non_blocking, **more, **place)
    more = {"non_blocking": non_blocking, "memory_format": layout}
    more |= {"dtype": dtype, "device": target}
    with torch._C.DisableTorchFunction():
        return active[-1].__torch_dispatch__(aten._to_copy.default, (), (self,), more)


@contextlib.contextmanager
def simulated_cuda(
    count: int, memory: int = 80 << 30, capability: tuple[int, int] = (8, 0)
) -> Iterator[Simulation]:
    """Within the block, ``count`` CUDA devices exist; it yields their records.

    ``copies`` lists (source, destination, bytes) and ``syncs`` names the ops that made
    the host wait, in order; ``launches`` counts kernels per device; ``bytes()`` is the
    memory in use. Blocking copies to the device are copies only, not syncs. In inference
    mode a composite op is one launch, otherwise one for each of its parts. Gradients do
    not flow through copies or through :data:`WHOLE`. Other threads may use the tensors
    and ``.to``, but not create tensors with ``device=``.
    """
    sim = Simulation(count, memory, capability)
    index = sim.index

    def name(device: Any = None) -> str:
        return f"Simulated GPU {index(device)}"

    def properties(device: Any = None) -> SimpleNamespace:
        found = SimpleNamespace(name=name(device), total_memory=memory)
        found.major, found.minor = capability
        found.multi_processor_count = 108
        return found

    def event(**kwargs: bool) -> SimpleNamespace:
        wait = functools.partial(sim.syncs.append, "Event.synchronize")
        return SimpleNamespace(record=lambda stream=None: None, synchronize=wait)

    def used(device: Any = None) -> int:
        return sim.bytes().get(f"cuda:{index(device)}", 0)

    cuda = {
        "_lazy_init": lambda: None,  # called by C++ whenever a device argument is CUDA
        "_exchange_device": sim.exchange,
        "_maybe_exchange_device": sim.exchange,
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "current_device": lambda: sim.current,
        "set_device": lambda device: sim.exchange(index(device)) and None,
        "get_device_name": name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),
        "mem_get_info": lambda device=None: (memory - used(device), memory),
        "memory_allocated": used,
        "Event": event,
        "synchronize": lambda device=None: sim.syncs.append("synchronize"),
        **dict.fromkeys(("empty_cache", "seed_all"), lambda: None),
        **dict.fromkeys(("manual_seed", "manual_seed_all"), lambda seed: None),
    }
    tensor = {
        "to": to,
        "type_as": lambda self, other: self.to(other),
        "cuda": lambda self, device=None, non_blocking=False, **kwargs: self.to(
            "cuda" if device is None else device, non_blocking=non_blocking, **kwargs
        ),
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
        # Module.to must replace Parameters: a plain one cannot turn into a labelled.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        set_overwrite = torch.__future__.set_overwrite_module_params_on_conversion
        stack.callback(set_overwrite, before)
        set_overwrite(True)
        # torch.tensor(..., device=) then makes its copy where modes can see it.
        set_lift = torch._C._set_only_lift_cpu_tensors
        stack.callback(set_lift, torch._C._only_lift_cpu_tensors())
        set_lift(True)
        active.append(sim)
        stack.callback(active.pop)
        stack.enter_context(sim)
        stack.enter_context(Devices(sim))
        yield sim
