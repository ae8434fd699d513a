"""The decode kernels against plain PyTorch, and what the compiler makes of them.

The comparisons run compiled where there is a CUDA GPU. Where there is none Triton
interprets them on the CPU, in a process of their own: it decides once, when it is
imported, whether to interpret.
"""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("mixtral.kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
skip_without_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="only compiled kernels")
on_gpu = pytest.param("cuda", marks=[pytest.mark.cuda, skip_without_gpu])

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the largest value for the same token. The interpreter cuts a bfloat16 short where a
# GPU rounds it: two units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=["cpu" if INTERPRETED else on_gpu])
def device(request):
    """One that can run the kernels. What they should write and do not is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    actual, expected = actual.float().flatten(1), expected.float().flatten(1)
    error, scale = (t.abs().amax(dim=1) for t in (actual - expected, expected))
    assert (error <= tolerance * scale).all()  # False for NaN


def moe_twin(x, logits, w1, w2, w3, first_expert, top_k):
    weights, selected = torch.topk(logits.float(), top_k)
    weights = weights.softmax(dim=-1)
    out = torch.zeros_like(x, dtype=torch.float32)
    for t, choice in itertools.product(range(len(x)), range(top_k)):
        e = selected[t, choice].item() - first_expert
        if 0 <= e < len(w1):
            gate, up = (w[e].float() @ x[t].float() for w in (w1, w3))
            hidden = (F.silu(gate) * up).type_as(x).float()
            out[t] += weights[t, choice] * (w2[e].float() @ hidden)
    return out.type_as(x)


def rope_twin(x, freqs_cis):
    """x (T, heads, head_dim), freqs_cis (T, head_dim / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).type_as(x)


def attention_twin(q, cache_k, cache_v, rows, positions):
    n_rep = q.shape[1] // cache_k.shape[2]
    out = torch.empty_like(q)
    for t, (row, position) in enumerate(zip(rows.tolist(), positions.tolist())):
        k, v = (
            c[row, : position + 1].float().repeat_interleave(n_rep, dim=1)
            for c in (cache_k, cache_v)
        )
        scores = torch.einsum("hd,shd->hs", q[t].float(), k) * q.shape[2] ** -0.5
        out[t] = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v).type_as(q)
    return out


def distinct_logits(T: int, E: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(T, E).argsort(dim=1) * 0.25).to(dtype)


def moe_case(T, dim, hidden, E, n, dtype):
    """x and distinct logits, slices of one tensor; weights, slices of larger stacks."""
    packed = randn(T, dim + E, dtype=dtype)
    packed[:, dim:] = distinct_logits(T, E, dtype)
    w13 = randn(n, 2, hidden, dim, dtype=dtype) * dim**-0.5
    w2 = randn(n, dim + 1, hidden, dtype=dtype)[:, :dim] * hidden**-0.5
    return (*packed.split((dim, E), dim=1), w13[:, 0], w2, w13[:, 1])


@pytest.mark.parametrize(
    "T, dim, hidden, E, top_k, first, n",
    [
        (1, 64, 24, 8, 2, 0, 8),
        (3, 50, 9, 8, 2, 2, 4),  # half the experts held; sizes that no tile divides
        (2, 17, 12, 5, 3, 4, 1),
        (1, 24, 8, 4, 4, 0, 4),  # every expert chosen
        (2, 16, 8, 64, 1, 16, 32),
        (1, 520, 4, 2, 1, 0, 2),  # more than a block of float32 along dim
    ],
)
def test_moe_decode(device, dtype, T, dim, hidden, E, top_k, first, n):
    x, logits, w1, w2, w3 = moe_case(T, dim, hidden, E, n, dtype)
    chosen = set(torch.topk(logits.float(), top_k).indices.flatten().tolist())
    for e in set(range(n)) - {c - first for c in chosen}:
        w1[e] = w2[e] = w3[e] = torch.nan  # what nobody chose is not read
    out = kernels.moe_decode(x, logits, w1, w2, w3, first, top_k)
    assert_close(out, moe_twin(x, logits, w1, w2, w3, first, top_k))
    if T > 1:  # a token's sum does not depend on what else is in the batch
        alone = kernels.moe_decode(x[-1:], logits[-1:], w1, w2, w3, first, top_k)
        assert torch.equal(alone, out[-1:])


