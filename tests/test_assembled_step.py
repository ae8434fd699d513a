"""The whole decode step of decode.py, with its kernels, against model.py.

It runs compiled on a GPU, and else in Triton's interpreter over simulated devices.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_cases import INTERPRETED, assert_close, compiled, interpret, kernel_device
from simulated.cuda import simulated_cuda

from mixtral import ModelArgs, Transformer
from mixtral.model import Span

pytest.importorskip("triton")
kernels = pytest.importorskip("mixtral.kernels")
decode = pytest.importorskip("mixtral.decode")

ARGS = ModelArgs(16, 2, 4, 20, 6, 2, vocab_size=20, max_seq_len=48)
on_gpu = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=["cpu" if INTERPRETED else on_gpu])
def device(request):
    yield from kernel_device()


@compiled
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled")
def test_interpreted_on_the_cpu():
    interpret(__file__, "assembled")


def launch_unwrapped(kernel, grid, *args, launch=kernels.launch, **options):
    """Launch on simulated devices, if a GPU could; on the tensors without labels."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    current = torch.device("cuda", torch.cuda.current_device())
    assert {tensor.device for tensor in tensors} == {current}
    assert not any(tensor.data_ptr() % 16 for tensor in tensors)  # as compiled
    launch(kernel, grid, *(getattr(arg, "inner", arg) for arg in args), **options)


def tensors_of(model: Transformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def fill(model: Transformer, spans: list[Span]) -> None:
    """Random weights and cache, which is NaN from each span's first position on."""
    for name, tensor in tensors_of(model).items():
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        elif name.endswith("scale"):
            tensor.normal_(std=0.003)
        elif tensor.dtype == torch.float32:
            tensor.normal_(std=tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1)
        if "cache" in name:
            for row, position, _ in spans:
                tensor[row, position:] = torch.nan  # not written yet


@pytest.mark.parametrize(
    "n_devices, cpu_layers, int8",
    [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (2, 1, 0), (1, 0, 1), (4, 0, 1), (1, 1, 1)],
)
@torch.inference_mode()
def test_assembled_step(device, monkeypatch, n_devices, cpu_layers, int8):
    """Its logits and the caches are model.py's; eight experts on three devices are 3, 3, 2."""
    inputs = torch.tensor([[7, 19, 0], [2, 0, 1], [0, 40, 9]], device="cpu")
    spans = [Span(row, position, 1) for row, position in inputs[1:].T.tolist()]
    places = ["cuda:0"] * n_devices
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            monkeypatch.setattr(kernels, "launch", launch_unwrapped)
            # The interpreter's time is the number of programs: few rows take one program, and
            # positions are split in two.
            monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)
            monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 3)
            stack.enter_context(simulated_cuda(n_devices))
            places = [f"cuda:{i}" for i in range(n_devices)]
        model = Transformer(ARGS, ["cpu"], torch.float32, int8=bool(int8))
        fast = Transformer(ARGS, places, torch.float32, cpu_layers, bool(int8))
        fill(model, spans)
        for name, tensor in tensors_of(model).items():
            tensors_of(fast)[name].copy_(tensor)
        # Each of the three begins at a multiple of 16 bytes, as in a Decoder.
        on_device = F.pad(inputs, (0, 13)).to(places[0])[:, :3]
        run = decode.Launch(fast.devices)
        with run.segment:
            logits = decode.step(run, fast, on_device, decode.Buffers(3, fast)).cpu()
        assert_close(logits, model.forward_packed(inputs[0].cpu(), spans))
        for name, tensor in tensors_of(model).items():
            theirs = tensors_of(fast)[name].cpu()
            assert torch.allclose(tensor, theirs, rtol=0, atol=1e-5, equal_nan=True), name
