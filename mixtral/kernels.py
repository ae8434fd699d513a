"""Triton kernels for the decode step, each followed by the function that launches it.

A decode step computes one new token per row, so its time is the time to read the weights and the
cache. Tensors are dense and on the current device. The functions here read no values back from
the device, so that a CUDA graph can hold a whole step, and they compile no kernel anew for
another number of tokens. Sums are float32.

Names: T is the number of tokens. A kernel runs as many programs in parallel, told apart by their
indices in its grid; its docstring says what one of them computes. Arguments that end in _ptr are
pointers; arguments in capitals are numbers that a kernel is compiled for.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton.language import constexpr

# How weights are read. A program sums the products of ROWS_PER_PROGRAM rows, a tile of columns at
# a time, and each of its threads copies 16 bytes of each row to shared memory: 16 KB per tile.
# While one tile is summed, STAGES - 1 more are on their way: 32 KB per program. A multiprocessor
# holds 3 to 5 programs, and needs only about 30 KB on their way to hide the latency of memory. More
# rows per program would share each read of x, which comes from L2, but leave fewer programs.
ROWS_PER_PROGRAM = 8
STAGES = constexpr(3)
WARPS = 4

# A weight with few rows, such as a gate's, is read with fewer rows per program, so that it takes
# about this many programs: 4 for each of the 132 multiprocessors of an H100.
ENOUGH_PROGRAMS = 512

# Into how many parts attention may split the positions that it reads.
MAX_SPLITS = constexpr(64)


# A product with a weight


@triton.jit
def _linear(
    out_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    M: constexpr,
    K: constexpr,
    N: constexpr,
    BLOCK_K: constexpr,
    VEC: constexpr,
):
    """Program (t, b) computes out[t, b * N : (b + 1) * N], of out (T, M).

    These are the products of x[t] (K,) with N rows of weight (M, K), plus residual[t] if given.
    """
    # Tokens are the fastest axis: programs that start together share weight rows through L2.
    token = tl.program_id(0)
    outputs = tl.program_id(1) * N + tl.arange(0, N)
    # The last program may have fewer rows than N; it reads the last row again and stores less.
    row_ptrs = weight_ptr + tl.minimum(outputs, M - 1) * K
    acc = _products(row_ptrs, x_ptr + token * K, K, N, BLOCK_K, VEC)
    _store_sums(out_ptr, acc, residual_ptr, token * M + outputs, outputs < M)


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (T, K) times the transpose of weight (M, K), plus residual (T, M) if given."""
    n_tokens = len(x)
    m, k = weight.shape
    out = torch.empty(n_tokens, m, dtype=x.dtype, device=x.device)
    rows = min(ROWS_PER_PROGRAM, next_power_of_2(cdiv(m, ENOUGH_PROGRAMS)))
    _launch_by_rows(_linear, weight, rows, n_tokens, out, x, weight, residual, M=m, K=k)
    return out


@triton.jit
def _products(
    row_ptrs,
    x_ptr,
    K: constexpr,
    N: constexpr,
    BLOCK_K: constexpr,
    VEC: constexpr,
):
    """The products of N weight rows with all of x (K,), as sums (N, BLOCK_K / VEC)."""
    acc = tl.zeros((N, BLOCK_K // VEC), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + columns, columns < K, other=0.0)
        acc = _add_products(acc, row_ptrs, x, columns, K, VEC)
    return acc


@triton.jit
def _add_products(acc, row_ptrs, x, columns, K: constexpr, VEC: constexpr):
    """acc (N, BLOCK_K / VEC) plus the products of N weight rows with x, at these columns."""
    weight_ptrs = row_ptrs[:, None] + columns[None, :]  # (N, BLOCK_K)
    inside = columns[None, :] < K
    weights = tl.load(weight_ptrs, inside, other=0.0, eviction_policy="evict_first")
    products = weights.to(tl.float32) * x.to(tl.float32)[None, :]
    # A thread sums the VEC neighbours that it copied itself. Sums over threads are made once, by
    # the caller, when all columns are read.
    neighbours = tl.reshape(products, (acc.shape[0], acc.shape[1], VEC))
    return acc + tl.sum(neighbours, 2)


@triton.jit
def _store_sums(out_ptr, acc, residual_ptr, offsets, inside):
    """Store the sums over threads of acc (N, BLOCK_K / VEC), plus the residual if given."""
    sums = tl.sum(acc, 1)  # (N,)
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + offsets, inside).to(tl.float32)
    tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), inside)