def test_moe_decode_adds_a_residual(device, dtype):
    x, logits, w1, w2, w3 = moe_case(2, 16, 8, 4, 2, dtype)
    residual = randn(2, 16, dtype=dtype)
    out, added = (
        kernels.moe_decode(x, logits, w1, w2, w3, 0, 2, r) for r in (None, residual)
    )
    assert_close(added, out + residual)


def test_moe_decode_without_the_chosen_experts_is_zero(device, dtype):
    x, _, w1, w2, w3 = moe_case(2, 32, 32, 8, 3, dtype)
    logits = torch.arange(8).repeat(2, 1).to(dtype)  # chooses 7 and 6
    assert torch.equal(
        kernels.moe_decode(x, logits, w1, w2, w3, 3, 2), torch.zeros_like(x)
    )


def test_moe_decode_equal_logits_choose_the_lower_ids(device):
    x, _, w1, w2, w3 = moe_case(1, 32, 32, 8, 8, torch.float32)
    tied = torch.tensor([[0.0, 1, 1, 2, 1, 1, 0, 1]])
    clear = torch.tensor([[0.0, 1, 0, 2, 0, 0, 0, 0]])
    out, expected = (
        kernels.moe_decode(x, logits, w1, w2, w3, 0, 2) for logits in (tied, clear)
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "T, k, m", [(1, 64, 24), (3, 100, 13), (1, 1500, 6), (1, 2048, 5)]
)
def test_linear_decode(device, dtype, T, k, m):
    x, weight = randn(T, k + 3, dtype=dtype)[:, :k], randn(m, k, dtype=dtype)
    residual, product = randn(T, m, dtype=dtype), x.float() @ weight.float().T
    assert_close(kernels.linear_decode(x, weight), product.to(dtype))
    out = kernels.linear_decode(x, weight, residual)
    assert_close(out, (product + residual.float()).to(dtype))


@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim", [(8, 2, 128), (3, 1, 24), (6, 6, 8)]
)
def test_rope_and_cache(device, dtype, n_heads, n_kv_heads, head_dim):
    heads = (n_heads, n_kv_heads, n_kv_heads)
    rows, positions = torch.tensor([4, 0, 2]), torch.tensor([0, 10, 6])
    xq, xk, xv = randn(3, sum(heads), head_dim, dtype=dtype).split(heads, dim=1)
    angles = 9 * torch.rand(11, head_dim // 2)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    cache_k, cache_v = (randn(5, 11, n_kv_heads, head_dim, dtype=dtype) for _ in "kv")
    expected_k, expected_v = cache_k.clone(), cache_v.clone()
    expected_k[rows, positions] = rope_twin(xk, freqs_cis[positions])
    expected_v[rows, positions] = xv
    q = kernels.rope_and_cache(xq, xk, xv, freqs_cis, cache_k, cache_v, rows, positions)
    assert_close(q, rope_twin(xq, freqs_cis[positions]))
    assert q.is_contiguous() and torch.equal(cache_v, expected_v)
    assert_close(cache_k[rows, positions], expected_k[rows, positions])
    cache_k[rows, positions] = expected_k[rows, positions]
    assert torch.equal(cache_k, expected_k)  # every other slot is as it was


@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim, positions, multiprocessors",
    [
        (8, 2, 128, (0, 99, 31), 8),  # a block ends at 31, the cache at 99
        (3, 1, 24, (5, 64), 8),
        (6, 1, 8, (70,), 1),
        (2, 2, 256, (15, 16), 1),
        (18, 1, 16, (98,), 132),
    ],
)
def test_decode_attention(
    device,
    dtype,
    monkeypatch,
    n_heads,
    n_kv_heads,
    head_dim,
    positions,
    multiprocessors,
):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
    q = randn(len(positions), n_heads, head_dim, dtype=dtype)
    cache_k, cache_v = (randn(4, 100, n_kv_heads, head_dim, dtype=dtype) for _ in "kv")
    rows, positions = torch.tensor([3, 0, 2])[: len(positions)], torch.tensor(positions)
    for row, position in zip(rows.tolist(), positions.tolist()):
        cache_k[row, position + 1 :] = torch.nan  # not written yet
        cache_v[row, position + 1 :] = torch.nan
    expected = attention_twin(q, cache_k, cache_v, rows, positions)
    out = kernels.decode_attention(q, cache_k, cache_v, rows, positions)
    assert_close(out, expected)


