"""Which devices there are, what a model needs on each, and which options would make it fit."""

import functools
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from .model import ModelArgs, Transformer, deal

# Bytes that a device needs besides weights and cache: a generous guess. A test checks that the
# largest case, 16 rows with log-probabilities and echo, stays within it.
ACTIVATIONS = 2**30

# Nobody is advised to make the cache shorter than this many tokens.
SHORTEST = 128


def find_devices(num_gpus: int) -> list[str]:
    """The devices to deal the experts out to: the first GPUs, or the CPU if num_gpus is 0.

    Raises ValueError if there are not that many.
    """
    if type(num_gpus) is not int or num_gpus < 0:
        raise ValueError(
            f"num_gpus must be a whole number of GPUs, or 0 for the CPU, not {num_gpus!r:.40}"
        )
    visible = torch.cuda.device_count()
    if num_gpus > visible:
        raise ValueError(
            f"num_gpus is {num_gpus}, but {visible} GPUs are visible: use fewer, or 0 for the CPU"
        )
    if num_gpus == 0:
        return ["cpu"]
    return [f"cuda:{i}" for i in range(num_gpus)]


def check_memory(
    args: ModelArgs,
    devices: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    cpu_layers: int = 0,
    int8: bool = False,
) -> None:
    """Raise RuntimeError if the model does not fit, with the options that would make it fit.

    Raises ValueError if the experts cannot be dealt out to these devices, if cpu_layers exceeds the
    number of layers, or if it is given without GPUs.
    """
    on_gpus = devices[0] != "cpu"
    if len(devices) > args.num_experts:
        raise ValueError(
            f"{len(devices)} devices are too many: the model has {args.num_experts} experts, "
            "and each device must hold at least one"
        )
    if type(cpu_layers) is not int or not 0 <= cpu_layers <= args.n_layers:
        raise ValueError(f"cpu_layers must be 0 to {args.n_layers}, not {cpu_layers!r}")
    if cpu_layers > 0 and not on_gpus:
        raise ValueError("cpu_layers needs GPUs: without any, all layers are in host memory")

    plan = Plan(args, tuple(devices), dtype, cpu_layers, int8)
    if on_gpus:
        release_unused(devices)
    free = {device: free_memory(device) for device in [*devices, "cpu"]}
    if fits(plan, free):
        return
    visible = visible_devices(plan)
    free |= {device: free_memory(device) for device in visible if device not in free}
    others = plans_to_advise(plan, visible, free)
    if others:
        options = ", or with ".join(describe_changes(plan, other) for other in others)
        advice = f"but would with {options}"
    else:
        advice = describe_least(plan, visible, free)
    model = "the model in float32" if dtype == torch.float32 else "the model"
    raise RuntimeError(f"{model} does not fit, {advice} ({describe_shortages(plan, free)})")


def memory_needed(
    args: ModelArgs,
    n_devices: int,
    dtype: torch.dtype = torch.bfloat16,
    cpu_layers: int = 0,
    int8: bool = False,
) -> list[int]:
    """Bytes on each device and, as the last element, those of the experts in host memory.

    The first device has the most: as many experts as any other, and everything else.
    """
    sizes = count_bytes(replace(args, max_batch_size=1, max_seq_len=1), dtype, int8)
    cached = args.max_batch_size * args.max_seq_len * sizes.cached_token
    not_experts = sizes.shared + cached + args.max_seq_len * sizes.rotary_factors
    layers_on_devices = args.n_layers - cpu_layers
    needed = [n * sizes.expert * layers_on_devices for n in deal(args.num_experts, n_devices)]
    needed[0] += not_experts
    return [*needed, args.num_experts * sizes.expert * cpu_layers]


def free_memory(device: str) -> int:
    """Bytes that are free on a GPU, or in host memory if device is "cpu"."""
    if device == "cpu":
        return free_host_memory()
    return torch.cuda.mem_get_info(device)[0]


# Ways to make a model fit


class Plan(NamedTuple):
    """A model and the options that decide what it needs, and where."""

    args: ModelArgs
    devices: tuple[str, ...]
    dtype: torch.dtype
    cpu_layers: int
    int8: bool


def needs(plan: Plan) -> dict[str, int]:
    """Bytes that a plan needs on each device, by its name; host memory is "cpu"."""
    *on_devices, on_host = memory_needed(
        plan.args, len(plan.devices), plan.dtype, plan.cpu_layers, plan.int8
    )
    needed = dict.fromkeys(plan.devices, ACTIVATIONS)
    for device, size in zip(plan.devices, on_devices):
        needed[device] += size  # a device may be named more than once
    needed["cpu"] = needed.get("cpu", 0) + on_host
    return needed


def fits(plan: Plan, free: dict[str, int]) -> bool:
    return all(size <= free[device] for device, size in needs(plan).items())


def visible_devices(plan: Plan) -> list[str]:
    """The plan's devices and, if these are GPUs, others that experts could be dealt out to."""
    visible = list(plan.devices)
    if plan.devices[0] != "cpu":
        for i in range(torch.cuda.device_count()):
            if f"cuda:{i}" not in visible:
                visible.append(f"cuda:{i}")
    return visible[: plan.args.num_experts]


