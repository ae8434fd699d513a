"""Triton kernels for decode, steps of one token per cache row: time is bytes read.

No wrapper reads a value from a device, so a CUDA graph can hold a whole step. Sums are
float32. A tensor may have any stride on its first axis, as slices of a packed product
or of a stack have, and is dense within.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

# The tile of the weight reads is ROWS rows of 4 warps x 32 threads x 16 bytes, 1024 in
# bf16: a thread copies 16 bytes of each row to shared memory. STAGES - 1 tiles are on
# their way while one is summed, 32 KB a program, and 4 or 5 programs fit on a
# multiprocessor, where about 30 KB hide the memory's latency: so the few programs of a
# last wave still read fast. More rows share a read of x between them, which comes from
# L2 each time; fewer make more programs, of which `_moe_down` has 512 at batch 1.
ROWS, STAGES, WARPS, THREAD_BYTES = 8, 3, 4, 16


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
def _linear(out, x, weight, residual, X_STRIDE: constexpr, W_STRIDE: constexpr,
            M: constexpr, K: constexpr, N: constexpr, BLOCK_K: constexpr,
            VEC: constexpr, STAGES: constexpr):  # fmt: skip
    """Program (t, b): N numbers of out[t] of (T, M), by rows b N.. of weight (M, K).

    Tokens are the fastest axis: programs that start together read the same rows, and
    all but the first of them find these in L2.
    """
    token, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    rows = weight + tl.minimum(cols, M - 1) * W_STRIDE
    acc = _dots(rows, x + token * X_STRIDE, K, N, BLOCK_K, VEC, STAGES)
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


@triton.jit(do_not_specialize=["first"])
def _moe_up(hidden, x, logits, logits_stride, w1, w1_stride, w3, w3_stride, first, held,
            X_STRIDE: constexpr, DIM: constexpr, HIDDEN: constexpr, E: constexpr,
            TOP_K: constexpr, E_PAD: constexpr, N: constexpr, BLOCK_K: constexpr,
            VEC: constexpr, STAGES: constexpr):  # fmt: skip
    """Program (p, b): N numbers of hidden[p], by rows b N.. of w1 and w3.

    p is a pair (token, choice), hidden (T * TOP_K, HIDDEN). Pairs are the fastest axis,
    as tokens are in `_linear`. A program routes by itself: ranking E logits takes less
    than a launch. Where the expert is elsewhere it ends, and hidden[p] is not written.
    """
    pair, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    token = pair // TOP_K
    ids, rank, _ = _route(logits + token * logits_stride, E, TOP_K, E_PAD)
    expert = tl.sum(tl.where(rank == pair % TOP_K, ids, 0), 0).to(tl.int64) - first
    if (expert >= 0) & (expert < held):
        rows = tl.minimum(cols, HIDDEN - 1) * DIM
        gate = tl.zeros((N, BLOCK_K // VEC), tl.float32)
        up = tl.zeros((N, BLOCK_K // VEC), tl.float32)
        for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x + token * X_STRIDE + at, at < DIM, other=0.0)
            gate = _add_dots(gate, w1 + expert * w1_stride + rows, x_tile, at, DIM, VEC)
            up = _add_dots(up, w3 + expert * w3_stride + rows, x_tile, at, DIM, VEC)
        gate, up = tl.sum(gate, 1), tl.sum(up, 1)
        value = (gate / (1 + tl.exp(-gate)) * up).to(hidden.dtype.element_ty)
        tl.store(hidden + pair * HIDDEN + cols, value, cols < HIDDEN)


@triton.jit(do_not_specialize=["first"])
def _moe_down(out, hidden, residual, logits, logits_stride, w2, w2_stride, first, held,
              DIM: constexpr, HIDDEN: constexpr, E: constexpr, TOP_K: constexpr,
              E_PAD: constexpr, N: constexpr, BLOCK_K: constexpr, VEC: constexpr,
              STAGES: constexpr):  # fmt: skip
    """Program (t, b): N numbers of out[t], by rows b N.. of the w2 of t's experts.

    It adds up the choices in their order, so that the sum is the same each time.
    """
    token, cols = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    ids, rank, weights = _route(logits + token * logits_stride, E, TOP_K, E_PAD)
    rows = w2 + tl.minimum(cols, DIM - 1) * HIDDEN
    acc = tl.zeros((N, BLOCK_K // VEC), tl.float32)
    for choice in range(TOP_K):
        expert = tl.sum(tl.where(rank == choice, ids, 0), 0).to(tl.int64) - first
        if (expert >= 0) & (expert < held):
            weight = tl.sum(tl.where(rank == choice, weights, 0.0), 0)
            part, at = hidden + (token * TOP_K + choice) * HIDDEN, expert * w2_stride
            acc += weight * _dots(rows + at, part, HIDDEN, N, BLOCK_K, VEC, STAGES)
    _store_sums(out, acc, residual, token * DIM + cols, cols < DIM)


@triton.jit
def _rope_and_cache(q, cache_k, cache_v, xq, xk, xv, freqs, rows, positions, stride,
                    Q_STRIDE: constexpr, K_STRIDE: constexpr, V_STRIDE: constexpr,
                    HEADS: constexpr, N_KV: constexpr, D: constexpr,
                    PAIRS: constexpr):  # fmt: skip
    """Program (h, t): head h of token t's HEADS query, N_KV key and N_KV value heads.

    One warp reads D numbers of xq, xk or xv and writes q or t's own slot of a cache.
    """
    head, token = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    slot = tl.load(rows + token) * stride + position * (N_KV * D)
    if head < HEADS:
        source, target = xq + token * Q_STRIDE, q + token * (HEADS * D)
    elif head < HEADS + N_KV:
        head -= HEADS
        source, target = xk + token * K_STRIDE, cache_k + slot
    else:
        head -= HEADS + N_KV
        source, target = xv + token * V_STRIDE, cache_v + slot
    cols = 2 * tl.arange(0, PAIRS)[:, None] + tl.arange(0, 2)[None, :]
    x = tl.load(source + head * D + cols, cols < D)
    if tl.program_id(0) < HEADS + N_KV:
        a, b = tl.split(x.to(tl.float32))
        cos, sin = tl.split(tl.load(freqs + position * D + cols, cols < D))
        x = tl.join(a * cos - b * sin, a * sin + b * cos).to(x.dtype)
    tl.store(target + head * D + cols, x, cols < D)


@triton.jit
def _per_split(length, SPLITS: constexpr, BLOCK: constexpr):
    """Positions a split: an equal share of the length as it is now, in whole blocks."""
    return tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK


@triton.jit
def _attend(part, lse, q, cache_k, cache_v, rows, positions, k_stride, v_stride, scale,
            N_REP: constexpr, REP_PAD: constexpr, N_KV: constexpr, DOT: constexpr,
            D: constexpr, D_PAD: constexpr, SPLITS: constexpr,
            BLOCK: constexpr):  # fmt: skip
    """Program (g, s, t): t's N_REP query heads of key head g, on split s of positions.

    It writes part[t, heads, s] and lse[t, heads, s], the logarithm to base 2 of its
    softmax's sum. The heads are rows of one tensor-core tile, so that a key or value is
    read once for all. Key heads are the fastest axis: programs that start together read
    whole positions, N_KV * D numbers that lie side by side.
    """
    group, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + token).to(tl.int32) + 1
    share = _per_split(length, SPLITS, BLOCK)
    if split * share < length:
        reps, dims = tl.arange(0, REP_PAD), tl.arange(0, D_PAD)[None, :]
        heads = (token * N_KV + group) * N_REP + reps
        mask = (reps[:, None] < N_REP) & (dims < D)
        q_tile = tl.load(q + heads[:, None] * D + dims, mask, other=0.0).to(DOT)
        row, end = tl.load(rows + token), tl.minimum((split + 1) * share, length)
        keys = cache_k + row * k_stride + group * D + dims
        values = cache_v + row * v_stride + group * D + dims
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
        at = heads * SPLITS + split
        tl.store(part + at[:, None] * D + dims, acc / total[:, None], mask)
        tl.store(lse + at, best + tl.log2(total), reps < N_REP)


@triton.jit
def _merge(out, part, lse, positions, D: constexpr, D_PAD: constexpr,
           SPLITS: constexpr, SPLITS_PAD: constexpr, BLOCK: constexpr):  # fmt: skip
    """Program (h, t): out[t, h], its splits' part weighted by exp2(lse).

    Splits that lie beyond the length were not written and are not read.
    """
    token = tl.program_id(1)
    head = token * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(positions + token).to(tl.int32) + 1
    splits, dims = tl.arange(0, SPLITS_PAD), tl.arange(0, D_PAD)
    used = (splits < SPLITS) & (splits * _per_split(length, SPLITS, BLOCK) < length)
    at = head * SPLITS + splits
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


def _launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Run a kernel on its first argument's device; refuse tensors it cannot index."""
    for x in args:
        if isinstance(x, Tensor) and x.dim() > 1 and not x[0].is_contiguous():
            raise ValueError(f"{tuple(x.shape)} by {x.stride()} is not dense inside")
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def _tile(x: Tensor, k: int, rows: int) -> dict[str, int]:
    """Meta-parameters of a kernel that reads tiles of weight rows of k numbers."""
    vec = THREAD_BYTES // x.element_size()
    block_k = min(32 * WARPS * vec, max(vec, triton.next_power_of_2(k)))
    return {
        "N": rows,
        "BLOCK_K": block_k,
        "VEC": vec,
        "STAGES": STAGES,
        "num_warps": WARPS,
    }