def test_decode_attention_with_far_apart_scores(device):
    """Scores far below another split's neither overflow nor count."""
    q, cache_v = torch.ones(1, 2, 16), torch.zeros(1, 96, 1, 16)
    cache_k = torch.full_like(cache_v, -1000.0)
    cache_k[0, 40], cache_v[0, 40] = 1000.0, 7.0
    rows, positions = torch.tensor([0]), torch.tensor([95])
    out = kernels.decode_attention(q, cache_k, cache_v, rows, positions)
    assert torch.equal(out, torch.full_like(q, 7.0))


def test_a_tensor_that_is_not_dense_is_refused(device):
    with pytest.raises(ValueError, match="not dense"):
        kernels.linear_decode(torch.zeros(1, 8), torch.zeros(8, 4).T)


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled")
def test_interpreted_on_the_cpu():
    """Run the tests above, on the `cpu` device, where Triton was told to interpret."""
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


# dim, hidden_dim, n_heads
MODELS = {"8x7B": (4096, 14336, 32), "8x22B": (6144, 16384, 48)}


def layer(model: str, dtype: torch.dtype, T: int = 1):
    """Arguments, of the real sizes, of each wrapper that a layer calls."""
    dim, hidden_dim, n_heads = MODELS[model]
    x, logits = torch.randn(T, dim, dtype=dtype), distinct_logits(T, 8, dtype)
    shapes = (hidden_dim, dim), (dim, hidden_dim), (hidden_dim, dim)
    experts = [torch.randn(8, *shape, dtype=dtype) for shape in shapes]
    wqkv = torch.randn((n_heads + 16) * 128, dim, dtype=dtype)
    qkv = torch.randn(T, n_heads + 16, 128, dtype=dtype)
    q, k, v = qkv.split((n_heads, 8, 8), dim=1)
    freqs_cis = torch.randn(32768, 64, dtype=torch.complex64)
    caches = [torch.randn(4, 32768, 8, 128, dtype=dtype) for _ in "kv"]
    cache = (*caches, torch.arange(T), torch.arange(T))  # rows, positions
    return {
        kernels.moe_decode: (x, logits, *experts, 0, 2),
        kernels.linear_decode: (x, wqkv),
        kernels.rope_and_cache: (q, k, v, freqs_cis, *cache),
        kernels.decode_attention: (q.contiguous(), *cache),
    }


def launches(monkeypatch, model: str, dtype: torch.dtype) -> dict[str, tuple]:
    """(kernel, grid, args, meta) of each of a layer's launches, by the kernel's name.

    The tensors have no memory, and nothing runs.
    """
    calls = {}

    def record(kernel, grid, *args, **meta):
        assert kernel.__name__ not in calls
        calls[kernel.__name__] = (kernel, grid, args, meta)

    monkeypatch.setattr(kernels, "_launch", record)
    with torch.device("meta"):
        for wrapper, args in layer(model, dtype).items():
            wrapper(*args)
    return calls


def compile_launch(kernel, args, meta, capability: int):
    """What Triton would compile at this launch, for a GPU that need not be here."""
    sizes = {k: v for k, v in meta.items() if k in kernel.arg_names}
    options = {k: v for k, v in meta.items() if k not in sizes}
    values = dict(zip(kernel.arg_names, args)) | sizes
    types = dict(zip(DTYPES, ("*fp32", "*fp16", "*bf16"))) | {torch.int64: "*i64"}
    aligned = [["tt.divisibility", 16]]
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        special = value is None or (
            type(value) is int and value == 1 and not param.do_not_specialize
        )
        if param.is_constexpr or special:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], attributes[(i,)] = types[value.dtype], aligned
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(i,)] = aligned
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target, options | {"enable_fp_fusion": True})


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_launches_of_a_layer(monkeypatch, model, dtype):
    calls = launches(monkeypatch, model, dtype)
    assert len(calls) == 6
    for name in ("_moe_up", "_moe_down", "_linear"):
        _, grid, _, _ = calls[name]
        assert torch.Size(grid).numel() > 3 * 132  # multiprocessors, at batch 1
    for _, grid, _, _ in calls.values():
        assert max(grid[1:]) < 65536  # CUDA's limit, but for the first axis


