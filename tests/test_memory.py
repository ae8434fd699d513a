"""Which devices there are, what a model needs of them, and what is advised if it does not fit."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ARGS
from simulated.cuda import simulated_cuda

from mixtral import ModelArgs, Transformer, devices
from mixtral.devices import (
    ACTIVATIONS,
    check_memory,
    find_devices,
    free_host_memory,
    free_memory,
    memory_needed,
)
from mixtral.model import deal

GB = 10**9
V03 = ModelArgs(dim=6144, n_layers=56, n_heads=48, hidden_dim=16384, vocab_size=32768)


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus, host): a machine with so many GB free on each GPU and in host memory."""

    def set_up(gpus: list[float], host: float) -> None:
        free = {f"cuda:{i}": int(size * GB) for i, size in enumerate(gpus)}
        free["cpu"] = int(host * GB)
        monkeypatch.setattr(devices, "free_memory", free.__getitem__)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)

    return set_up


def refusal(num_gpus: int, args: ModelArgs = ModelArgs(), **options) -> str:  # noqa: B008
    with pytest.raises(RuntimeError, match="^the model does not fit, ") as caught:
        check_memory(args, find_devices(num_gpus), **options)
    message = str(caught.value)
    assert "\n" not in message and "--" not in message and len(message) < 1000
    return message


# Devices


@pytest.mark.parametrize("visible", [0, 3, 8])
def test_any_number_of_visible_gpus(visible):
    with simulated_cuda(visible):
        assert find_devices(0) == ["cpu"]
        for n in range(1, visible + 1):
            assert find_devices(n) == [f"cuda:{i}" for i in range(n)]
        with pytest.raises(ValueError, match=f"{visible} GPUs are visible: use fewer, or 0"):
            find_devices(visible + 1)


@pytest.mark.parametrize("number", [-1, True, 1.0, "1", None])
def test_numbers_of_gpus_that_are_none(number):
    with simulated_cuda(2), pytest.raises(ValueError, match="num_gpus must be a whole number"):
        find_devices(number)


def test_experts_are_dealt_out_evenly():
    assert deal(8, 3) == [3, 3, 2] and deal(8, 5) == [2, 2, 2, 1, 1] and deal(3, 3) == [1, 1, 1]
    for n_experts in range(1, 20):
        for n_places in range(1, n_experts + 1):
            dealt = deal(n_experts, n_places)
            assert sum(dealt) == n_experts and len(dealt) == n_places
            assert dealt == sorted(dealt, reverse=True) and dealt[0] - dealt[-1] <= 1


def test_more_devices_than_experts(machine):
    machine([80.0] * 8, 100)
    args = replace(ModelArgs(), num_experts=3)
    check_memory(args, find_devices(3))
    with pytest.raises(ValueError, match="4 devices are too many: the model has 3 experts"):
        check_memory(args, find_devices(4))