def plans_to_advise(plan: Plan, visible: list[str], free: dict[str, int]) -> list[Plan]:
    """Of the plans that fit, those that change the fewest fields of the plan, as little as can be.

    Where several plans change the same fields, the first is kept: candidates come mildest first.
    They have the cache that was asked for, or else the largest that fits.
    """
    others = list(plans_that_fit(plan, visible, free))
    for other in plans_that_fit(with_smallest_cache(plan), visible, free):
        others.append(with_largest_cache(other, plan.args, free))
    mildest: dict[frozenset[str], Plan] = {}
    for other in others:
        changed = changed_fields(plan, other)
        if changed not in mildest:  # plans_that_fit yields the mildest first
            mildest[changed] = other
    fewest = min((len(changed) for changed in mildest), default=0)
    return [other for changed, other in mildest.items() if len(changed) == fewest]


def changed_fields(plan: Plan, other: Plan) -> frozenset[str]:
    return frozenset(name for name in Plan._fields if getattr(plan, name) != getattr(other, name))


def plans_that_fit(plan: Plan, visible: list[str], free: dict[str, int]) -> Iterator[Plan]:
    """Those variants of the plan that fit, with experts in 8 bits, more GPUs or other cpu_layers.

    Among those that change the same options, the one that changes them least comes first.
    """
    int8_or_not = [True] if plan.int8 else [False, True]
    for int8 in int8_or_not:
        for n_devices in range(len(plan.devices), len(visible) + 1):
            other = plan._replace(int8=int8, devices=tuple(visible[:n_devices]))
            other = with_nearest_cpu_layers(other, free)
            if fits(other, free):
                yield other


def with_nearest_cpu_layers(plan: Plan, free: dict[str, int]) -> Plan:
    """The plan with the cpu_layers nearest to its own that fits, on the GPUs and on the host.

    If there is none, the plan returned does not fit either.
    """
    if plan.devices[0] == "cpu":
        return plan

    def gpus_suffice(gpu_layers: int) -> bool:
        needed = needs(plan._replace(cpu_layers=plan.args.n_layers - gpu_layers))
        return all(needed[device] <= free[device] for device in plan.devices)

    def host_suffices(cpu_layers: int) -> bool:
        return needs(plan._replace(cpu_layers=cpu_layers))["cpu"] <= free["cpu"]

    # Trying every number would take too long: the refusal should come at once.
    fewest = plan.args.n_layers - largest(plan.args.n_layers, gpus_suffice)
    most = largest(plan.args.n_layers, host_suffices)
    return plan._replace(cpu_layers=min(max(plan.cpu_layers, fewest), most))


def with_smallest_cache(plan: Plan) -> Plan:
    length = min(SHORTEST, plan.args.max_seq_len)
    return plan._replace(args=replace(plan.args, max_batch_size=1, max_seq_len=length))


def with_largest_cache(plan: Plan, asked: ModelArgs, free: dict[str, int]) -> Plan:
    """The plan with as many full-length rows as fit or, if none does, one row as long as fits."""

    def with_cache(rows: int, length: int) -> Plan:
        return plan._replace(args=replace(asked, max_batch_size=rows, max_seq_len=length))

    rows = largest(asked.max_batch_size, lambda n: fits(with_cache(n, asked.max_seq_len), free))
    if rows > 0:
        return with_cache(rows, asked.max_seq_len)
    return with_cache(1, largest(asked.max_seq_len, lambda n: fits(with_cache(1, n), free)))


def largest(limit: int, suffices: Callable[[int], bool]) -> int:
    """The largest number up to limit that suffices, as all smaller ones do; 0 if none does."""
    enough = 0
    too_many = limit + 1
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        if suffices(middle):
            enough = middle
        else:
            too_many = middle
    return enough


def describe_changes(plan: Plan, other: Plan) -> str:
    options = []
    if other.int8 != plan.int8:
        options.append("int8")
    if other.devices != plan.devices:
        options.append(f"num_gpus {len(other.devices)}")
    if other.cpu_layers != plan.cpu_layers:
        options.append(f"cpu_layers {other.cpu_layers}")
    for name in ("max_batch_size", "max_seq_len"):
        if getattr(other.args, name) != getattr(plan.args, name):
            options.append(f"{name} {getattr(other.args, name)}")
    return " and ".join(options)


