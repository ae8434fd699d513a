"""The decode kernels against plain PyTorch, and what the compiler makes of them.

The comparisons run compiled if there is a CUDA GPU. Otherwise Triton interprets them on
the CPU, in a process of their own: it decides once, when it is imported, whether to
interpret.
"""

import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from simulated.cuda import simulated_cuda

from mixtral import ModelArgs, Transformer
from mixtral.model import Span, apply_rotary_emb

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("mixtral.kernels")
decode = pytest.importorskip("mixtral.decode")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="only compiled kernels")
on_gpu = pytest.param("cuda", marks=pytest.mark.cuda)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the largest value for the same token. The interpreter truncates to bfloat16, and a
# GPU rounds: two units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=["cpu" if INTERPRETED else on_gpu])
def device(request):
    """One that can run the kernels. New memory is filled with NaN."""
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


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None
) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    tolerance = tolerance or TOLERANCE[actual.dtype]
    actual, expected = actual.float().flatten(1), expected.float().flatten(1)
    error, scale = (t.abs().amax(dim=1) for t in (actual - expected, expected))
    assert (error <= tolerance * scale).all()  # False for NaN


def experts_twin(x, logits, w1, w2, w3, first, top_k, scales=None):
    """In float32, but for the hidden numbers, which are rounded to x's type."""
    weights, selected = torch.topk(logits.float(), top_k)
    weights = weights.softmax(dim=-1)
    out = torch.zeros_like(x, dtype=torch.float32)
    for t, choice in itertools.product(range(len(x)), range(top_k)):
        e = selected[t, choice].item() - first
        if 0 <= e < len(w1):
            gate, down, up = (
                w[e].float() * (s[e, :, None].float() if scales else 1)
                for w, s in zip((w1, w2, w3), scales or (w1, w2, w3))
            )
            hidden = F.silu(gate @ x[t].float()) * (up @ x[t].float())
            out[t] += weights[t, choice] * (down @ hidden.type_as(x).float())
    return out


def attention_twin(q, cache_k, cache_v, rows, positions):
    out = []
    for x, row, position in zip(q.float(), rows.tolist(), positions.tolist()):
        kv = (c[row, : position + 1].float().transpose(0, 1) for c in (cache_k, cache_v))
        x = x.unflatten(0, (cache_k.shape[2], -1))  # the heads of a key head
        out.append(F.scaled_dot_product_attention(x, *kv).flatten())
    return torch.stack(out).type_as(q)


def distinct_logits(T: int, E: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(T, E).argsort(dim=1) * 0.25).to(dtype)


def random_experts(T, dim, hidden, E, n, dtype, int8) -> dict:
    """Arguments of kernels.experts, but for first and top_k; the logits differ."""
    case = {"x": randn(T, dim, dtype=dtype), "logits": distinct_logits(T, E, dtype)}
    shapes = (n, hidden, dim), (n, dim, hidden), (n, hidden, dim)
    for name, shape in zip(("w1", "w2", "w3"), shapes):
        case[name] = randn(*shape, dtype=dtype) * shape[2] ** -0.5
        if int8:
            case[name] = torch.randint(-127, 128, shape, dtype=torch.int8)
    if int8:
        scales = [(0.5 + torch.rand(s[:2])) * s[2] ** -0.5 / 73 for s in shapes]
        case["scales"] = [scale.to(dtype) for scale in scales]
    return case


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "T, dim, hidden, E, top_k, first, n",
    [
        (1, 64, 24, 8, 2, 0, 8),
        (3, 50, 9, 8, 2, 2, 4),  # half the experts held; sizes that no tile divides
        (2, 17, 12, 5, 3, 4, 1),
        (2, 16, 8, 5, 3, 5, 1),  # none of the chosen experts held
        (1, 24, 8, 4, 4, 0, 4),  # every expert chosen
        (2, 16, 8, 64, 1, 16, 32),
        (1, 520, 4, 2, 1, 0, 2),  # more than a block of 1 warp along dim
    ],
)
def test_experts(
    device, dtype, monkeypatch, int8, T, dim, hidden, E, top_k, first, n
):  # fmt: skip
    monkeypatch.setattr(kernels, "WARPS", 1)
    case = random_experts(T, dim, hidden, E, n, dtype, int8)
    case |= {"first": first, "top_k": top_k}
    expected = experts_twin(**case)
    chosen = set(torch.topk(case["logits"].float(), top_k).indices.flatten().tolist())
    for e in set(range(n)) - {c - first for c in chosen}:
        for tensor in case.get("scales", (case["w1"], case["w2"], case["w3"])):
            tensor[e] = torch.nan  # what nobody chose is not read
    out = kernels.experts(**case)
    assert_close(out, expected.to(dtype))
    residual, wide = randn(T, dim, dtype=dtype), torch.empty(T, dim)
    assert kernels.experts(**case, residual=residual, out=wide) is wide
    assert_close(wide, expected + residual.float(), TOLERANCE[dtype])
    if dtype != torch.float32 and expected.any():
        assert (wide != wide.to(dtype)).any()  # out is not rounded to x's type
    if T > 1:  # a token's sum does not depend on what else is in the batch
        case |= {name: case[name][-1:] for name in ("x", "logits")}
        assert torch.equal(kernels.experts(**case), out[-1:])