# Bytes of shared memory that one program may take, by compute capability.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@compiled
@pytest.mark.parametrize(
    "model, capability, dtype",
    [(model, capability, torch.bfloat16) for model in MODELS for capability in SHARED]
    + [("8x7B", 80, torch.float16), ("8x7B", 80, torch.float32)],
)
def test_compiled_for_real_sizes(monkeypatch, tmp_path, model, capability, dtype):
    for name, (kernel, _, args, meta) in launches(monkeypatch, model, dtype).items():
        result = compile_launch(kernel, args, meta, capability)
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(result.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        usage = subprocess.check_output(command, text=True)
        usage = dict(re.findall(r"\b([A-Z]+):(\d+)", usage))
        registers = int(usage["REG"])
        shared = result.metadata.shared
        print(f"{name:16} {registers:3} registers, {shared:6} bytes of shared memory")
        assert usage["STACK"] == usage["LOCAL"] == "0", f"{name} spills"
        assert 4 * 32 * meta["num_warps"] * registers <= 65536, f"{name}: not 4 at once"
        assert 3 * (shared + 1024) <= SHARED[capability], f"{name}: not 3 at once"
        if name in ("_moe_up", "_moe_down", "_linear"):  # weights come 16 bytes at once
            copies = re.findall(r"cp\.async\.c[ag]\S* .*?, (\w+), ", result.asm["ptx"])
            assert copies and set(copies) == {"0x10"}
            assert not re.search(r"ld\.global\S*evict_first", result.asm["ptx"])


@pytest.fixture
def real_layer():
    torch.manual_seed(0)
    with torch.device("cuda"):
        calls = layer("8x7B", torch.bfloat16, T=3)
        for w in calls[kernels.moe_decode][2:5]:
            w *= w.shape[-1] ** -0.5
        yield calls


def check_real_layer(calls):
    out = {wrapper: wrapper(*args) for wrapper, args in calls.items()}
    assert_close(out[kernels.moe_decode], moe_twin(*calls[kernels.moe_decode]))
    x, weight = calls[kernels.linear_decode]
    assert_close(out[kernels.linear_decode], F.linear(x, weight))
    q, k, v, freqs_cis, *cache = calls[kernels.rope_and_cache]
    cache_k, cache_v, rows, positions = cache
    assert_close(out[kernels.rope_and_cache], rope_twin(q, freqs_cis[positions]))
    assert_close(cache_k[rows, positions], rope_twin(k, freqs_cis[positions]))
    assert torch.equal(cache_v[rows, positions], v)
    q = calls[kernels.decode_attention][0]
    assert_close(out[kernels.decode_attention], attention_twin(q, *cache))
    return out


@compiled
@pytest.mark.cuda
@skip_without_gpu
@pytest.mark.parametrize("positions", [(0, 61, 122), (32767, 4095, 1)])
def test_real_sizes(real_layer, positions):
    real_layer[kernels.rope_and_cache][7].copy_(torch.tensor(positions))
    check_real_layer(real_layer)


@compiled
@pytest.mark.cuda
@skip_without_gpu
def test_captured_in_a_cuda_graph(real_layer):
    """A captured step follows new tokens at new positions: the host decided nothing."""
    check_real_layer(real_layer)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = {wrapper: wrapper(*args) for wrapper, args in real_layer.items()}
    for positions in ((7, 20000, 300), (32767, 0, 64)):
        real_layer[kernels.rope_and_cache][7].copy_(torch.tensor(positions))
        real_layer[kernels.moe_decode][0].normal_()
        real_layer[kernels.moe_decode][1].copy_(distinct_logits(3, 8, torch.bfloat16))
        graph.replay()
        replayed = {wrapper: x.clone() for wrapper, x in out.items()}
        for wrapper, expected in check_real_layer(real_layer).items():
            assert torch.equal(replayed[wrapper], expected)