def linear_decode(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (T, k) @ weight.T, of (m, k), plus residual (T, m) if given: one launch."""
    (T, k), m = x.shape, len(weight)
    out = torch.empty(T, m, dtype=x.dtype, device=x.device)
    residual = None if residual is None else residual.contiguous()
    # Fewer rows a program where there are few, as of a gate.
    rows = min(ROWS, triton.next_power_of_2(triton.cdiv(m, 512)))
    sizes = {"X_STRIDE": x.stride(0), "W_STRIDE": weight.stride(0), "M": m, "K": k}
    args, meta = (out, x, weight, residual), sizes | _tile(x, k, rows)
    _launch(_linear, (T, triton.cdiv(m, rows)), *args, **meta)
    return out


def moe_decode(
    x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, first_expert: int,
    top_k: int, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum of weight * expert(x) over a token's experts held here, (T, dim): 2 launches.

    x is (T, dim), logits (T, E), E <= 64, the router's: a softmax over the top_k of
    them is the weights. w1 and w3 (n, hidden, dim) and w2 (n, dim, hidden) are experts
    first_expert to first_expert + n - 1. residual (T, dim), if given, is added.
    """
    (T, dim), E, (n, hidden_dim, _) = x.shape, logits.shape[1], w1.shape
    hidden = torch.empty(T * top_k, hidden_dim, dtype=x.dtype, device=x.device)
    out = torch.empty(T, dim, dtype=x.dtype, device=x.device)
    residual = None if residual is None else residual.contiguous()
    sizes = {"DIM": dim, "HIDDEN": hidden_dim, "E": E, "TOP_K": top_k}
    sizes["E_PAD"] = triton.next_power_of_2(E)
    rows, stride, held = ROWS // 2, logits.stride(0), (first_expert, n)  # of w1 and w3
    up = (hidden, x, logits, stride, w1, w1.stride(0), w3, w3.stride(0), *held)
    meta = dict(X_STRIDE=x.stride(0), **sizes, **_tile(x, dim, rows))
    _launch(_moe_up, (T * top_k, triton.cdiv(hidden_dim, rows)), *up, **meta)
    down = (out, hidden, residual, logits, stride, w2, w2.stride(0), *held)
    meta = sizes | _tile(x, hidden_dim, ROWS)
    _launch(_moe_down, (T, triton.cdiv(dim, ROWS)), *down, **meta)
    return out


def rope_and_cache(
    xq: Tensor, xk: Tensor, xv: Tensor, freqs_cis: Tensor,
    cache_k: Tensor, cache_v: Tensor, rows: Tensor, positions: Tensor,
) -> Tensor:  # fmt: skip
    """Turned xq (T, heads, head_dim); turned xk and xv go to the caches: one launch.

    Token t's slot is [rows[t], positions[t]] of (rows, max_seq_len, kv_heads, head_dim)
    and freqs_cis[positions[t]], complex64, turns its pairs (x[2i], x[2i + 1]).
    """
    (T, heads, d), kv_heads, stride = xq.shape, xk.shape[1], cache_k.stride(0)
    if cache_v.stride(0) != stride:
        raise ValueError("the caches of keys and of values differ in layout")
    q = torch.empty(xq.shape, dtype=xq.dtype, device=xq.device)
    freqs = torch.view_as_real(freqs_cis)
    args = (q, cache_k, cache_v, xq, xk, xv, freqs, rows, positions, stride)
    meta = {
        "Q_STRIDE": xq.stride(0),
        "K_STRIDE": xk.stride(0),
        "V_STRIDE": xv.stride(0),
    }
    meta |= {
        "HEADS": heads,
        "N_KV": kv_heads,
        "D": d,
        "PAIRS": triton.next_power_of_2(d // 2),
    }
    _launch(_rope_and_cache, (heads + 2 * kv_heads, T), *args, **meta, num_warps=1)
    return q


def decode_attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Attention of q (T, heads, head_dim) over positions 0..positions[t]: 2 launches.

    They are those of row rows[t] of the caches (rows, max_seq_len, kv_heads, head_dim).
    """
    (T, heads, d), (_, max_seq_len, kv_heads, _) = q.shape, cache_k.shape
    d_pad = max(16, triton.next_power_of_2(d))
    # A block is 8 KB of keys and 8 KB of values, three of them under way: 4 programs on
    # a multiprocessor. Splits enough for that, but no more than merge in registers.
    block = max(16, 8192 // (d_pad * q.element_size()))
    splits = 4 * _multiprocessors(q.device) // (T * kv_heads)
    splits = max(1, min(splits, triton.cdiv(max_seq_len, block), 64))
    new = functools.partial(torch.empty, device=q.device)
    part = new(T, heads, splits, d, dtype=torch.float32)
    lse, out = new(T, heads, splits, dtype=torch.float32), new(q.shape, dtype=q.dtype)
    sizes = {"D": d, "D_PAD": d_pad, "SPLITS": splits, "BLOCK": block, "num_warps": 4}
    # On the CPU runs Triton's interpreter, which has no bfloat16 products.
    dot = torch.float32 if q.device.type == "cpu" else q.dtype
    meta = dict(N_REP=heads // kv_heads, N_KV=kv_heads, num_stages=3, **sizes)
    meta["REP_PAD"] = max(16, triton.next_power_of_2(heads // kv_heads))
    meta["DOT"] = getattr(tl, str(dot).removeprefix("torch."))
    scale = d**-0.5 * 1.4426950408889634  # log2(e), for a softmax to base 2
    args = (part, lse, q, cache_k, cache_v, rows, positions)
    args += (cache_k.stride(0), cache_v.stride(0), scale)
    _launch(_attend, (kv_heads, splits, T), *args, **meta)
    sizes["SPLITS_PAD"] = triton.next_power_of_2(splits)
    _launch(_merge, (heads, T), out, part, lse, positions, **sizes)
    return out
