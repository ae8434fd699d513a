"""The decode kernels against plain PyTorch, compiled on a GPU or interpreted on the CPU."""

import pytest
import torch
from helpers import plain_kernels
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

from mixtral.model import apply_rotary_emb

pytest.importorskip("triton")
kernels = pytest.importorskip("mixtral.kernels")

on_gpu = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=["cpu" if INTERPRETED else on_gpu])
def device(request):
    yield from kernel_device()


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled")
@pytest.mark.parametrize(
    "which",
    [
        "float32 and not True",  # without int8: the shortest run that has every kernel
        pytest.param("not float32 or True", marks=pytest.mark.slow),
    ],
)
def test_interpreted_on_the_cpu(which):
    interpret(__file__, which)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "n_tokens, dim, hidden, n_experts, top_k, first, held",
    [
        (1, 64, 24, 8, 2, 0, 8),
        (3, 50, 9, 8, 2, 2, 4),  # half the experts held; sizes that no tile divides
        (4, 16, 8, 8, 2, 0, 3),  # eight experts on three devices: 3, 3
        (4, 16, 8, 8, 2, 3, 3),
        (4, 16, 8, 8, 2, 6, 2),  # and 2
        (2, 17, 12, 5, 3, 4, 1),
        (2, 16, 8, 5, 3, 5, 1),  # none of the chosen experts held
        (1, 24, 8, 4, 4, 0, 4),  # every expert chosen
        (2, 16, 8, 64, 1, 16, 32),
        (1, 520, 4, 2, 1, 0, 2),  # more than a block of 1 warp along dim
    ],
)
def test_experts(
    device, dtype, monkeypatch, int8, n_tokens, dim, hidden, n_experts, top_k, first, held
):
    monkeypatch.setattr(kernels, "WARPS", 1)
    if dim > 500:  # the interpreter's time is the number of programs
        monkeypatch.setattr(kernels, "ROWS_PER_PROGRAM", 64)
    case = random_experts(n_tokens, dim, hidden, n_experts, held, dtype, int8)
    case |= {"first": first, "top_k": top_k}
    expected = plain_kernels.experts(**case)
    chosen = set(torch.topk(case["logits"].float(), top_k).indices.flatten().tolist())
    for expert in range(held):
        if first + expert not in chosen:  # then it is not read
            for tensor in case.get("scales", (case["w1"], case["w2"], case["w3"])):
                tensor[expert] = torch.nan
    out = kernels.experts(**case)
    assert_close(out, expected.to(dtype))
    residual = randn(n_tokens, dim, dtype=dtype)
    wide = torch.empty(n_tokens, dim)
    assert kernels.experts(**case, residual=residual, out=wide) is wide
    assert_close(wide, expected + residual.float(), TOLERANCE[dtype])
    if dtype != torch.float32 and expected.any():
        assert (wide != wide.to(dtype)).any()  # out is not rounded to x's type
    if n_tokens > 1:  # a token's sum does not depend on what else is in the batch
        case["x"] = case["x"][-1:]
        case["logits"] = case["logits"][-1:]
        assert torch.equal(kernels.experts(**case), out[-1:])


def test_any_experts_may_be_held(device, monkeypatch):
    """Parts of any sizes add up to the whole: first and the number held are not compiled in."""
    monkeypatch.setattr(kernels, "WARPS", 1)
    case = random_experts(3, 16, 8, 8, 8, torch.float32, int8=False)
    whole = kernels.experts(**case, first=0, top_k=2)
    total = torch.zeros_like(whole)
    for first, held in [(0, 3), (3, 2), (5, 1), (6, 2)]:
        part = dict(case)
        for name in ("w1", "w2", "w3"):
            part[name] = case[name][first : first + held]
        total += kernels.experts(**part, first=first, top_k=2)
    assert_close(total, whole)


def test_experts_equal_logits_choose_the_lower_ids(device):
    case = random_experts(1, 32, 32, 8, 8, torch.float32, int8=False)
    case |= {"first": 0, "top_k": 2}
    tied = torch.tensor([[0.0, 1, 1, 2, 1, 1, 0, 1]])
    clear = torch.tensor([[0.0, 1, 0, 2, 0, 0, 0, 0]])
    out = kernels.experts(**case | {"logits": tied})
    assert torch.equal(out, kernels.experts(**case | {"logits": clear}))


