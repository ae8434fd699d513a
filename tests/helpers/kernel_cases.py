"""Random arguments for the kernels of mixtral/kernels.py, and how near their results must be.

A test file of the kernels runs compiled where there is a CUDA GPU. Elsewhere Triton interprets
them on the CPU, in a process of its own: it decides once, when it is imported, whether to
interpret.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="only compiled kernels")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative to the token's largest value. For bfloat16, two units in the last place: the interpreter
# truncates, and a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def kernel_device() -> Iterator[str]:
    """The body of a fixture: a device that can run the kernels, on which memory is NaN at first."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    name = "cpu" if INTERPRETED else "cuda"
    with torch.device(name):
        yield name
    torch.use_deterministic_algorithms(False)


def interpret(file: str, which: str) -> None:
    """Run the tests of a file that -k which selects, where Triton was told to interpret."""
    paths = os.pathsep.join(filter(None, sys.path))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", which]
    run = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


def mend_the_interpreter() -> None:
    """Let Triton 3.6 interpret loops with NumPy 2.5.

    For the bounds of a loop its interpreter makes an int of an array with one element and one
    dimension, which NumPy deprecated in 1.25 and then refuses. Triton 3.7 does not do this.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if INTERPRETED and version("triton").startswith("3.6."):
    mend_the_interpreter()


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def distinct_logits(n_tokens: int, n_experts: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(n_tokens, n_experts).argsort(dim=1) * 0.25).to(dtype)


def random_experts(
    n_tokens: int, dim: int, hidden: int, n_experts: int, held: int, dtype: torch.dtype, int8: bool
) -> dict:
    """Arguments of kernels.experts, but for first and top_k."""
    case = {
        "x": randn(n_tokens, dim, dtype=dtype),
        "logits": distinct_logits(n_tokens, n_experts, dtype),
    }
    shapes = {"w1": (held, hidden, dim), "w2": (held, dim, hidden), "w3": (held, hidden, dim)}
    scales = []
    for name, shape in shapes.items():
        std = shape[2] ** -0.5
        if int8:
            case[name] = torch.randint(-127, 128, shape, dtype=torch.int8)
            scale = (0.5 + torch.rand(shape[:2])) * std / 73  # 73 is the integers' deviation
            scales.append(scale.to(dtype))
        else:
            case[name] = randn(*shape, dtype=dtype) * std
    if int8:
        case["scales"] = scales
    return case


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None
) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    tolerance = tolerance or TOLERANCE[actual.dtype]
    error = (actual.float() - expected.float()).flatten(1).abs().amax(dim=1)
    scale = expected.float().flatten(1).abs().amax(dim=1)
    assert (error <= tolerance * scale).all()  # False for NaN
