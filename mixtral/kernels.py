"""Triton kernels for the decode step: one new token a row, whose time is bytes read.

Tensors are dense and on the current device. No wrapper reads a value from a device, so
a CUDA graph can hold a whole step, and no kernel is compiled anew for another number of
tokens. Sums are float32.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

# Weights are read in tiles of ROWS rows and 4 warps x 32 threads x 16 bytes of each, as
# a thread copies 16 bytes of a row to shared memory at once. STAGES - 1 tiles are under
# way while one is summed, 32 KB a program, and 3 to 5 programs fit on a multiprocessor,
# where about 30 KB hide the latency of memory: so even a last wave of few programs
# reads fast. More rows would share each read of x, which comes from L2; fewer would
# make more programs, of which `_moe_down` has 512 for one token.
ROWS, STAGES, WARPS, THREAD_BYTES = 8, 3, 4, 16

MAX_SPLITS = 64  # of the positions that attention reads, to be merged in registers


@triton.jit
def _add_dots(acc, rows, x, cols, K: constexpr, VEC: constexpr):
    """acc (N, BLOCK_K / VEC) plus products of weight rows, at N pointers, with tile x.

    A thread sums the VEC neighbours that it copied at once, and threads first meet in
    the sum over acc's second axis that is left to the caller.
    """
    tile = rows[:, None] + cols[None, :]
    tile = tl.load(tile, cols[None, :] < K, other=0.0, eviction_policy="evict_first")
    products = tile.to(tl.float32) * x.to(tl.float32)[None, :]
    return acc + tl.sum(tl.reshape(products, (acc.shape[0], acc.shape[1], VEC)), 2)


@triton.jit
def _dots(rows, x, K: constexpr, N: constexpr, BLOCK_K: constexpr, VEC: constexpr,
          STAGES: constexpr):  # fmt: skip
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
            BLOCK_K: constexpr, VEC: constexpr, STAGES: constexpr):  # fmt: skip
    """Program (t, b): N numbers of out[t] of (T, M), from rows b N.. of weight (M, K).

    Tokens are the fastest axis: programs that start together read the same rows, and
    all but the first of them find these in L2.
    """
    token, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    rows = weight + tl.minimum(cols, M - 1) * K
    acc = _dots(rows, x + token * K, K, N, BLOCK_K, VEC, STAGES)
    _store_sums(out, acc, residual, token * M + cols, cols < M)


@triton.jit
def _route(logits, E: constexpr, TOP_K: constexpr, E_PAD: constexpr):
    """Ids, ranks by logit (of equals the lower id first) and weights of the TOP_K."""
    ids = tl.arange(0, E_PAD)
    scores = tl.load(logits + ids, ids < E, other=float("-inf")).to(tl.float32)
    ahead = (scores[None, :] == scores[:, None]) & (ids[None, :] < ids[:, None])
    ahead = ahead | (scores[None, :] > scores[:, None])
    rank = tl.sum(ahead.to(tl.int32), 1)
    odds = tl.where(rank < TOP_K, tl.exp(scores - tl.max(scores, 0)), 0.0)
    return ids, rank, odds / tl.sum(odds, 0)


@triton.jit(do_not_specialize=["first", "held"])
def _moe_up(hidden, x, logits, w1, w3, s1, s3, first, held, DIM: constexpr,
            HIDDEN: constexpr, E: constexpr, TOP_K: constexpr, E_PAD: constexpr,
            N: constexpr, BLOCK_K: constexpr, VEC: constexpr,
            STAGES: constexpr):  # fmt: skip
    """Program (p, b): N numbers of hidden[p], from rows b N.. of w1 and w3.

    p is a (token, choice) pair, hidden (T * TOP_K, HIDDEN). Pairs are the fastest axis,
    as tokens are in `_linear`. Every program does the routing itself: ranking E logits
    takes less time than a launch. If the expert is on another device, hidden[p] is not
    written.
    """
    pair, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    token = pair // TOP_K
    ids, rank, _ = _route(logits + token * E, E, TOP_K, E_PAD)
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
              HIDDEN: constexpr, E: constexpr, TOP_K: constexpr, E_PAD: constexpr,
              N: constexpr, BLOCK_K: constexpr, VEC: constexpr,
              STAGES: constexpr):  # fmt: skip
    """Program (t, b): N numbers of out[t], from rows b N.. of the w2 of t's experts.

    The choices are added in their order, so that the sum is the same every time.
    """
    token, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    ids, rank, weights = _route(logits + token * E, E, TOP_K, E_PAD)
    acc = tl.zeros((N, BLOCK_K // VEC), tl.float32)
    for choice in range(TOP_K):
        expert = tl.sum(tl.where(rank == choice, ids, 0), 0).to(tl.int64) - first
        if (expert >= 0) & (expert < held):
            weight = tl.sum(tl.where(rank == choice, weights, 0.0), 0)
            row = expert * DIM + tl.minimum(cols, DIM - 1)
            if s2 is not None:
                weight *= tl.load(s2 + row).to(tl.float32)[:, None]
            rows, part = w2 + row * HIDDEN, hidden + (token * TOP_K + choice) * HIDDEN
            acc += weight * _dots(rows, part, HIDDEN, N, BLOCK_K, VEC, STAGES)
    _store_sums(out, acc, residual, token * DIM + cols, cols < DIM)


@triton.jit
def _rope_and_cache(q, cache_k, cache_v, qkv, freqs, rows, positions, stride,
                    HEADS: constexpr, N_KV: constexpr, D: constexpr,
                    PAIRS: constexpr):  # fmt: skip
    """Program (h, t): head h of token t's HEADS query, N_KV key and N_KV value heads.

    One warp reads the head's D numbers and writes them to q or to t's slot of a cache.
    """
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
    cols = 2 * tl.arange(0, PAIRS)[:, None] + tl.arange(0, 2)[None, :]
    x = tl.load(source + cols, cols < D)
    if head < HEADS + N_KV:
        a, b = tl.split(x.to(tl.float32))
        cos, sin = tl.split(tl.load(freqs + position * D + cols, cols < D))
        x = tl.join(a * cos - b * sin, a * sin + b * cos).to(x.dtype)
    tl.store(target + cols, x, cols < D)


@triton.jit
def _per_split(length, splits, BLOCK: constexpr):
    """Positions a split: an equal share of the present length, in whole blocks."""
    return tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK


@triton.jit
def _attend(part, lse, q, cache_k, cache_v, rows, positions, stride, scale,
            N_REP: constexpr, REP_PAD: constexpr, N_KV: constexpr, DOT: constexpr,
            D: constexpr, D_PAD: constexpr, BLOCK: constexpr):  # fmt: skip
    """Program (g, s, t): t's N_REP query heads of key head g, on split s of positions.

    It writes part[t, heads, s] and lse[t, heads, s], the logarithm to base 2 of its
    softmax's sum. The heads are rows of one tensor-core tile, so that a key or value is
    read once for all of them. Key heads are the fastest axis: programs that start
    together read whole positions, N_KV * D consecutive numbers.
    """
    group, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + token).to(tl.int32) + 1
    splits = tl.num_programs(1)
    share = _per_split(length, splits, BLOCK)
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
def _merge(out, part, lse, positions, splits, D: constexpr, D_PAD: constexpr,
           MAX_SPLITS: constexpr, BLOCK: constexpr):  # fmt: skip
    """Program (h, t): out[t, h], the parts of its splits weighted by exp2(lse).

    Splits beyond the length were not written and are not read.
    """
    token = tl.program_id(1)
    head = token * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(positions + token).to(tl.int32) + 1
    split, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, D_PAD)
    used = (split < splits) & (split * _per_split(length, splits, BLOCK) < length)
    at = head * splits + split
    logs = tl.load(lse + at, used, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    mask = used[:, None] & (dims[None, :] < D)
    parts = tl.load(part + at[:, None] * D + dims[None, :], mask, other=0.0)
    value = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * D + dims, value.to(out.dtype.element_ty), dims < D)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    kernel[grid](*args, enable_fp_fusion=True, **meta)


def _tile(weight: Tensor, rows: int) -> dict[str, int]:
    """Meta-parameters of a kernel that reads the weight's rows in tiles."""
    vec, width = THREAD_BYTES // weight.element_size(), weight.shape[-1]
    block_k = min(32 * WARPS * vec, max(vec, triton.next_power_of_2(width)))
    sizes = {"N": rows, "BLOCK_K": block_k, "VEC": vec}
    return sizes | {"STAGES": STAGES, "num_warps": WARPS}


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (T, K) times the transpose of weight (M, K), plus residual (T, M) if given."""
    T, (m, k) = len(x), weight.shape
    out = torch.empty(T, m, dtype=x.dtype, device=x.device)
    # Fewer rows a program if there are few in all, as in a gate.
    tile = _tile(weight, min(ROWS, triton.next_power_of_2(triton.cdiv(m, 512))))
    grid = (T, triton.cdiv(m, tile["N"]))
    launch(_linear, grid, out, x, weight, residual, M=m, K=k, **tile)
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

    w1 and w3 (n, hidden, dim) and w2 (n, dim, hidden) are experts first to
    first + n - 1. If they are int8, scales are s1, s2 and s3: a number of x's dtype for
    each row, (n, hidden), (n, dim) and (n, hidden). logits (T, E), E <= 64, are the gate's: the softmax of a token's
    top_k of them weighs its experts. residual (T, dim) is added if given, and the
    result written to out (T, dim), of any dtype, if given. Two launches.
    """
    (T, dim), (n, hidden_dim, _), E = x.shape, w1.shape, logits.shape[1]
    hidden = torch.empty(T * top_k, hidden_dim, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x) if out is None else out
    sizes = {"DIM": dim, "HIDDEN": hidden_dim, "E": E, "TOP_K": top_k}
    sizes["E_PAD"] = triton.next_power_of_2(E)
    s1, s2, s3 = scales or (None, None, None)
    tile = sizes | _tile(w1, ROWS // 2)  # of w1 and as much of w3
    grid = (T * top_k, triton.cdiv(hidden_dim, tile["N"]))
    launch(_moe_up, grid, hidden, x, logits, w1, w3, s1, s3, first, n, **tile)
    tile = sizes | _tile(w2, ROWS)
    grid = (T, triton.cdiv(dim, tile["N"]))
    launch(_moe_down, grid, out, hidden, residual, logits, w2, s2, first, n, **tile)
    return out


def rope_and_cache(
    qkv: Tensor,
    freqs_cis: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rows: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rotated queries (T, n_heads, head_dim) of qkv, whose keys and values are cached.

    qkv is (T, (n_heads + 2 n_kv_heads) head_dim), freqs_cis (max_seq_len, head_dim / 2)
    and a cache (rows, max_seq_len, n_kv_heads, head_dim), in which token t's slot is
    [rows[t], positions[t]]. One launch.
    """
    T, (_, max_seq_len, kv_heads, d) = len(qkv), cache_k.shape
    heads = qkv.shape[1] // d - 2 * kv_heads
    q = torch.empty(T, heads, d, dtype=qkv.dtype, device=qkv.device)
    freqs, stride = torch.view_as_real(freqs_cis), max_seq_len * kv_heads * d
    sizes = {"HEADS": heads, "N_KV": kv_heads, "D": d, "num_warps": 1}
    sizes["PAIRS"] = triton.next_power_of_2(d // 2)
    launch(
        _rope_and_cache, (heads + 2 * kv_heads, T),
        q, cache_k, cache_v, qkv, freqs, rows, positions, stride, **sizes,
    )  # fmt: skip
    return q


def attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Attention of q (T, n_heads, head_dim) over positions 0..positions[t] of a row.

    The row of token t is rows[t] of the caches. Returns (T, n_heads head_dim) after
    two launches.
    """
    (T, heads, d), (_, max_seq_len, kv_heads, _) = q.shape, cache_k.shape
    d_pad = max(16, triton.next_power_of_2(d))
    # A block is 8 KB of keys and 8 KB of values, three of them under way: 4 programs on
    # a multiprocessor. There are splits enough for that.
    block = max(16, 8192 // (d_pad * q.element_size()))
    splits = 4 * _multiprocessors(q.device) // (T * kv_heads)
    splits = max(1, min(splits, triton.cdiv(max_seq_len, block), MAX_SPLITS))
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    part, lse = new(T, heads, splits, d), new(T, heads, splits)
    out = torch.empty_like(q)
    sizes = {"D": d, "D_PAD": d_pad, "BLOCK": block, "num_warps": 4}
    # On the CPU, Triton's interpreter runs, which has no bfloat16 products.
    dot = torch.float32 if q.device.type == "cpu" else q.dtype
    meta = {"N_REP": heads // kv_heads, "N_KV": kv_heads, "num_stages": 3}
    meta["REP_PAD"] = max(16, triton.next_power_of_2(heads // kv_heads))
    meta["DOT"] = getattr(tl, str(dot).removeprefix("torch."))
    scale = d**-0.5 * 1.4426950408889634  # log2(e), for a softmax to base 2
    stride = max_seq_len * kv_heads * d
    launch(
        _attend, (kv_heads, splits, T),
        part, lse, q, cache_k, cache_v, rows, positions, stride, scale,
        **meta, **sizes,
    )  # fmt: skip
    meta = sizes | {"MAX_SPLITS": MAX_SPLITS}
    launch(_merge, (heads, T), out, part, lse, positions, splits, **meta)
    return out.view(T, -1)