@pytest.mark.parametrize("layers", [33, -1, 1.5, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_layers_that_cannot_stay_in_host_memory(machine, device, layers):
    machine([80.0], 100)
    with pytest.raises(ValueError, match=f"cpu_layers must be 0 to 32, not {layers}"):
        check_memory(ModelArgs(), [device], cpu_layers=layers)


def test_layers_in_host_memory_need_gpus(machine):
    machine([80.0], 100)
    with pytest.raises(ValueError, match="cpu_layers needs GPUs"):
        check_memory(ModelArgs(), ["cpu"], cpu_layers=1)


# What a model needs


def test_memory_needed_counts_every_tensor():
    """8x7B's parameters, a cache for 4 rows of 4096 tokens, and complex64 factors."""
    args = ModelArgs(max_seq_len=4096, max_batch_size=4)
    cache = 2 * 32 * 4 * 4096 * 8 * 128
    total = 2 * (46_702_792_704 + cache) + 8 * 4096 * 64
    assert memory_needed(args, 1) == [total, 0]
    experts = 32 * 8 * 3 * 4096 * 14336
    int8 = total - experts + 2 * 32 * 8 * (2 * 14336 + 4096)  # and a scale for each row
    for n in (1, 2, 4, 8):
        share = experts // n
        first = total - 2 * experts + 2 * share
        assert memory_needed(args, n) == [first] + [2 * share] * (n - 1) + [0]
        on_host = share * 26 // 32 * 2
        left = [first - on_host] + [2 * share - on_host] * (n - 1)
        assert memory_needed(args, n, cpu_layers=26) == [*left, n * on_host]
        assert sum(memory_needed(args, n, cpu_layers=26, int8=True)) == int8
    in_float32 = memory_needed(args, 1, torch.float32)
    assert in_float32 == [2 * total - 8 * 4096 * 64, 0]
    # Three devices have 3, 3 and 2 of the 8 experts.
    assert memory_needed(args, 3)[1:] == [2 * experts * 3 // 8, 2 * experts * 2 // 8, 0]
    assert sum(memory_needed(args, 3)) == total


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_needed_is_what_a_model_has(dtype, int8):
    model = Transformer(ARGS, dtype=dtype, int8=int8)
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.nbytes for tensor in tensors)
    assert memory_needed(ARGS, 1, dtype, int8=int8) == [total, 0]
    assert sum(memory_needed(ARGS, 3, dtype, 1, int8)) == total


# What is advised


def test_a_model_that_fits(machine):
    machine([40.0] * 4, 40)
    check_memory(ModelArgs(), find_devices(4))
    machine([], (memory_needed(ModelArgs(), 1)[0] + ACTIVATIONS) / GB)
    check_memory(ModelArgs(), ["cpu"])
    machine([], (memory_needed(ModelArgs(), 1)[0] + ACTIVATIONS - 1) / GB)
    refusal(0)


def test_each_option_that_suffices_alone_is_named(machine):
    machine([40.0] * 4, 40)
    message = refusal(2)
    first = memory_needed(ModelArgs(), 2)[0] + ACTIVATIONS
    assert f"(cuda:0: {first / GB:.1f} GB needed, 40.0 GB free; cuda:1: " in message
    advice = message.split(" (")[0].removeprefix("the model does not fit, but would with ")
    assert set(advice.split(", or with ")) == {"int8", "num_gpus 4", "cpu_layers 9"}


CASES = [  # GB free on each GPU and on the host, GPUs asked for, and the advice
    ([16], 40, 1, "int8 and cpu_layers 26"),
    ([], 60, 0, "int8"),
    ([], 50, 0, "int8 and max_batch_size 1"),  # 49.4 GB with the smallest cache
    ([], 95.2, 0, "int8, or with max_batch_size 1"),
    ([24] * 3, 8, 1, "int8 and num_gpus 3"),
    # What is free on the third is known: it does not help.
    ([24, 24, 2], 8, 2, "int8 and cpu_layers 5 and max_batch_size 1"),
    ([8] * 8, 40, 8, "int8 and cpu_layers 24"),
    ([8] * 8, 90, 8, "cpu_layers 28"),
]


@pytest.mark.parametrize("gpus, host, num_gpus, advice", CASES)
def test_options_that_suffice_together(machine, gpus, host, num_gpus, advice):
    machine(gpus, host)
    assert f"but would with {advice} (" in refusal(num_gpus)


def test_fewer_layers_in_host_memory_are_advised(machine):
    """As many as it holds, if the GPUs have room for the others."""
    machine([80, 80], 10)
    assert "but would with cpu_layers 3 (host memory: " in refusal(2, cpu_layers=32)
    check_memory(ModelArgs(), find_devices(2), cpu_layers=3)
    with pytest.raises(RuntimeError, match="but would with cpu_layers 3, or with int8 "):
        check_memory(ModelArgs(), find_devices(2), cpu_layers=4)
    machine([30, 30], 10)
    message = refusal(2, cpu_layers=32)
    assert "but would with int8 and cpu_layers 7 (" in message
    check_memory(ModelArgs(), find_devices(2), cpu_layers=7, int8=True)


def test_float32_is_named(machine):
    """bfloat16 may fit without other options."""
    machine([], 128)
    check_memory(ModelArgs(), ["cpu"])
    with pytest.raises(RuntimeError, match="^the model in float32 does not fit, but would with"):
        check_memory(ModelArgs(), ["cpu"], torch.float32)


def options_of(way: str) -> dict[str, int]:
    words = way.replace("int8", "int8 1").split(" and ")
    return {name: int(value) for name, value in (word.split() for word in words)}


@pytest.mark.parametrize("asked", [0, 32])
@pytest.mark.parametrize("args", [ModelArgs(), V03, replace(ModelArgs(), num_experts=3)])
@pytest.mark.parametrize("host", [8, 48, 100, 200])
@pytest.mark.parametrize("gpus", [[], [12], [24, 24], [24, 24, 10], [48] * 3, [80], [40] * 8])
def test_what_is_advised_holds(machine, args, host, gpus, asked):
    """Every way that is named fits, and one of its numbers less far from those asked would not."""
    if asked and not gpus:
        pytest.skip("cpu_layers needs GPUs")
    args = replace(args, max_seq_len=32768, max_batch_size=8)
    machine(gpus, host)
    for num_gpus in range(min(len(gpus), 1), min(len(gpus), args.num_experts) + 1):
        check = functools.partial(check_with, args, num_gpus=num_gpus, cpu_layers=asked)
        if check():
            continue
        message = refusal(num_gpus, args, cpu_layers=asked)
        if "but would with " not in message:
            assert re.search(r"and needs at least \d+\.\d GB with int8 and max_batch", message)
            continue
        advice = message.split(" (")[0].split("but would with ")[1]
        for way in advice.split(", or with "):
            options = options_of(way)
            assert check(**options)
            for name, value in options.items():
                is_less = name in ("max_seq_len", "max_batch_size")
                is_less = is_less or (name == "cpu_layers" and value < asked)
                step = 1 if is_less else -1
                if name == "int8":
                    less = {key: number for key, number in options.items() if key != name}
                elif name == "max_batch_size" and "max_seq_len" in options:
                    continue  # one row, and as much of it as fits
                else:
                    less = options | {name: value + step}
                assert not check(**less), (way, name)


def check_with(
    args: ModelArgs, num_gpus: int, int8: int = 0, cpu_layers: int = 0, **cache: int
) -> bool:
    args = replace(args, **cache)
    try:
        check_memory(args, find_devices(num_gpus), cpu_layers=cpu_layers, int8=bool(int8))
    except RuntimeError:
        return False
    return True


def test_the_least_that_a_model_needs(machine):
    small = replace(ModelArgs(), max_batch_size=1, max_seq_len=128)
    least = memory_needed(small, 1, int8=True)[0] + ACTIVATIONS
    machine([], 16)
    needs = f"and needs at least {least / GB:.1f} GB with int8 and max_batch_size 1 and max_seq_len"
    assert f"{needs} 128 (host memory: 96.6 GB needed, 16.0 GB free)" in refusal(0)
    assert f"and needs at least {least / GB:.1f} GB (host memory: " in refusal(0, small, int8=True)
    machine([24, 4], 16)
    dense = memory_needed(small, 1, cpu_layers=32, int8=True)[0] + ACTIVATIONS
    message = refusal(1)
    assert f"{needs} 128, {dense / GB:.1f} GB of it on a GPU" in message
    assert "on a GPU; 28.0 GB are free on GPUs and 16.0 GB in host memory" in message
    assert ": 3 GPUs like cuda:0 would hold it (" in message and "num_gpus" not in message
    machine([24, 2, 2], 16)
    assert ": 3 GPUs like cuda:0 would hold it (" in refusal(3)  # there are 3, but not like it
    machine([2], 16)
    assert "would hold it" not in refusal(1)  # no number of such GPUs would


# What is free


def test_a_deleted_model_makes_room(monkeypatch):
    """Even if it is part of a circle, and if PyTorch keeps its memory for later."""
    emptied = []
    need = memory_needed(ARGS, 1)[0]
    with simulated_cuda(1, memory=need + ACTIVATIONS) as sim:
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(sim.bytes("cuda:0")))
        check_memory(ARGS, ["cuda:0"])
        assert emptied == []  # nothing was in use
        model = Transformer(ARGS, ["cuda:0"])
        model.decoder = [model]
        with pytest.raises(RuntimeError, match="does not fit"):
            check_memory(ARGS, ["cuda:0"])
        del model
        check_memory(ARGS, ["cuda:0"])
        assert emptied[-1] == 0


def test_free_memory_of_this_machine():
    available = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < free_memory("cpu") <= available
    with simulated_cuda(2, memory=7 * GB):
        assert free_memory("cuda:1") == 7 * GB


MIB = 2**20


def made_up(root: Path, files: dict[str, object]) -> Path:
    """A root folder with these files: MemAvailable is 1000 MiB."""
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1024000 kB\n"} | files
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def statistics(prefix: str, cached: int) -> str:
    """Cached files, of which a third was read more than once."""
    active = cached // 3
    return f"anon 5\n{prefix}active_file {active}\n{prefix}inactive_file {cached - active}\nfile 9"


def v2(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": statistics("", cached),
    }


def v1(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"active_file 7\n{statistics('total_', cached)}",
    }


TOP = "sys/fs/cgroup"
NO_LIMIT = 9223372036854771712  # as version 1 has it
CONTAINERS = [
    ("", {}, 1000),
    ("0::/", {}, 1000),
    ("0::/", v2(TOP, 600 * MIB, 200 * MIB), 400),
    ("0::/", v2(TOP, 600 * MIB, 200 * MIB, 150 * MIB), 550),
    ("0::/", v2(TOP, "max", 200 * MIB), 1000),
    ("0::/", v2(TOP, 6000 * MIB, 200 * MIB), 1000),
    ("0::/", v2(TOP, 600 * MIB, 700 * MIB), 0),
    ("0::/a/b", v2(f"{TOP}/a/b", "max", 0) | v2(f"{TOP}/a", 300 * MIB, 100 * MIB), 200),
    ("0::/a/b", v2(f"{TOP}/a/b", 50 * MIB, 0) | v2(f"{TOP}/a", 300 * MIB, 100 * MIB), 50),
    ("0::/a", v2(f"{TOP}/other", 300 * MIB, 0), 1000),
    # In a container the kernel may name the path outside of it.
    ("0::/outer/container", v2(TOP, 300 * MIB, 0), 300),
    ("0::/../../other", v2(TOP, 300 * MIB, 0), 300),
    ("4:memory:/\n0::/", v1(f"{TOP}/memory", 300 * MIB, 100 * MIB, 60 * MIB), 260),
    ("4:cpu,memory:/a/b", v1(f"{TOP}/memory/a", 300 * MIB, 100 * MIB), 200),
    ("4:memory:/docker/1", v1(f"{TOP}/memory", 300 * MIB, 100 * MIB), 200),
    ("4:memory:/", v1(f"{TOP}/memory", NO_LIMIT, 100 * MIB), 1000),
    ("4:cpu:/a", v1(f"{TOP}/memory/a", 300 * MIB, 100 * MIB), 1000),
    ("2:name=systemd:/a:b\n0::/a:b", v2(f"{TOP}/unified/a:b", 300 * MIB, 0), 300),
    ("0::/", {f"{TOP}/memory.max": "", f"{TOP}/memory.current": 3}, 1000),
    ("0::/", {f"{TOP}/memory.max": 3}, 1000),
]


@pytest.mark.parametrize("groups, files, want", CONTAINERS)
def test_limits_of_containers(tmp_path, groups, files, want):
    root = made_up(tmp_path, {"proc/self/cgroup": groups, **files})
    assert free_host_memory(root) == want * MIB


def test_a_system_that_tells_nothing(tmp_path):
    assert free_host_memory(tmp_path) == 2**63
    made_up(tmp_path, {"proc/meminfo": "MemTotal: 9 kB"})
    assert free_host_memory(tmp_path) == 2**63