def test_experts_equal_logits_choose_the_lower_ids(device):
    case = random_experts(1, 32, 32, 8, 8, torch.float32, int8=False)
    tied = torch.tensor([[0.0, 1, 1, 2, 1, 1, 0, 1]])
    clear = torch.tensor([[0.0, 1, 0, 2, 0, 0, 0, 0]])
    out, expected = (
        kernels.experts(**case | {"logits": logits}, first=0, top_k=2) for logits in (tied, clear)
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("T, k, m", [(1, 64, 24), (3, 100, 13), (1, 1500, 6), (1, 2048, 5)])
def test_linear(device, dtype, T, k, m):
    x, weight = randn(T, k, dtype=dtype), randn(m, k, dtype=dtype)
    residual, product = randn(T, m, dtype=dtype), x.float() @ weight.float().T
    assert_close(kernels.linear(x, weight), product.to(dtype))
    out = kernels.linear(x, weight, residual)
    assert_close(out, (product + residual.float()).to(dtype))


@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(8, 2, 128), (3, 1, 24), (6, 6, 8)])
def test_rope_and_cache(device, dtype, n_heads, n_kv_heads, head_dim):
    heads = (n_heads, n_kv_heads, n_kv_heads)
    rows, positions = torch.tensor([4, 0, 2]), torch.tensor([0, 10, 6])
    qkv = randn(3, sum(heads) * head_dim, dtype=dtype)
    xq, xk, xv = qkv.view(3, -1, head_dim).split(heads, dim=1)
    angles = 9 * torch.rand(11, head_dim // 2)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    cache_k, cache_v = (randn(5, 11, n_kv_heads, head_dim, dtype=dtype) for _ in "kv")
    expected_k, expected_v = cache_k.clone(), cache_v.clone()
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
    cache_k, cache_v = (randn(4, 100, n_kv_heads, head_dim, dtype=dtype) for _ in "kv")
    rows, positions = torch.tensor([3, 0, 2])[: len(positions)], torch.tensor(positions)
    for row, position in zip(rows.tolist(), positions.tolist()):
        cache_k[row, position + 1 :] = torch.nan  # not written yet
        cache_v[row, position + 1 :] = torch.nan
    expected = attention_twin(q, cache_k, cache_v, rows, positions)
    out = kernels.attention(q, cache_k, cache_v, rows, positions)
    assert_close(out, expected)


def test_attention_with_far_apart_scores(device):
    """Scores far below another split's neither overflow nor count."""
    q, cache_v = torch.ones(1, 2, 16), torch.zeros(1, 96, 1, 16)
    cache_k = torch.full_like(cache_v, -1000.0)
    cache_k[0, 40], cache_v[0, 40] = 1000.0, 7.0
    rows, positions = torch.tensor([0]), torch.tensor([95])
    out = kernels.attention(q, cache_k, cache_v, rows, positions)
    assert torch.equal(out, torch.full((1, 32), 7.0))


def launch_unwrapped(kernel, grid, *args, launch=kernels.launch, **meta):
    """Launch on simulated devices, if a GPU could; on the tensors without labels."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    current = torch.device("cuda", torch.cuda.current_device())
    assert {tensor.device for tensor in tensors} == {current}
    assert not any(tensor.data_ptr() % 16 for tensor in tensors)  # as compiled
    launch(kernel, grid, *(getattr(arg, "inner", arg) for arg in args), **meta)


@pytest.mark.parametrize(
    "n_devices, cpu_layers, int8",
    [(1, 0, 0), (2, 0, 0), (4, 0, 0), (2, 1, 0), (1, 0, 1), (4, 0, 1), (1, 1, 1)],
)
@torch.inference_mode()
def test_assembled_step(device, monkeypatch, n_devices, cpu_layers, int8):
    """decode.py's step equals model.py's, in its logits and in the caches."""
    args = ModelArgs(16, 2, 4, 20, 6, 2, vocab_size=20, max_seq_len=48)
    inputs = torch.tensor([[7, 19, 0], [2, 0, 1], [0, 40, 9]], device="cpu")
    spans = [Span(row, position, 1) for row, position in inputs[1:].T.tolist()]
    places = ["cuda:0"] * n_devices
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            monkeypatch.setattr(kernels, "launch", launch_unwrapped)
            monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 8)
            stack.enter_context(simulated_cuda(n_devices))
            places = [f"cuda:{i}" for i in range(n_devices)]
        model = Transformer(args, ["cpu"], torch.float32, int8=int8)
        fast = Transformer(args, places, torch.float32, cpu_layers, int8)
        ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, fast))
        for name, tensor in ours.items():
            if tensor.dtype == torch.int8:
                tensor.random_(-127, 128)
            elif tensor.dtype == torch.float32:
                std = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1
                tensor.normal_(std=0.003 if name.endswith("scale") else std)
            for row, position, _ in spans if "cache" in name else ():
                tensor[row, position:] = torch.nan  # not written yet
            theirs[name].copy_(tensor)
        inputs, run = F.pad(inputs, (0, 13)), decode.Launch(fast.devices)
        inputs = inputs.to(places[0])[:, :3]
        with run.open:
            logits = decode.step(run, fast, inputs, decode.Room(3, fast)).cpu()
        assert_close(logits, model.forward_packed(inputs[0].cpu(), spans))
        close = functools.partial(torch.allclose, rtol=0, atol=1e-5, equal_nan=True)
        assert all(close(t, theirs[name].cpu()) for name, t in ours.items())


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled")
def test_interpreted_on_the_cpu():
    """Run the tests above, on the `cpu` device, where Triton was told to interpret."""
    paths = os.pathsep.join(filter(None, sys.path))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


# dim, hidden_dim, n_heads
MODELS = {"8x7B": (4096, 14336, 32), "8x22B": (6144, 16384, 48)}


def random_layer(model: str, dtype: torch.dtype, int8=False, T=1) -> SimpleNamespace:
    """The tensors of a layer of the real sizes, for T tokens."""
    dim, hidden, n_heads = MODELS[model]
    experts = random_experts(T, dim, hidden, 8, 8, dtype, int8)
    qkv = randn(T, (n_heads + 16) * 128, dtype=dtype)
    cache_k, cache_v = (randn(T, 32768, 8, 128, dtype=dtype) for _ in "kv")
    return SimpleNamespace(
        x=experts["x"], experts=experts | {"first": 0, "top_k": 2}, qkv=qkv,
        wqkv=randn(qkv.shape[1], dim, dtype=dtype) * dim**-0.5,
        gate=randn(8, dim, dtype=dtype) * dim**-0.5,
        q=randn(T, n_heads, 128, dtype=dtype),
        freqs_cis=torch.randn(32768, 64, dtype=torch.complex64),
        cache=(cache_k, cache_v, torch.arange(T), torch.arange(T)),
    )  # fmt: skip


def run_layer(has: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {
        "qkv": kernels.linear(has.x, has.wqkv),
        "gate": kernels.linear(has.x, has.gate),
        "experts": kernels.experts(**has.experts),
        "rope": kernels.rope_and_cache(has.qkv, has.freqs_cis, *has.cache),
        "attention": kernels.attention(has.q, *has.cache),
    }


def launches(monkeypatch, *args) -> list[tuple]:
    """(kernel, grid, args, meta) of the launches of run_layer(random_layer(*args)).

    The tensors have no memory, and nothing runs.
    """
    calls = []

    def record(kernel, grid, *args, **meta):
        calls.append((kernel, grid, args, meta))

    monkeypatch.setattr(kernels, "launch", record)
    with torch.device("meta"):
        run_layer(random_layer(*args))
    return calls


def specialised(kernel, args, meta) -> tuple[dict, dict, dict, dict]:
    """What Triton compiles for: types, constants, multiples of 16, and options."""
    options = {k: v for k, v in meta.items() if k not in kernel.arg_names}
    options["enable_fp_fusion"] = True
    values = dict(zip(kernel.arg_names, args)) | meta
    types = dict(zip(DTYPES, ("*fp32", "*fp16", "*bf16")))
    types |= {torch.int8: "*i8", torch.int64: "*i64", int: "i32", float: "fp32"}
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        name, value = param.name, values[param.name]
        number = type(value) is int and not param.do_not_specialize
        if param.is_constexpr or value is None or (number and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = types[getattr(value, "dtype", type(value))]
        if isinstance(value, torch.Tensor) or (number and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_launches_of_a_layer(monkeypatch, model, dtype, int8):
    compiled = []
    for T in decode.ROWS:
        calls = launches(monkeypatch, model, dtype, int8, T)
        compiled.append([specialised(kernel, *rest) for kernel, _, *rest in calls])
        assert all(max(grid[1:]) < 65536 for _, grid, _, _ in calls)  # CUDA's limit
    # No kernel is compiled anew for another number of rows.
    assert len(compiled[0]) == 7 and compiled.count(compiled[0]) == len(compiled)
    qkv, _, up, down, *_ = launches(monkeypatch, model, dtype, int8)
    for _, grid, _, _ in (qkv, up, down):
        assert torch.Size(grid).numel() > 3 * 132  # multiprocessors


# Bytes of shared memory that one program may take, by compute capability.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "model, capability, dtype",
    [(model, capability, torch.bfloat16) for model in MODELS for capability in SHARED]
    + [("8x7B", 80, torch.float16), ("8x7B", 80, torch.float32)],
)
def test_compiled_for_real_sizes(monkeypatch, tmp_path, model, capability, dtype, int8):
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    for kernel, _, args, meta in launches(monkeypatch, model, dtype, int8):
        *source, options = specialised(kernel, args, meta)
        source = triton.compiler.ASTSource(kernel, *source)
        result = triton.compile(source, target, options)
        name, cubin = kernel.__name__, tmp_path / "cubin"
        cubin.write_bytes(result.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        usage = subprocess.check_output(command, text=True)
        usage = dict(re.findall(r"\b([A-Z]+):(\d+)", usage))
        registers, shared = int(usage["REG"]), result.metadata.shared
        print(f"{name:16} {registers:3} registers, {shared:6} bytes of shared memory")
        assert usage["STACK"] == usage["LOCAL"] == "0", f"{name} spills"
        assert 4 * 32 * meta["num_warps"] * registers <= 65536, f"{name}: not 4 at once"
        assert 3 * (shared + 1024) <= SHARED[capability], f"{name}: not 3 at once"
        if name in ("_moe_up", "_moe_down", "_linear"):  # weights come 16 bytes at once
            copies = re.findall(r"cp\.async\.c[ag]\S* .*?, (\w+), ", result.asm["ptx"])
            assert copies and set(copies) == {"0x10"}
            assert not re.search(r"ld\.global\S*evict_first", result.asm["ptx"])


def check_layer(has: SimpleNamespace) -> dict[str, torch.Tensor]:
    out = run_layer(has)
    assert_close(out["qkv"], F.linear(has.x, has.wqkv))
    assert_close(out["gate"], F.linear(has.x, has.gate))
    assert_close(out["experts"], experts_twin(**has.experts).bfloat16())
    cache_k, cache_v, rows, positions = has.cache
    heads = has.q.shape[1], 8, 8
    q, k, v = has.qkv.view(len(has.x), -1, 128).split(heads, dim=1)
    freqs_cis = has.freqs_cis[positions, None]
    assert_close(out["rope"], apply_rotary_emb(q, freqs_cis))
    assert_close(cache_k[rows, positions], apply_rotary_emb(k, freqs_cis))
    assert torch.equal(cache_v[rows, positions], v)
    assert_close(out["attention"], attention_twin(has.q, *has.cache))
    return out


@compiled
@pytest.mark.parametrize("int8", [False, True])
def test_captured_in_a_cuda_graph(device, int8):
    """A captured step follows new tokens at new positions: the host decided nothing."""
    real_layer = random_layer("8x7B", torch.bfloat16, int8, T=3)
    check_layer(real_layer)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_layer(real_layer)
    for positions in ((7, 20000, 300), (32767, 0, 64)):
        real_layer.cache[3].copy_(torch.tensor(positions))
        real_layer.x.normal_()
        real_layer.experts["logits"].copy_(distinct_logits(3, 8, torch.bfloat16))
        graph.replay()
        replayed = {name: x.clone() for name, x in out.items()}
        for name, expected in check_layer(real_layer).items():
            assert torch.equal(replayed[name], expected)
