"""Triton kernels for the decode step: one new token a row, whose time is bytes read.

Tensors are dense and on the current device. Wrappers read no values from a device, so a
CUDA graph can hold a whole step, and no kernel is compiled anew for another number of
tokens. Sums are float32.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton.language import constexpr

# Weights are read in tiles of ROWS rows, of each of which a thread copies 16 bytes to
# shared memory. While one tile is summed, STAGES - 1 are under way: 32 KB a program, of
# which 3 to 5 fit on a multiprocessor, and about 30 KB hide the latency of memory. More
# rows would share each read of x, which comes from L2, and make fewer programs.
ROWS, STAGES, WARPS = 8, constexpr(3), 4
MAX_SPLITS = constexpr(64)  # of the positions that attention reads


@triton.jit
def _add_dots(acc, rows, x, cols, K: constexpr, VEC: constexpr):
    """acc (N, BLOCK_K / VEC) plus products of N weight rows with tile x."""
    tile = rows[:, None] + cols[None, :]
    tile = tl.load(tile, cols[None, :] < K, other=0.0, eviction_policy="evict_first")
    products = tile.to(tl.float32) * x.to(tl.float32)[None, :]
    # A thread sums the VEC neighbours that it copied; the caller sums over threads.
    return acc + tl.sum(tl.reshape(products, (acc.shape[0], acc.shape[1], VEC)), 2)


@triton.jit
def _dots(rows, x, K: constexpr, N: constexpr, BLOCK_K: constexpr, VEC: constexpr):
    """Products of N weight rows with all of x (K,), as sums (N, BLOCK_K / VEC)."""
    acc = tl.zeros((N, BLOCK_K // VEC), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + cols, cols < K, other=0.0)
        acc = _add_dots(acc, rows, x_tile, cols, K, VEC)
    return acc


@triton.jit
def _store_sums(out, acc, residual, at, mask):
    sums = tl.sum(acc, 1)
    if residual is not None:
        sums += tl.load(residual + at, mask).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask)


@triton.jit
def _linear(out, x, weight, residual, M: constexpr, K: constexpr, N: constexpr,
            BLOCK_K: constexpr, VEC: constexpr):  # fmt: skip
    """Program (t, b): N numbers of out[t] (M,), from rows b N.. of weight (M, K)."""
    # Tokens are the fastest axis: programs that start together share rows through L2.
    token, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    rows = weight + tl.minimum(cols, M - 1) * K
    acc = _dots(rows, x + token * K, K, N, BLOCK_K, VEC)
    _store_sums(out, acc, residual, token * M + cols, cols < M)


@triton.jit
def _route(logits, E: constexpr, TOP_K: constexpr):
    """Ids, ranks by logit (of equals the lower id first) and weights of the TOP_K."""
    ids = tl.arange(0, next_power_of_2(E))
    scores = tl.load(logits + ids, ids < E, other=float("-inf")).to(tl.float32)
    ahead = (scores[None, :] == scores[:, None]) & (ids[None, :] < ids[:, None])
    ahead = ahead | (scores[None, :] > scores[:, None])
    rank = tl.sum(ahead.to(tl.int32), 1)
    odds = tl.where(rank < TOP_K, tl.exp(scores - tl.max(scores, 0)), 0.0)
    return ids, rank, odds / tl.sum(odds, 0)


@triton.jit(do_not_specialize=["first", "held"])
def _moe_up(hidden, x, logits, w1, w3, s1, s3, first, held, DIM: constexpr,
            HIDDEN: constexpr, E: constexpr, TOP_K: constexpr, N: constexpr,
            BLOCK_K: constexpr, VEC: constexpr):  # fmt: skip
    """Program (p, b): N numbers of hidden[p], from rows b N.. of w1 and w3.

    Pair p is a choice of a token. If its expert is elsewhere, hidden[p] is not written.
    """
    pair, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    token = pair // TOP_K  # routed once more, which takes less time than a launch
    ids, rank, _ = _route(logits + token * E, E, TOP_K)
    expert = tl.sum(tl.where(rank == pair % TOP_K, ids, 0), 0).to(tl.int64) - first
    if (expert >= 0) & (expert < held):
        row = expert * HIDDEN + tl.minimum(cols, HIDDEN - 1)
        gate = tl.zeros((N, BLOCK_K // VEC), tl.float32)
        up = tl.zeros((N, BLOCK_K // VEC), tl.float32)
        for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x + token * DIM + at, at < DIM, other=0.0)
            gate = _add_dots(gate, w1 + row * DIM, x_tile, at, DIM, VEC)
            up = _add_dots(up, w3 + row * DIM, x_tile, at, DIM, VEC)
        gate, up = tl.sum(gate, 1), tl.sum(up, 1)
        if s1 is not None:
            gate *= tl.load(s1 + row).to(tl.float32)
            up *= tl.load(s3 + row).to(tl.float32)
        value = (gate / (1 + tl.exp(-gate)) * up).to(hidden.dtype.element_ty)
        tl.store(hidden + pair * HIDDEN + cols, value, cols < HIDDEN)


@triton.jit(do_not_specialize=["first", "held"])
def _moe_down(out, hidden, residual, logits, w2, s2, first, held, DIM: constexpr,
              HIDDEN: constexpr, E: constexpr, TOP_K: constexpr, N: constexpr,
              BLOCK_K: constexpr, VEC: constexpr):  # fmt: skip
    """Program (t, b): N numbers of out[t], from rows b N.. of the w2 of t's experts."""
    token, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    ids, rank, weights = _route(logits + token * E, E, TOP_K)
    acc = tl.zeros((N, BLOCK_K // VEC), tl.float32)
    for choice in range(TOP_K):  # always in this order, so that the sum is the same
        expert = tl.sum(tl.where(rank == choice, ids, 0), 0).to(tl.int64) - first
        if (expert >= 0) & (expert < held):
            weight = tl.sum(tl.where(rank == choice, weights, 0.0), 0)
            row = expert * DIM + tl.minimum(cols, DIM - 1)
            if s2 is not None:
                weight *= tl.load(s2 + row).to(tl.float32)[:, None]
            rows, part = w2 + row * HIDDEN, hidden + (token * TOP_K + choice) * HIDDEN
            acc += weight * _dots(rows, part, HIDDEN, N, BLOCK_K, VEC)
    _store_sums(out, acc, residual, token * DIM + cols, cols < DIM)


@triton.jit
def _rope_and_cache(q, cache_k, cache_v, qkv, freqs, rows, positions, stride,
                    HEADS: constexpr, N_KV: constexpr, D: constexpr):  # fmt: skip
    """Program (h, t): head h of t's HEADS query, N_KV key and N_KV value heads."""
    head, token = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    slot = tl.load(rows + token) * stride + position * (N_KV * D)
    source = qkv + (token * (HEADS + 2 * N_KV) + head) * D
    if head < HEADS:
        target = q + (token * HEADS + head) * D
    elif head < HEADS + N_KV:
        target = cache_k + slot + (head - HEADS) * D
    else:
        target = cache_v + slot + (head - HEADS - N_KV) * D
    cols = 2 * tl.arange(0, next_power_of_2(D // 2))[:, None] + tl.arange(0, 2)[None, :]
    x = tl.load(source + cols, cols < D)
    if head < HEADS + N_KV:
        a, b = tl.split(x.to(tl.float32))
        cos, sin = tl.split(tl.load(freqs + position * D + cols, cols < D))
        x = tl.join(a * cos - b * sin, a * sin + b * cos).to(x.dtype)
    tl.store(target + cols, x, cols < D)


@triton.jit
def _attend(part, lse, q, cache_k, cache_v, rows, positions, stride, scale,
            N_REP: constexpr, REP_PAD: constexpr, N_KV: constexpr, DOT: constexpr,
            D: constexpr, D_PAD: constexpr, BLOCK: constexpr):  # fmt: skip
    """Program (g, s, t): t's N_REP query heads of key head g, on split s of positions.

    It writes part[t, heads, s] and lse[t, heads, s], the logarithm to base 2 of its
    softmax's sum. The heads are rows of one tensor-core tile: a key is read once for
    all. Programs that start together read whole positions, N_KV * D numbers in a row.
    """
    group, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + token).to(tl.int32) + 1
    splits = tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK  # in whole blocks
    if split * share < length:
        reps, dims = tl.arange(0, REP_PAD), tl.arange(0, D_PAD)[None, :]
        heads = (token * N_KV + group) * N_REP + reps
        mask = (reps[:, None] < N_REP) & (dims < D)
        q_tile = tl.load(q + heads[:, None] * D + dims, mask, other=0.0).to(DOT)
        row, end = tl.load(rows + token), tl.minimum((split + 1) * share, length)
        keys = cache_k + row * stride + group * D + dims
        values = cache_v + row * stride + group * D + dims
        best = tl.full((REP_PAD,), float("-inf"), tl.float32)
        total = tl.zeros((REP_PAD,), tl.float32)
        acc = tl.zeros((REP_PAD, D_PAD), tl.float32)
        for start in range(split * share, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there, offset = (at[:, None] < end) & (dims < D), at[:, None] * (N_KV * D)
            k = tl.load(keys + offset, there, other=0.0).to(DOT)
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(at[None, :] < end, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            p, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(best - higher)
            best, total = higher, total * shrink + tl.sum(p, 1)
            v = tl.load(values + offset, there, other=0.0).to(DOT)
            acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        at = heads * splits + split
        tl.store(part + at[:, None] * D + dims, acc / total[:, None], mask)
        tl.store(lse + at, best + tl.log2(total), reps < N_REP)


@triton.jit(do_not_specialize=["splits"])
def _merge(out, part, lse, positions, splits, D: constexpr, BLOCK: constexpr):
    """Program (h, t): out[t, h], the parts that were written weighted by exp2(lse)."""
    token = tl.program_id(1)
    head = token * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(positions + token).to(tl.int32) + 1
    split, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, next_power_of_2(D))
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    used = (split < splits) & (split * share < length)
    at = head * splits + split
    logs = tl.load(lse + at, used, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    mask = used[:, None] & (dims[None, :] < D)
    parts = tl.load(part + at[:, None] * D + dims[None, :], mask, other=0.0)
    value = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * D + dims, value.to(out.dtype.element_ty), dims < D)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    get = torch.cuda.get_device_properties
    return get(device).multi_processor_count if device.type == "cuda" else 132


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    kernel[grid](*args, enable_fp_fusion=True, **meta)


def _launch_rows(kernel, weight: Tensor, rows: int, T: int, *args, **meta) -> None:
    """Launch with T programs for each `rows` rows of the weight."""
    (m, k), vec = weight.shape[-2:], 16 // weight.element_size()
    meta["BLOCK_K"] = min(32 * WARPS * vec, max(vec, next_power_of_2(k)))
    launch(kernel, (T, cdiv(m, rows)), *args, N=rows, VEC=vec, num_warps=WARPS, **meta)


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (T, K) times the transpose of weight (M, K), plus residual (T, M) if given."""
    T, (m, k) = len(x), weight.shape
    out = torch.empty(T, m, dtype=x.dtype, device=x.device)
    # Fewer rows a program if there are few in all, as in a gate.
    rows = min(ROWS, next_power_of_2(cdiv(m, 512)))
    _launch_rows(_linear, weight, rows, T, out, x, weight, residual, M=m, K=k)
    return out


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
    """Each token's experts of x (T, dim), as far as held here, weighted and summed.

    w1, w3 (n, hidden, dim) and w2 (n, dim, hidden) belong to experts first to
    first + n - 1; if int8, scales has a number of x's dtype for each row: s1, s2, s3.
    logits (T, E) are the gate's, E <= 64: a token's top_k choose and weigh its experts.
    residual (T, dim) is added if given, and out (T, dim) of any dtype is written to.
    """
    (T, dim), (n, hidden_dim, _) = x.shape, w1.shape
    hidden = torch.empty(T * top_k, hidden_dim, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x) if out is None else out
    s1, s2, s3 = scales or (None, None, None)
    sizes = {"DIM": dim, "HIDDEN": hidden_dim, "E": logits.shape[1], "TOP_K": top_k}
    sizes |= {"first": first, "held": n}
    _launch_rows(  # half of a program's rows are w1's, half w3's
        _moe_up, w1, ROWS // 2, T * top_k, hidden, x, logits, w1, w3, s1, s3, **sizes
    )
    # Triton 3.6 takes more registers for weights of 8 bits, of which a tile has more.
    rows = ROWS if scales is None else ROWS // 2
    _launch_rows(_moe_down, w2, rows, T, out, hidden, residual, logits, w2, s2, **sizes)
    return out


def rope_and_cache(
    qkv: Tensor,
    freqs_cis: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rows: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rotated queries (T, heads, D) of qkv, whose keys and values are cached.

    qkv is (T, (heads + 2 kv_heads) D), freqs_cis (max_seq_len, D / 2), and a cache
    (rows, max_seq_len, kv_heads, D), in which token t is at [rows[t], positions[t]].
    """
    T, (_, _, kv_heads, d) = len(qkv), cache_k.shape
    heads = qkv.shape[1] // d - 2 * kv_heads
    q = torch.empty(T, heads, d, dtype=qkv.dtype, device=qkv.device)
    freqs, stride = torch.view_as_real(freqs_cis), cache_k.stride(0)
    launch(
        _rope_and_cache, (heads + 2 * kv_heads, T),
        q, cache_k, cache_v, qkv, freqs, rows, positions, stride,
        HEADS=heads, N_KV=kv_heads, D=d, num_warps=1,
    )  # fmt: skip
    return q


def attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Attention (T, heads D) of q (T, heads, D) over 0..positions[t] of row rows[t]."""
    (T, heads, d), (_, max_seq_len, kv_heads, _) = q.shape, cache_k.shape
    n_rep, d_pad = heads // kv_heads, max(16, next_power_of_2(d))
    # A block is 8 KB of keys and 8 KB of values, three of them under way: 4 programs on
    # a multiprocessor. There are splits enough for that.
    block = max(16, 8192 // (d_pad * q.element_size()))
    splits = 4 * _multiprocessors(q.device) // (T * kv_heads)
    splits = max(1, min(splits, cdiv(max_seq_len, block), MAX_SPLITS.value))
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    part, lse = new(T, heads, splits, d), new(T, heads, splits)
    out, stride = torch.empty_like(q), cache_k.stride(0)
    scale = d**-0.5 * 1.4426950408889634  # log2(e), for a softmax to base 2
    # On the CPU, Triton's interpreter runs, which has no bfloat16 products.
    dot = "float32" if q.device.type == "cpu" else str(q.dtype).removeprefix("torch.")
    sizes = {"D": d, "BLOCK": block, "num_warps": 4}
    launch(
        _attend, (kv_heads, splits, T),
        part, lse, q, cache_k, cache_v, rows, positions, stride, scale,
        N_REP=n_rep, REP_PAD=max(16, next_power_of_2(n_rep)), N_KV=kv_heads,
        DOT=getattr(tl, dot), D_PAD=d_pad, num_stages=3, **sizes,
    )  # fmt: skip
    launch(_merge, (heads, T), out, part, lse, positions, splits, **sizes)
    return out.view(T, -1)
