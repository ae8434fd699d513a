"""What the compiler makes of the kernels at the real sizes: without a GPU, but for the last test.

Triton compiles ahead of time for any compute capability, so that registers, shared memory and
the instructions that read weights can be checked on any machine. How many registers a kernel takes
differs between versions of Triton by a factor of two, and means little by itself: what counts is
whether enough programs fit on a multiprocessor to keep its memory busy.
"""

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import plain_kernels
from helpers.kernel_cases import (
    DTYPES,
    assert_close,
    compiled,
    distinct_logits,
    kernel_device,
    randn,
    random_experts,
)

from mixtral.model import apply_rotary_emb

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("mixtral.kernels")
decode = pytest.importorskip("mixtral.decode")

pytestmark = compiled

# dim, hidden_dim, n_heads
MODELS = {"8x7B": (4096, 14336, 32), "8x22B": (6144, 16384, 48)}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    yield from kernel_device()


def random_layer(model: str, dtype: torch.dtype, int8=False, n_tokens=1) -> SimpleNamespace:
    """The tensors of a layer of the real sizes, for so many tokens."""
    dim, hidden, n_heads = MODELS[model]
    experts = random_experts(n_tokens, dim, hidden, 8, 8, dtype, int8)
    qkv = randn(n_tokens, (n_heads + 16) * 128, dtype=dtype)
    cache_k = randn(n_tokens, 32768, 8, 128, dtype=dtype)
    cache_v = randn(n_tokens, 32768, 8, 128, dtype=dtype)
    return SimpleNamespace(
        x=experts["x"],
        experts=experts | {"first": 0, "top_k": 2},
        qkv=qkv,
        wqkv=randn(qkv.shape[1], dim, dtype=dtype) * dim**-0.5,
        gate=randn(8, dim, dtype=dtype) * dim**-0.5,
        q=randn(n_tokens, n_heads, 128, dtype=dtype),
        freqs_cis=torch.randn(32768, 64, dtype=torch.complex64),
        cache=(cache_k, cache_v, torch.arange(n_tokens), torch.arange(n_tokens)),
    )


