"""The machine: what it is, and the bytes and operations per second that it reaches."""

import contextlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from measuring import Work, figures, seconds_of

# GB/s of a GPU's memory according to its data sheet.
DATA_SHEETS = {
    "NVIDIA H200": 4800,
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA A100-SXM4-80GB": 2040,
    "NVIDIA A100-SXM4-40GB": 1560,
}
# A round is left out if a ceiling moved by more than this factor.
STEADY = 1.5
# The processor's features that PyTorch's and oneDNN's products choose between, as Linux calls
# them, with the names that people use.
FEATURES = {
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
# With these variables a user can keep PyTorch and oneDNN from using a feature.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def describe(devices: Sequence[str]) -> str:
    """The machine, what runs on it, and how busy it is already."""
    parts = []
    if list(devices) != ["cpu"]:
        parts.append(f"{len(devices)} x {torch.cuda.get_device_name(0)}")
    name = cpuinfo("model name") or "processor of unknown name"
    parts.append(f"{name} ({platform.machine()}), {torch.get_num_threads()} threads")
    parts.append(processor_features())
    for package in ("torch", "triton", "transformers", "llama_cpp_python"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    parts.append(f"load {os.getloadavg()[0]:.1f}")
    return ", ".join(parts)


def processor_features() -> str:
    """Which features the processor has, which level PyTorch uses, and what a user forbids.

    oneDNN uses all that the processor has, but for what a variable forbids.
    """
    flags = cpuinfo("flags").split()
    found = [name for flag, name in FEATURES.items() if flag in flags]
    text = f"{' + '.join(found) or 'no known features'}"
    text += f" (PyTorch's own kernels use {torch.backends.cpu.get_cpu_capability()}"
    for variable in LIMITS:
        if variable in os.environ:
            text += f", {variable}={os.environ[variable]}"
    return text + ")"


def cpuinfo(key: str) -> str:
    """The first processor's line of this name in /proc/cpuinfo, or nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


class Ceilings:
    """A device's bytes and bf16 operations per second, measured before and after every round."""

    def __init__(self, device: str):
        self.device = device
        self.n = 2048 if device == "cpu" else 8192
        self.a, self.b = torch.randn(2, self.n, self.n, device=device).bfloat16()
        # 1 GiB, which no cache holds; read as float32, too, it is all finite numbers.
        buffer = torch.rand(2**20, device=device).bfloat16().repeat(2**9)
        floats = buffer.view(torch.float32)
        self.size = buffer.nbytes
        self.sheet: float | None = None  # bytes per second
        self.methods: dict[str, Work] = {
            "int64 sum": buffer.view(torch.int64).sum,
            "float32 sum": floats.sum,
            "float32 max": floats.amax,
        }
        if device == "cpu":
            self.methods["float32 dot"] = lambda: floats.dot(floats)
        else:
            target = torch.empty_like(buffer)
            self.methods["copy"] = lambda: target.copy_(buffer)
            self.sheet = data_sheet(torch.cuda.get_device_name(device))
        self.rates: dict[str, list[float]] = {name: [] for name in self.methods}
        self.bytes: list[float] = []  # per second, by the best of the methods
        self.ops: list[float] = []  # per second

    def measure(self) -> None:
        for name, work in self.methods.items():
            moved = self.size * (2 if name == "copy" else 1)
            self.rates[name].append(moved / self.seconds(work))
        self.bytes.append(max(rates[-1] for rates in self.rates.values()))
        # A product takes a fifth of the time of a read, so more of them can be tried.
        seconds = self.seconds(lambda: self.a @ self.b, tries=10)
        self.ops.append(2 * self.n**3 / seconds)

    def seconds(self, work: Work, tries: int = 3) -> float:
        """The best of some tries; on a GPU the mean of 50 repeats between two events."""
        if self.device == "cpu":
            return min(seconds_of(work) for _ in range(tries))
        work()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(50):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / 50

    def was_steady(self) -> bool:
        """Whether the last two measurements differ by at most half."""
        return is_steady(self.bytes[-2:]) and is_steady(self.ops[-2:])

    def __str__(self) -> str:
        gflops = figures([ops / 1e9 for ops in self.ops], " GFLOP/s")
        text = f"ceilings of {self.device}: bf16 products {gflops}"
        for name, rates in self.rates.items():
            text += f", {name} {figures([rate / 1e9 for rate in rates], ' GB/s')}"
            if self.sheet:
                text += f" = {median(rates) / self.sheet:.2f} of the data sheet"
        return text


def is_steady(rates: Sequence[float]) -> bool:
    return max(rates) <= STEADY * min(rates)


def data_sheet(gpu: str) -> float | None:
    """Bytes per second of this GPU's memory, if its data sheet is known."""
    for name, gigabytes in DATA_SHEETS.items():
        if name in gpu:
            return 1e9 * gigabytes
    return None