@pytest.mark.parametrize(
    "n_tokens, k, m, programs",
    [
        (1, 64, 24, 512),  # a row per program
        (3, 100, 13, 4),  # four rows per program, and one in the last
        (1, 1500, 6, 1),  # eight rows per program, of which there are six
        (1, 2048, 5, 512),
    ],
)
def test_linear(device, dtype, monkeypatch, n_tokens, k, m, programs):
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", programs)
    x = randn(n_tokens, k, dtype=dtype)
    weight = randn(m, k, dtype=dtype)
    residual = randn(n_tokens, m, dtype=dtype)
    assert_close(kernels.linear(x, weight), plain_kernels.linear(x, weight))
    out = kernels.linear(x, weight, residual)
    assert_close(out, plain_kernels.linear(x, weight, residual))


@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(8, 2, 128), (3, 1, 24), (6, 6, 8)])
def test_rope_and_cache(device, dtype, n_heads, n_kv_heads, head_dim):
    heads = (n_heads, n_kv_heads, n_kv_heads)
    rows = torch.tensor([4, 0, 2])
    positions = torch.tensor([0, 10, 6])
    qkv = randn(3, sum(heads) * head_dim, dtype=dtype)
    xq, xk, xv = qkv.view(3, -1, head_dim).split(heads, dim=1)
    angles = 9 * torch.rand(11, head_dim // 2)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    cache_k = randn(5, 11, n_kv_heads, head_dim, dtype=dtype)
    cache_v = randn(5, 11, n_kv_heads, head_dim, dtype=dtype)
    expected_k = cache_k.clone()
    expected_v = cache_v.clone()
    expected_k[rows, positions] = apply_rotary_emb(xk, freqs_cis[positions, None])
    expected_v[rows, positions] = xv
    q = kernels.rope_and_cache(qkv, freqs_cis, cache_k, cache_v, rows, positions)
    assert_close(q, apply_rotary_emb(xq, freqs_cis[positions, None]))
    assert torch.equal(cache_v, expected_v)
    assert_close(cache_k[rows, positions], expected_k[rows, positions])
    cache_k[rows, positions] = expected_k[rows, positions]
    assert torch.equal(cache_k, expected_k)  # every other slot is as it was


@pytest.mark.parametrize(
    "sizes, positions, multiprocessors",
    [
        ((8, 2, 128), (0, 99, 31), 8),  # a block ends at 31, the cache at 99
        ((3, 1, 24), (5, 64), 8),
        ((6, 1, 8), (70,), 1),
        ((2, 2, 256), (15, 16), 1),
        ((18, 1, 16), (98,), 132),
    ],
)
def test_attention(device, dtype, monkeypatch, sizes, positions, multiprocessors):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
    n_heads, n_kv_heads, head_dim = sizes
    q = randn(len(positions), n_heads, head_dim, dtype=dtype)
    cache_k = randn(4, 100, n_kv_heads, head_dim, dtype=dtype)
    cache_v = randn(4, 100, n_kv_heads, head_dim, dtype=dtype)
    rows = torch.tensor([3, 0, 2])[: len(positions)]
    positions = torch.tensor(positions)
    for row, position in zip(rows.tolist(), positions.tolist()):
        cache_k[row, position + 1 :] = torch.nan  # not written yet
        cache_v[row, position + 1 :] = torch.nan
    expected = plain_kernels.attention(q, cache_k, cache_v, rows, positions)
    out = kernels.attention(q, cache_k, cache_v, rows, positions)
    assert_close(out, expected)


def test_attention_with_far_apart_scores(device):
    """Scores far below another split's neither overflow nor count."""
    q = torch.ones(1, 2, 16)
    cache_k = torch.full((1, 96, 1, 16), -1000.0)
    cache_v = torch.zeros(1, 96, 1, 16)
    cache_k[0, 40] = 1000.0
    cache_v[0, 40] = 7.0
    out = kernels.attention(q, cache_k, cache_v, torch.tensor([0]), torch.tensor([95]))
    assert torch.equal(out, torch.full((1, 32), 7.0))