def run_layer(layer: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {
        "qkv": kernels.linear(layer.x, layer.wqkv),
        "gate": kernels.linear(layer.x, layer.gate),
        "experts": kernels.experts(**layer.experts),
        "rope": kernels.rope_and_cache(layer.qkv, layer.freqs_cis, *layer.cache),
        "attention": kernels.attention(layer.q, *layer.cache),
    }


def launches(monkeypatch, *layer) -> list[tuple]:
    """(kernel, grid, args, options) of the launches of run_layer(random_layer(*layer)).

    The tensors have no memory, and nothing runs.
    """
    calls = []

    def record(kernel, grid, *args, **options):
        calls.append((kernel, grid, args, options))

    monkeypatch.setattr(kernels, "launch", record)
    with torch.device("meta"):
        run_layer(random_layer(*layer))
    return calls


def specialised(kernel, args, options) -> tuple[dict, dict, dict, dict]:
    """What Triton compiles for: types, constants, multiples of 16, and its own options."""
    own = {name: value for name, value in options.items() if name not in kernel.arg_names}
    own["enable_fp_fusion"] = True
    values = dict(zip(kernel.arg_names, args)) | options
    types = dict(zip(DTYPES, ("*fp32", "*fp16", "*bf16")))
    types |= {torch.int8: "*i8", torch.int64: "*i64", int: "i32", float: "fp32"}
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        number = type(value) is int and not param.do_not_specialize
        if param.is_constexpr or value is None or (number and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        signature[param.name] = types[getattr(value, "dtype", type(value))]
        if isinstance(value, torch.Tensor) or (number and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, own


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_launches_of_a_layer(monkeypatch, model, dtype, int8):
    by_rows = []
    for n_tokens in decode.RECORDED_ROWS:
        calls = launches(monkeypatch, model, dtype, int8, n_tokens)
        by_rows.append([specialised(kernel, *rest) for kernel, _, *rest in calls])
        assert all(max(grid[1:]) < 65536 for _, grid, _, _ in calls)  # CUDA's limit
    # No kernel is compiled anew for another number of rows.
    assert len(by_rows[0]) == 7
    assert by_rows.count(by_rows[0]) == len(by_rows)
    qkv, _, up, down, *_ = launches(monkeypatch, model, dtype, int8)
    for _, grid, _, _ in (qkv, up, down):
        assert torch.Size(grid).numel() > 3 * 132  # multiprocessors of an H100


def test_the_held_experts_are_not_compiled_in(monkeypatch):
    """GPUs with 3 and with 2 of eight experts, from any first one on, share a kernel."""
    different = []
    for first, held in [(0, 3), (3, 3), (6, 2), (1, 1), (16, 16)]:
        calls = []
        monkeypatch.setattr(kernels, "launch", lambda *call, **more: calls.append((call, more)))  # noqa: B023
        with torch.device("meta"):
            case = random_experts(1, 4096, 14336, 8, held, torch.bfloat16, int8=False)
            kernels.experts(**case, first=first, top_k=2)
        different.append([specialised(call[0], call[2:], more) for call, more in calls])
    assert different.count(different[0]) == len(different)


# By compute capability: the bytes of shared memory of a multiprocessor, of which each program
# takes 1 KB more than it asks for; and the bytes per second that a multiprocessor's share of the
# memory delivers, for the fastest GPU of this capability: an A100 80GB, an H200, a B200.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
BYTES_PER_SECOND = {80: 2.04e12 / 108, 90: 4.8e12 / 132, 100: 8e12 / 148}
REGISTERS = 65536  # of a multiprocessor
LATENCY = 1e-6  # seconds from a request to its bytes under load, as an upper estimate


def programs_at_once(capability: int, registers: int, shared: int, warps: int) -> int:
    """How many programs of a kernel fit on a multiprocessor."""
    per_thread = -(-registers // 8) * 8  # they are given out in eights
    by_registers = REGISTERS // (32 * warps * per_thread)
    by_shared = SHARED[capability] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps)


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "model, capability, dtype",
    [(model, capability, torch.bfloat16) for model in MODELS for capability in SHARED]
    + [("8x7B", 80, torch.float16), ("8x7B", 80, torch.float32)],
)
def test_compiled_for_real_sizes(monkeypatch, tmp_path, model, capability, dtype, int8):
    """No kernel spills, and those that stream from memory have enough bytes on their way."""
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    calls = launches(monkeypatch, model, dtype, int8)
    names = ["qkv", "gate", "up", "down", "rope", "attend", "merge"]
    for name, (kernel, _, args, options) in zip(names, calls, strict=True):
        *source, own = specialised(kernel, args, options)
        result = triton.compile(triton.compiler.ASTSource(kernel, *source), target, own)
        usage = resource_usage(result.asm["cubin"], tmp_path / name)
        registers = usage["REG"]
        shared = result.metadata.shared
        at_once = programs_at_once(capability, registers, shared, options["num_warps"])
        print(f"{name:6} {registers:3} registers, {shared:6} bytes shared, {at_once} at once")
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills"
        if name in ("qkv", "up", "down", "attend"):
            # Shared memory is where loads arrive. It holds two tiles, of which one may just be
            # summed, so that at least half of it is on its way. By Little's law that must be the
            # bytes that memory delivers between a request and its answer.
            on_their_way = at_once * shared / 2
            assert on_their_way >= BYTES_PER_SECOND[capability] * LATENCY, f"{name}: too few bytes"
        if name in ("qkv", "gate", "up", "down"):  # weights come 16 bytes at once
            copies = re.findall(r"cp\.async\.c[ag]\S* .*?, (\w+), ", result.asm["ptx"])
            assert copies
            assert set(copies) == {"0x10"}
            assert not re.search(r"ld\.global\S*evict_first", result.asm["ptx"])


def resource_usage(cubin: bytes, file) -> dict[str, int]:
    """What one program takes: registers per thread (REG), and what it spills (STACK, LOCAL)."""
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file]
    printed = subprocess.check_output(command, text=True)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", printed)}


def check_layer(layer: SimpleNamespace) -> dict[str, torch.Tensor]:
    out = run_layer(layer)
    assert_close(out["qkv"], F.linear(layer.x, layer.wqkv))
    assert_close(out["gate"], F.linear(layer.x, layer.gate))
    assert_close(out["experts"], plain_kernels.experts(**layer.experts).bfloat16())
    cache_k, cache_v, rows, positions = layer.cache
    heads = (layer.q.shape[1], 8, 8)
    q, k, v = layer.qkv.view(len(layer.x), -1, 128).split(heads, dim=1)
    freqs_cis = layer.freqs_cis[positions, None]
    assert_close(out["rope"], apply_rotary_emb(q, freqs_cis))
    assert_close(cache_k[rows, positions], apply_rotary_emb(k, freqs_cis))
    assert torch.equal(cache_v[rows, positions], v)
    assert_close(out["attention"], plain_kernels.attention(layer.q, *layer.cache))
    return out


@pytest.mark.parametrize("int8", [False, True])
def test_captured_in_a_cuda_graph(device, int8):
    """A captured step follows new tokens at new positions: the host decided nothing."""
    layer = random_layer("8x7B", torch.bfloat16, int8, n_tokens=3)
    check_layer(layer)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_layer(layer)
    for positions in ((7, 20000, 300), (32767, 0, 64)):
        layer.cache[3].copy_(torch.tensor(positions))
        layer.x.normal_()
        layer.experts["logits"].copy_(distinct_logits(3, 8, torch.bfloat16))
        graph.replay()
        replayed = {name: x.clone() for name, x in out.items()}
        for name, expected in check_layer(layer).items():
            assert torch.equal(replayed[name], expected)