# The mixture of experts


@triton.jit
def _route(logits_ptr, E: constexpr, TOP_K: constexpr):
    """The ids of all experts, their ranks by logit, and their weights, 0 but for the TOP_K.

    Of experts with equal logits the one with the lower id ranks first.
    """
    ids = tl.arange(0, next_power_of_2(E))
    logits = tl.load(logits_ptr + ids, ids < E, other=float("-inf")).to(tl.float32)
    # Whether the expert of the column ranks before the expert of the row.
    equal = logits[None, :] == logits[:, None]
    before = (equal & (ids[None, :] < ids[:, None])) | (logits[None, :] > logits[:, None])
    ranks = tl.sum(before.to(tl.int32), 1)
    odds = tl.where(ranks < TOP_K, tl.exp(logits - tl.max(logits, 0)), 0.0)
    return ids, ranks, odds / tl.sum(odds, 0)


@triton.jit
def _expert_of(ids, ranks, choice):
    """The id of the expert with this rank: int64, since offsets in its weights pass 2**31."""
    return tl.sum(tl.where(ranks == choice, ids, 0), 0).to(tl.int64)


@triton.jit(do_not_specialize=["first", "held"])
def _moe_up(
    hidden_ptr,
    x_ptr,
    logits_ptr,
    w1_ptr,
    w3_ptr,
    s1_ptr,
    s3_ptr,
    first,
    held,
    DIM: constexpr,
    HIDDEN: constexpr,
    E: constexpr,
    TOP_K: constexpr,
    N: constexpr,
    BLOCK_K: constexpr,
    VEC: constexpr,
):
    """Program (p, b) computes hidden[p, b * N : (b + 1) * N], of hidden (T * TOP_K, HIDDEN).

    Pair p is choice p % TOP_K of token p // TOP_K. The program reads N rows of w1 and of w3 of the
    chosen expert. If that expert is not among those held, hidden[p] is not written.
    """
    pair = tl.program_id(0)
    outputs = tl.program_id(1) * N + tl.arange(0, N)
    token = pair // TOP_K
    # Each program routes its token anew, which takes less time than one more launch would.
    ids, ranks, _ = _route(logits_ptr + token * E, E, TOP_K)
    expert = _expert_of(ids, ranks, pair % TOP_K) - first
    if (expert >= 0) & (expert < held):
        rows = expert * HIDDEN + tl.minimum(outputs, HIDDEN - 1)
        gate = tl.zeros((N, BLOCK_K // VEC), tl.float32)
        up = tl.zeros((N, BLOCK_K // VEC), tl.float32)
        for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + token * DIM + columns, columns < DIM, other=0.0)
            gate = _add_products(gate, w1_ptr + rows * DIM, x, columns, DIM, VEC)
            up = _add_products(up, w3_ptr + rows * DIM, x, columns, DIM, VEC)
        gate = tl.sum(gate, 1)  # (N,)
        up = tl.sum(up, 1)
        if s1_ptr is not None:
            gate *= tl.load(s1_ptr + rows).to(tl.float32)
            up *= tl.load(s3_ptr + rows).to(tl.float32)
        hidden = gate / (1 + tl.exp(-gate)) * up
        hidden = hidden.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + pair * HIDDEN + outputs, hidden, outputs < HIDDEN)


@triton.jit(do_not_specialize=["first", "held"])
def _moe_down(
    out_ptr,
    hidden_ptr,
    residual_ptr,
    logits_ptr,
    w2_ptr,
    s2_ptr,
    first,
    held,
    DIM: constexpr,
    HIDDEN: constexpr,
    E: constexpr,
    TOP_K: constexpr,
    N: constexpr,
    BLOCK_K: constexpr,
    VEC: constexpr,
):
    """Program (t, b) computes out[t, b * N : (b + 1) * N], of out (T, DIM).

    It sums over the experts of token t that are held, from N rows of the w2 of each of them.
    """
    token = tl.program_id(0)
    outputs = tl.program_id(1) * N + tl.arange(0, N)
    ids, ranks, weights = _route(logits_ptr + token * E, E, TOP_K)
    acc = tl.zeros((N, BLOCK_K // VEC), tl.float32)
    for choice in range(TOP_K):  # always in this order, so that the sum is the same
        expert = _expert_of(ids, ranks, choice) - first
        if (expert >= 0) & (expert < held):
            weight = tl.sum(tl.where(ranks == choice, weights, 0.0), 0)
            rows = expert * DIM + tl.minimum(outputs, DIM - 1)
            if s2_ptr is not None:
                weight *= tl.load(s2_ptr + rows).to(tl.float32)[:, None]
            row_ptrs = w2_ptr + rows * HIDDEN
            pair_ptr = hidden_ptr + (token * TOP_K + choice) * HIDDEN
            acc += weight * _products(row_ptrs, pair_ptr, HIDDEN, N, BLOCK_K, VEC)
    _store_sums(out_ptr, acc, residual_ptr, token * DIM + outputs, outputs < DIM)


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
) -> Tensor:
    """The weighted sum (T, dim) of each token's experts, counting only those held here.

    logits (T, E), with E at most 64, are the gate's for all experts: the top_k of a token choose
    and weigh its experts. w1 and w3 (n, hidden_dim, dim) and w2 (n, dim, hidden_dim) belong to the
    experts from first to first + n - 1. If they are int8, scales are s1, s2 and s3, each with a
    number of x's dtype for each row of each expert. residual (T, dim) is added if given. The
    result is written to out (T, dim) if given, which may be of any dtype.
    """
    n_tokens, dim = x.shape
    held, hidden_dim, _ = w1.shape
    n_experts = logits.shape[1]
    hidden = torch.empty(n_tokens * top_k, hidden_dim, dtype=x.dtype, device=x.device)
    if out is None:
        out = torch.empty_like(x)
    s1, s2, s3 = scales or (None, None, None)
    sizes = {"DIM": dim, "HIDDEN": hidden_dim, "E": n_experts, "TOP_K": top_k}

    # Half of the rows of a program are w1's, and half are w3's.
    rows = ROWS_PER_PROGRAM // 2
    up_args = (hidden, x, logits, w1, w3, s1, s3, first, held)
    _launch_by_rows(_moe_up, w1, rows, n_tokens * top_k, *up_args, **sizes)

    # In 8 bits a tile has twice the numbers, for which Triton 3.6 takes too many registers.
    rows = ROWS_PER_PROGRAM if scales is None else ROWS_PER_PROGRAM // 2
    down_args = (out, hidden, residual, logits, w2, s2, first, held)
    _launch_by_rows(_moe_down, w2, rows, n_tokens, *down_args, **sizes)
    return out


# Rotary embedding and the cache


@triton.jit
def _rope_and_cache(
    q_ptr,
    cache_k_ptr,
    cache_v_ptr,
    qkv_ptr,
    freqs_ptr,
    rows_ptr,
    positions_ptr,
    cache_stride,
    HEADS: constexpr,
    N_KV: constexpr,
    D: constexpr,
):
    """Program (h, t) moves head h of token t, which has HEADS + 2 * N_KV heads of D numbers.

    A query head is rotated and goes to q, a key head is rotated and goes to the cache of keys, and
    a value head goes to the cache of values as it is.
    """
    head = tl.program_id(0)
    token = tl.program_id(1)
    position = tl.load(positions_ptr + token)
    slot = tl.load(rows_ptr + token) * cache_stride + position * (N_KV * D)
    source_ptr = qkv_ptr + (token * (HEADS + 2 * N_KV) + head) * D
    if head < HEADS:
        target_ptr = q_ptr + (token * HEADS + head) * D
    elif head < HEADS + N_KV:
        target_ptr = cache_k_ptr + slot + (head - HEADS) * D
    else:
        target_ptr = cache_v_ptr + slot + (head - HEADS - N_KV) * D
    pairs = tl.arange(0, next_power_of_2(D // 2))
    columns = 2 * pairs[:, None] + tl.arange(0, 2)[None, :]  # (D / 2, 2)
    inside = columns < D
    x = tl.load(source_ptr + columns, inside)
    if head < HEADS + N_KV:
        # Each pair is a complex number, times the factor of its position.
        real, imaginary = tl.split(x.to(tl.float32))
        cos, sin = tl.split(tl.load(freqs_ptr + position * D + columns, inside))
        rotated = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
        x = rotated.to(x.dtype)
    tl.store(target_ptr + columns, x, inside)


def rope_and_cache(
    qkv: Tensor,
    freqs_cis: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rows: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rotated queries (T, heads, D) of qkv, whose keys and values go to the cache.

    qkv is (T, (heads + 2 * kv_heads) * D) and freqs_cis (max_seq_len, D / 2). Token t is at
    [rows[t], positions[t]] of the caches (max_batch_size, max_seq_len, kv_heads, D).
    """
    n_tokens = len(qkv)
    _, _, kv_heads, head_dim = cache_k.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty(n_tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        _rope_and_cache,
        (heads + 2 * kv_heads, n_tokens),
        q,
        cache_k,
        cache_v,
        qkv,
        torch.view_as_real(freqs_cis),
        rows,
        positions,
        cache_k.stride(0),
        HEADS=heads,
        N_KV=kv_heads,
        D=head_dim,
        num_warps=1,
    )
    return q


# Attention


@triton.jit
def _attend(
    parts_ptr,
    logs_ptr,
    q_ptr,
    cache_k_ptr,
    cache_v_ptr,
    rows_ptr,
    positions_ptr,
    cache_stride,
    scale,
    N_REP: constexpr,
    REP_PAD: constexpr,
    N_KV: constexpr,
    DOT: constexpr,
    D: constexpr,
    D_PAD: constexpr,
    BLOCK: constexpr,
):
    """Program (g, s, t) attends with the N_REP query heads of key head g to split s of positions.

    This is Flash-Decoding: each split has an online softmax, and _merge combines them. A program
    writes parts[t, heads, s] (D,), the values weighted by the softmax over the split alone, and
    logs[t, heads, s], the logarithm to base 2 of that softmax's sum. The query heads are the rows
    of one tensor-core tile, so that a key is read once for all of them. Programs that start
    together read whole positions, whose N_KV * D numbers lie side by side. A split beyond the
    token's position is not written.
    """
    group = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.program_id(2)
    splits = tl.num_programs(1)
    length = tl.load(positions_ptr + token).to(tl.int32) + 1
    share = _positions_per_split(length, splits, BLOCK)
    begin = split * share
    if begin < length:
        reps = tl.arange(0, REP_PAD)
        dims = tl.arange(0, D_PAD)[None, :]
        heads = (token * N_KV + group) * N_REP + reps
        inside = (reps[:, None] < N_REP) & (dims < D)
        q = tl.load(q_ptr + heads[:, None] * D + dims, inside, other=0.0).to(DOT)
        row = tl.load(rows_ptr + token)
        end = tl.minimum((split + 1) * share, length)
        key_ptrs = cache_k_ptr + row * cache_stride + group * D + dims  # (1, D_PAD)
        value_ptrs = cache_v_ptr + row * cache_stride + group * D + dims
        acc, best, total = _softmax_over(
            q, key_ptrs, value_ptrs, begin, end, scale, dims < D, N_KV * D, BLOCK
        )
        at = heads * splits + split
        tl.store(parts_ptr + at[:, None] * D + dims, acc / total[:, None], inside)
        tl.store(logs_ptr + at, best + tl.log2(total), reps < N_REP)


@triton.jit
def _softmax_over(
    q,
    key_ptrs,
    value_ptrs,
    begin,
    end,
    scale,
    dims_inside,
    STRIDE: constexpr,
    BLOCK: constexpr,
):
    """Attention of q (REP_PAD, D_PAD) over positions begin to end - 1, which are STRIDE apart.

    Returns acc (REP_PAD, D_PAD), the sum of the values weighted by exp2(score - best); best
    (REP_PAD,), the highest score; and total (REP_PAD,), the sum of the weights.
    """
    best = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    acc = tl.zeros((q.shape[0], q.shape[1]), tl.float32)
    for start in range(begin, end, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        inside = (positions[:, None] < end) & dims_inside
        offsets = positions[:, None] * STRIDE
        k = tl.load(key_ptrs + offsets, inside, other=0.0).to(q.dtype)  # (BLOCK, D_PAD)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(positions[None, :] < end, scores, float("-inf"))  # (REP_PAD, BLOCK)
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)  # acc and total are relative to the best so far
        best = new_best
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(value_ptrs + offsets, inside, other=0.0).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, best, total


@triton.jit
def _positions_per_split(length, splits, BLOCK: constexpr):
    """How many of length positions each of the splits has, in blocks; the last may be short."""
    return tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK


@triton.jit(do_not_specialize=["splits"])
def _merge(
    out_ptr,
    parts_ptr,
    logs_ptr,
    positions_ptr,
    splits,
    D: constexpr,
    BLOCK: constexpr,
):
    """Program (h, t) computes out[t, h] (D,), the sum of the parts weighted by exp2(logs).

    Only the parts that _attend wrote are read.
    """
    token = tl.program_id(1)
    head = token * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(positions_ptr + token).to(tl.int32) + 1
    split = tl.arange(0, MAX_SPLITS)
    dims = tl.arange(0, next_power_of_2(D))
    share = _positions_per_split(length, splits, BLOCK)
    written = (split < splits) & (split * share < length)
    at = head * splits + split
    logs = tl.load(logs_ptr + at, written, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    inside = written[:, None] & (dims[None, :] < D)  # (MAX_SPLITS, D)
    parts = tl.load(parts_ptr + at[:, None] * D + dims[None, :], inside, other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + head * D + dims, merged.to(out_ptr.dtype.element_ty), dims < D)


def attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Attention (T, heads * D) of q (T, heads, D) over positions 0..positions[t] of row rows[t]."""
    n_tokens, heads, head_dim = q.shape
    _, max_seq_len, kv_heads, _ = cache_k.shape
    n_rep = heads // kv_heads
    # The sides of a tensor-core tile are powers of 2 and at least 16.
    rep_pad = max(16, next_power_of_2(n_rep))
    dim_pad = max(16, next_power_of_2(head_dim))
    # A block is 8 KB of keys and 8 KB of values, and a program has three of them on their way, so
    # that 4 programs fit on a multiprocessor. The number of splits is chosen to reach that many.
    block = max(16, 8192 // (dim_pad * q.element_size()))
    splits = 4 * _multiprocessors(q.device) // (n_tokens * kv_heads)
    splits = max(1, min(splits, cdiv(max_seq_len, block), MAX_SPLITS.value))
    parts = torch.empty(n_tokens, heads, splits, head_dim, device=q.device, dtype=torch.float32)
    logs = torch.empty(n_tokens, heads, splits, device=q.device, dtype=torch.float32)
    out = torch.empty_like(q)
    launch(
        _attend,
        (kv_heads, splits, n_tokens),
        parts,
        logs,
        q,
        cache_k,
        cache_v,
        rows,
        positions,
        cache_k.stride(0),
        head_dim**-0.5 * math.log2(math.e),  # the softmax is to base 2
        N_REP=n_rep,
        REP_PAD=rep_pad,
        N_KV=kv_heads,
        DOT=_dot_dtype(q),
        D=head_dim,
        D_PAD=dim_pad,
        BLOCK=block,
        num_warps=4,
        num_stages=3,
    )
    merge_args = (out, parts, logs, positions, splits)
    launch(_merge, (heads, n_tokens), *merge_args, D=head_dim, BLOCK=block, num_warps=4)
    return out.view(n_tokens, -1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; without a GPU, as many as an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dot_dtype(q: Tensor) -> tl.dtype:
    """The type in which attention multiplies matrices, which is q's on a GPU."""
    if q.device.type == "cpu":  # Triton's interpreter has no products of bfloat16
        return tl.float32
    return {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[q.dtype]


# Launching


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch the kernel's programs, grid of them; options are its constants and Triton's own."""
    kernel[grid](*args, enable_fp_fusion=True, **options)


def _launch_by_rows(
    kernel: triton.JITFunction, weight: Tensor, rows: int, n_first: int, *args: Any, **sizes: int
) -> None:
    """Launch a grid of n_first programs by one for every `rows` rows of weight (..., M, K)."""
    m, k = weight.shape[-2:]
    per_thread = 16 // weight.element_size()  # numbers in the 16 bytes that a thread copies
    block_k = min(32 * WARPS * per_thread, max(per_thread, next_power_of_2(k)))
    launch(
        kernel,
        (n_first, cdiv(m, rows)),
        *args,
        **sizes,
        N=rows,
        BLOCK_K=block_k,
        VEC=per_thread,
        num_warps=WARPS,
    )