def describe_least(plan: Plan, visible: list[str], free: dict[str, int]) -> str:
    """What the model needs at least, with which options, and what there is."""
    first = plan.devices[0]
    least = with_smallest_cache(plan)._replace(int8=True, devices=(first,))
    least_total = gigabytes(sum(needs(least).values()))
    changes = describe_changes(plan, least._replace(devices=plan.devices))
    with_changes = f" with {changes}" if changes else ""
    if first == "cpu":
        return f"and needs at least {least_total}{with_changes}"

    least_on_gpu = gigabytes(needs(least._replace(cpu_layers=plan.args.n_layers))[first])
    free_on_gpus = gigabytes(sum(free[device] for device in set(visible)))
    text = (
        f"and needs at least {least_total}{with_changes}, {least_on_gpu} of it on a GPU; "
        f"{free_on_gpus} are free on GPUs and {gigabytes(free['cpu'])} in host memory"
    )
    enough = gpus_that_would_do(least, free[first])
    if enough is None:
        return text
    gpus = "1 GPU" if enough == 1 else f"{enough} GPUs"
    return f"{text}: {gpus} like {first} would hold it"


def gpus_that_would_do(plan: Plan, free_on_each: int) -> int | None:
    """How many GPUs would hold a plan without host memory, or None if no number would."""
    for n_devices in range(1, plan.args.num_experts + 1):
        on_first = memory_needed(plan.args, n_devices, plan.dtype, int8=plan.int8)[0]
        if on_first + ACTIVATIONS <= free_on_each:
            return n_devices
    return None


def describe_shortages(plan: Plan, free: dict[str, int]) -> str:
    shortages = []
    for device, size in needs(plan).items():
        if size > free[device]:
            place = "host memory" if device == "cpu" else device
            shortages.append(f"{place}: {gigabytes(size)} needed, {gigabytes(free[device])} free")
    return "; ".join(shortages)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


# Bytes of a model


class Sizes(NamedTuple):
    """Bytes of the parts of a model."""

    expert: int  # one expert in one layer
    shared: int  # all weights outside the experts
    cached_token: int  # keys and values of one token in all layers
    rotary_factors: int  # of one position


@functools.cache
def count_bytes(args: ModelArgs, dtype: torch.dtype, int8: bool) -> Sizes:
    """Count the bytes of each part of a model, given args with a cache of one token.

    The tensors counted are those of a one-layer model on the device "meta", where tensors have no
    memory.
    """
    model = Transformer(replace(args, n_layers=1), ["meta"], dtype, int8=int8)
    experts = 0
    shared = 0
    cached_token = 0
    rotary_factors = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".experts." in name:
            experts += tensor.nbytes
        elif "cache" in name:
            cached_token += args.n_layers * tensor.nbytes
        elif name == "freqs_cis":
            rotary_factors += tensor.nbytes
        elif name.startswith("layers."):
            shared += args.n_layers * tensor.nbytes
        else:
            shared += tensor.nbytes
    return Sizes(experts // args.num_experts, shared, cached_token, rotary_factors)


# Free memory


def release_unused(devices: Sequence[str]) -> None:
    """Free what a deleted model still holds on GPUs.

    Objects in reference cycles stay until Python's garbage collector runs, and PyTorch keeps the
    memory of freed tensors for itself. A process that has used no GPU is spared the collection,
    which takes up to 0.2 s.
    """
    if any(torch.cuda.memory_reserved(device) for device in devices):
        gc.collect()
        torch.cuda.empty_cache()


class GroupFiles(NamedTuple):
    """The files in a control group's folder, and the prefix of the keys in its memory.stat."""

    limit: str
    used: str
    prefix: str


VERSION_1 = GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
VERSION_2 = GroupFiles("memory.max", "memory.current", "")


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes free in host memory, or in that part of it that a container may use.

    Where nothing says how much is free, as on systems other than Linux, it is taken to suffice.
    """
    limits = []
    try:
        available = re.search(r"MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text())
    except OSError:
        available = None
    if available:
        limits.append(int(available[1]) * 1024)
    for folder, files in control_groups(root):
        left = left_by_control_group(folder, files)
        if left is not None:
            limits.append(left)
    if not limits:
        return 2**63  # more than any machine has
    return max(0, min(limits))


def control_groups(root: Path) -> Iterator[tuple[Path, GroupFiles]]:
    """The folders of this process's control groups and of all groups above them.

    Each comes with the names of its files, which depend on the version of control groups. Inside a
    container the topmost folder is that of the container's own group, though the path that the
    kernel reports may be the one outside.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2, which has this folder to itself or a part of it
            hierarchies = [top, top / "unified"]
            files = VERSION_2
        elif "memory" in controllers.split(","):
            hierarchies = [top / "memory"]
            files = VERSION_1
        else:
            continue
        for hierarchy in hierarchies:
            folder = hierarchy / path.lstrip("/")
            while folder != hierarchy:
                yield folder, files
                folder = folder.parent
            yield hierarchy, files


def left_by_control_group(folder: Path, files: GroupFiles) -> int | None:
    """The bytes that a control group may still use, or None if it has no limit."""
    try:
        limit = int((folder / files.limit).read_text())  # ValueError for "max", no limit
        used = int((folder / files.used).read_text())
        statistics = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    # The kernel drops cached files when asked for memory: those read once are inactive, those
    # read more often, such as a checkpoint's that was loaded before, are active.
    key = rf"^{files.prefix}(?:in)?active_file (\d+)$"
    cached = re.findall(key, statistics, re.MULTILINE)
    return limit - used + sum(int(size) for size in cached)
