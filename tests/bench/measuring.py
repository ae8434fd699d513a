"""How long work takes and how much memory it needs, and how such figures are written."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

Work = Callable[[], object]


class Peak(NamedTuple):
    """What a piece of work took: seconds, and GB by which memory grew at most and in the end."""

    seconds: float
    peak: float
    kept: float


def figures(values: Sequence[float], unit: str = "") -> str:
    """The median, with its unit, and the least and the greatest value."""
    middle = short(median(values))
    return f"{middle}{unit} ({short(min(values))}-{short(max(values))})"


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below)]


def seconds_of(work: Work) -> float:
    """Wall time until the devices are done too, which is how long a user waits."""
    wait_for_devices()
    begin = time.perf_counter()
    work()
    wait_for_devices()
    return time.perf_counter() - begin


def wait_for_devices() -> None:
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def peak_of(work: Work, device: str) -> Peak:
    """Do the work, and watch the device's memory, or the host's if device is "cpu"."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    samples = [gigabytes_used(device)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            samples.append(gigabytes_used(device))

    thread = threading.Thread(target=watch)
    thread.start()
    seconds = seconds_of(work)
    done.set()
    thread.join()
    samples.append(gigabytes_used(device))
    return Peak(seconds, max(samples) - samples[0], samples[-1] - samples[0])


def gigabytes_used(device: str) -> float:
    """On the host, memory that no file backs: mapped weights are not counted."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text()
    kilobytes = status.partition("RssAnon:")[2].split()[0]
    return int(kilobytes) * 1024 / 1e9
