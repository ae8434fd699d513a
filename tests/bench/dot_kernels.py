"""Kernels that may replace `linear` and `experts` of mixtral/kernels.py, if that pays on a GPU.

Those have a program for each token, and programs of different tokens that want the same weights
share them through L2, which should be the limit from about 4 rows on (an estimate). Here a
program multiplies its weights with up to 16 tokens at once, on tensor cores, so that each weight
is read once. Nothing uses these kernels but tests/bench/try_dot_kernels.py, which measures them
beside the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton.language import constexpr
from triton.language.extra import cuda

from mixtral import kernels

# The tokens of a tensor-core tile, present or not: as many as a recorded step has at most.
BLOCK_T = constexpr(16)


class Tiling(NamedTuple):
    """How a kernel reads weights: in tiles of rows by block_k numbers, `stages` tiles at a time."""

    rows: int
    block_k: int
    stages: int
    warps: int
    early: bool = False  # start before the previous one has ended (compute capability 9.0)


# What is used by default. To be replaced by what is measured to be best.
LINEAR = Tiling(rows=16, block_k=256, stages=4, warps=4)
UP = Tiling(rows=32, block_k=128, stages=4, warps=4)
DOWN = Tiling(rows=16, block_k=256, stages=4, warps=4)


@triton.jit
def _begin(EARLY: constexpr):
    """If the kernel may start early, let the next one do so too, then wait for the previous one.

    This is CUDA's programmatic dependent launch. Nothing is read or written before the wait.
    """
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def _dot(
    acc,
    row_ptrs,
    x_ptrs,
    wanted,
    K: constexpr,
    BLOCK_K: constexpr,
    STAGES: constexpr,
    DOT: constexpr,
):
    """acc (N, BLOCK_T) plus N weight rows (K,) times the wanted ones of BLOCK_T tokens (K,)."""
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        inside = columns < K
        weights = tl.load(row_ptrs[:, None] + columns, inside, other=0.0)  # (N, BLOCK_K)
        x = tl.load(x_ptrs[:, None] + columns, inside & wanted[:, None], other=0.0)
        acc = tl.dot(weights.to(DOT), tl.trans(x.to(DOT)), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["n_tokens"])
def _linear(
    out_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    n_tokens,
    M: constexpr,
    K: constexpr,
    N: constexpr,
    BLOCK_K: constexpr,
    STAGES: constexpr,
    DOT: constexpr,
    EARLY: constexpr,
):
    """Program b computes out[:, b * N : (b + 1) * N], of out (n_tokens, M)."""
    _begin(EARLY)
    outputs = tl.program_id(0) * N + tl.arange(0, N)
    tokens = tl.arange(0, BLOCK_T)
    present = tokens < n_tokens
    row_ptrs = weight_ptr + tl.minimum(outputs, M - 1) * K
    acc = tl.zeros((N, BLOCK_T), tl.float32)
    acc = _dot(acc, row_ptrs, x_ptr + tokens * K, present, K, BLOCK_K, STAGES, DOT)
    _store_sums(out_ptr, acc, residual_ptr, outputs, tokens, present, M)


@triton.jit
def _store_sums(out_ptr, acc, residual_ptr, outputs, tokens, present, M: constexpr):
    """Store acc (N, BLOCK_T), plus the residual if given, at these outputs of out (T, M)."""
    offsets = tokens[None, :] * M + outputs[:, None]
    inside = present[None, :] & (outputs[:, None] < M)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), inside)


def linear(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    """kernels.linear for at most 16 tokens."""
    assert len(x) <= BLOCK_T.value
    tiling = tiling or LINEAR
    m, k = weight.shape
    out = torch.empty(len(x), m, dtype=x.dtype, device=x.device)
    args = (out, x, weight, residual, len(x))
    _launch(_linear, (cdiv(m, tiling.rows),), args, tiling, k, x, M=m, K=k)
    return out


@triton.jit
def _choices(logits_ptr, n_tokens, expert, E: constexpr):
    """For each of BLOCK_T tokens: the rank of an expert among all, and exp of its logit.

    Of experts with equal logits the one with the lower id ranks first. The largest logit of a
    token counts as 0, so that exp is at most 1.
    """
    tokens = tl.minimum(tl.arange(0, BLOCK_T), n_tokens - 1)[:, None]  # the last one repeated
    ids = tl.arange(0, next_power_of_2(E))[None, :]
    logits = tl.load(logits_ptr + tokens * E + ids, ids < E, other=float("-inf")).to(tl.float32)
    own = tl.max(tl.where(ids == expert, logits, float("-inf")), 1)  # (BLOCK_T,)
    before = (logits > own[:, None]) | ((logits == own[:, None]) & (ids < expert))
    ranks = tl.sum(before.to(tl.int32), 1)
    return ranks, tl.exp(own - tl.max(logits, 1))


@triton.jit(do_not_specialize=["n_tokens", "first"])
def _moe_up(
    hidden_ptr,
    x_ptr,
    logits_ptr,
    w1_ptr,
    w3_ptr,
    s1_ptr,
    s3_ptr,
    n_tokens,
    first,
    DIM: constexpr,
    HIDDEN: constexpr,
    E: constexpr,
    TOP_K: constexpr,
    N: constexpr,
    BLOCK_K: constexpr,
    STAGES: constexpr,
    DOT: constexpr,
    EARLY: constexpr,
):
    """Program (b, e) computes hidden[:, b * N : (b + 1) * N] for the tokens that chose expert e.

    hidden is (T * TOP_K, HIDDEN), with a row for each token and each rank of its experts. e counts
    the experts that are held; `first` is the id of the first of them.
    """
    _begin(EARLY)
    outputs = tl.program_id(0) * N + tl.arange(0, N)
    expert = tl.program_id(1).to(tl.int64)  # offsets in its weights pass 2**31
    tokens = tl.arange(0, BLOCK_T)
    ranks, _ = _choices(logits_ptr, n_tokens, first + expert, E)
    wanted = (ranks < TOP_K) & (tokens < n_tokens)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        rows = expert * HIDDEN + tl.minimum(outputs, HIDDEN - 1)
        gate = tl.zeros((N, BLOCK_T), tl.float32)
        up = tl.zeros((N, BLOCK_T), tl.float32)
        for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_K)[None, :]
            inside = columns < DIM
            x_ptrs = x_ptr + tokens[:, None] * DIM + columns
            x = tl.load(x_ptrs, inside & wanted[:, None], other=0.0)
            x = tl.trans(x.to(DOT))  # (BLOCK_K, BLOCK_T)
            w1 = tl.load(w1_ptr + rows[:, None] * DIM + columns, inside, other=0.0)
            w3 = tl.load(w3_ptr + rows[:, None] * DIM + columns, inside, other=0.0)
            gate = tl.dot(w1.to(DOT), x, gate, input_precision="ieee")
            up = tl.dot(w3.to(DOT), x, up, input_precision="ieee")
        if s1_ptr is not None:
            gate *= tl.load(s1_ptr + rows).to(tl.float32)[:, None]
            up *= tl.load(s3_ptr + rows).to(tl.float32)[:, None]
        hidden = (gate / (1 + tl.exp(-gate)) * up).to(hidden_ptr.dtype.element_ty)
        pairs = tokens * TOP_K + ranks
        offsets = pairs[None, :] * HIDDEN + outputs[:, None]
        tl.store(hidden_ptr + offsets, hidden, wanted[None, :] & (outputs[:, None] < HIDDEN))


@triton.jit(do_not_specialize=["n_tokens", "first", "held"])
def _moe_down(
    out_ptr,
    hidden_ptr,
    residual_ptr,
    logits_ptr,
    w2_ptr,
    s2_ptr,
    n_tokens,
    first,
    held,
    DIM: constexpr,
    HIDDEN: constexpr,
    E: constexpr,
    TOP_K: constexpr,
    N: constexpr,
    BLOCK_K: constexpr,
    STAGES: constexpr,
    DOT: constexpr,
    EARLY: constexpr,
):
    """Program b computes out[:, b * N : (b + 1) * N], of out (n_tokens, DIM).

    It goes through all experts by id, and multiplies with those that are held. A token's weights
    are divided by their sum at the end.
    """
    _begin(EARLY)
    outputs = tl.program_id(0) * N + tl.arange(0, N)
    tokens = tl.arange(0, BLOCK_T)
    present = tokens < n_tokens
    acc = tl.zeros((N, BLOCK_T), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for e in range(E):
        ranks, odds = _choices(logits_ptr, n_tokens, e, E)
        wanted = (ranks < TOP_K) & present
        odds = tl.where(ranks < TOP_K, odds, 0.0)
        total += odds
        expert = (e - first).to(tl.int64)
        is_held = (expert >= 0) & (expert < held)
        if is_held & (tl.max(wanted.to(tl.int32), 0) > 0):
            rows = expert * DIM + tl.minimum(outputs, DIM - 1)
            pairs = tokens * TOP_K + ranks
            sums = tl.zeros((N, BLOCK_T), tl.float32)
            row_ptrs = w2_ptr + rows * HIDDEN
            pair_ptrs = hidden_ptr + pairs * HIDDEN
            sums = _dot(sums, row_ptrs, pair_ptrs, wanted, HIDDEN, BLOCK_K, STAGES, DOT)
            if s2_ptr is not None:
                sums *= tl.load(s2_ptr + rows).to(tl.float32)[:, None]
            acc += sums * odds[None, :]
    acc /= total[None, :]
    _store_sums(out_ptr, acc, residual_ptr, outputs, tokens, present, DIM)


def experts(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    first: int,
    top_k: int,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    up: Tiling | None = None,
    down: Tiling | None = None,
) -> Tensor:
    """kernels.experts for at most 16 tokens."""
    assert len(x) <= BLOCK_T.value
    up = up or UP
    down = down or DOWN
    n_tokens, dim = x.shape
    held, hidden_dim, _ = w1.shape
    hidden = torch.empty(n_tokens * top_k, hidden_dim, dtype=x.dtype, device=x.device)
    if out is None:
        out = torch.empty_like(x)
    s1, s2, s3 = scales or (None, None, None)
    sizes = {"DIM": dim, "HIDDEN": hidden_dim, "E": logits.shape[1], "TOP_K": top_k}
    up_args = (hidden, x, logits, w1, w3, s1, s3, n_tokens, first)
    _launch(_moe_up, (cdiv(hidden_dim, up.rows), held), up_args, up, dim, x, **sizes)
    down_args = (out, hidden, residual, logits, w2, s2, n_tokens, first, held)
    _launch(_moe_down, (cdiv(dim, down.rows),), down_args, down, hidden_dim, x, **sizes)
    return out


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    args: tuple,
    tiling: Tiling,
    k: int,
    x: Tensor,
    **sizes: int,
) -> None:
    """Launch a kernel that reads weight rows of k numbers, for tokens such as x."""
    early = {"launch_pdl": True} if tiling.early else {}
    kernels.launch(
        kernel,
        grid,
        *args,
        **sizes,
        N=tiling.rows,
        BLOCK_K=min(tiling.block_k, max(16, next_power_of_2(k))),
        STAGES=tiling.stages,
        DOT=kernels._dot_dtype(x),
        EARLY=tiling.early,
        num_warps=tiling.warps,
        **early,
    )
