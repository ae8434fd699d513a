"""Transitional."""

import torch
from .checkpoint import ACTIVATIONS, check_memory, memory_needed, free_memory


def find_devices(num_gpus):
    good = type(num_gpus) is int and num_gpus >= 0
    if not good:
        raise ValueError(f"num_gpus must be 1, 2, 4, 8 or 0 for the CPU, not {num_gpus!r}")
    visible = torch.cuda.device_count()
    if num_gpus > visible:
        raise ValueError(
            f"num_gpus is {num_gpus}, but {visible} GPUs are visible: use fewer, or 0 for the CPU"
        )
    return [f"cuda:{i}" for i in range(num_gpus)] or ["cpu"]
