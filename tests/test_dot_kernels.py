"""The kernels that wait to be measured, and the program that is to measure them on a GPU."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import plain_kernels
from helpers.gpus import simulated
from helpers.kernel_cases import (
    DTYPES,
    INTERPRETED,
    TOLERANCE,
    assert_close,
    compiled,
    interpret,
    kernel_device,
    randn,
    random_experts,
)
from simulated.cuda import kernel, simulated_cuda

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent / "bench"))  # the programs import one another by name
dot_kernels = pytest.importorskip("dot_kernels")
trial = pytest.importorskip("try_dot_kernels")

on_gpu = pytest.param("cuda", marks=pytest.mark.cuda)
SMALL = dot_kernels.Tiling(rows=16, block_k=32, stages=2, warps=1)


@pytest.fixture(params=["cpu" if INTERPRETED else on_gpu])
def device(request):
    yield from kernel_device()


@compiled
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled")
def test_interpreted_on_the_cpu():
    interpret(__file__, "like_plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens, k, m", [(1, 64, 24), (16, 100, 33)])
def test_linear_like_plain(device, dtype, n_tokens, k, m):
    x = randn(n_tokens, k, dtype=dtype)
    weight = randn(m, k, dtype=dtype)
    residual = randn(n_tokens, m, dtype=dtype)
    for more in (None, residual):
        out = dot_kernels.linear(x, weight, more, tiling=SMALL)
        assert_close(out, plain_kernels.linear(x, weight, more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "n_tokens, dim, hidden, n_experts, top_k, first, held",
    [
        (1, 64, 24, 8, 2, 0, 8),
        (3, 50, 9, 8, 2, 2, 4),  # half the experts held; sizes that no tile divides
        (16, 16, 8, 8, 2, 6, 2),
        (2, 16, 8, 5, 3, 5, 1),  # none of the chosen experts held
        (7, 24, 8, 4, 4, 0, 4),  # every expert chosen
    ],
)
def test_experts_like_plain(
    device, dtype, int8, n_tokens, dim, hidden, n_experts, top_k, first, held
):
    case = random_experts(n_tokens, dim, hidden, n_experts, held, dtype, int8)
    case |= {"first": first, "top_k": top_k}
    expected = plain_kernels.experts(**case)
    chosen = set(case["logits"].float().topk(top_k).indices.flatten().tolist())
    for expert in range(held):
        if first + expert not in chosen:  # then it is not read
            for tensor in case.get("scales", (case["w1"], case["w2"], case["w3"])):
                tensor[expert] = torch.nan
    tilings = {"up": SMALL, "down": SMALL}
    assert_close(dot_kernels.experts(**case, **tilings), expected.to(dtype))
    residual = randn(n_tokens, dim, dtype=dtype)
    wide = torch.empty(n_tokens, dim)
    dot_kernels.experts(**case, residual=residual, out=wide, **tilings)
    assert_close(wide, expected + residual.float(), TOLERANCE[dtype])


def test_equal_logits_like_plain_choose_the_lower_ids(device):
    case = random_experts(1, 32, 32, 8, 8, torch.float32, int8=False)
    case |= {"first": 0, "top_k": 2, "up": SMALL, "down": SMALL}
    tied = torch.tensor([[0.0, 1, 1, 2, 1, 1, 0, 1]])
    clear = torch.tensor([[0.0, 1, 0, 2, 0, 0, 0, 0]])
    out = dot_kernels.experts(**case | {"logits": tied})
    assert torch.equal(out, dot_kernels.experts(**case | {"logits": clear}))


@simulated
@compiled
def test_the_trial_runs(monkeypatch, capsys):
    """All of it but the kernels, which are plain PyTorch here."""

    def without_tilings(function):
        def stand_in(*args, up=None, down=None, tiling=None, **options):
            return function(*args, **options)

        return stand_in

    small = dataclasses.replace(trial.SIZES["demo"], n_layers=2, dim=32, hidden_dim=48)
    monkeypatch.setattr(trial, "SIZES", {"8x7b": small})
    monkeypatch.setattr(trial, "STEPS", 2)
    monkeypatch.setattr(trial, "REPEATS", 1)
    own = SimpleNamespace(
        linear=kernel(1)(without_tilings(plain_kernels.linear)),
        experts=kernel(2)(without_tilings(plain_kernels.experts)),
    )
    monkeypatch.setattr(trial, "dot_kernels", own)
    with simulated_cuda(1, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        trial.main()
    printed = capsys.readouterr().out
    assert printed.count("of the data sheet") == 3 * (2 + 3 * len(trial.TILINGS))
    assert printed.count("logits 0.0% apart") == 5 * 3
