"""What each kernel of mixtral/kernels.py computes, in plain PyTorch.

The functions have the names and arguments of that file's wrappers. All is computed in float32
and rounded once, where a kernel rounds.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.model import apply_rotary_emb


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (T, K) times the transpose of weight (M, K), plus residual (T, M) if given."""
    out = F.linear(x.float(), weight.float())
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)


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
    """The weighted sum (T, dim) of each token's experts, of those from `first` on that are held.

    Without residual and out the sums come back in float32: whoever wants them in x's type rounds
    them, and nothing is lost for an out that is wider.
    """
    chosen_logits, chosen = logits.float().topk(top_k)  # (T, top_k)
    weights = torch.zeros(logits.shape).to(logits.device)  # (T, E), zero where not chosen
    weights = weights.scatter(1, chosen, chosen_logits.softmax(dim=-1))
    weights = weights[:, first : first + len(w1)]  # (T, n), of the experts held
    s1, s2, s3 = scales or (None, None, None)
    # t is the token, e the expert, h a hidden number and d one of the model's width.
    gate = torch.einsum("td,ehd->teh", x.float(), dequantised(w1, s1))
    up = torch.einsum("td,ehd->teh", x.float(), dequantised(w3, s3))
    hidden = (F.silu(gate) * up).to(x.dtype).float()  # rounded, as the kernel stores it
    down = torch.einsum("teh,edh->ted", hidden, dequantised(w2, s2))
    sums = (down * weights[..., None]).sum(dim=1)  # (T, dim)
    if residual is not None:
        sums = sums + residual.float()
    if out is not None:
        return out.copy_(sums)
    if residual is not None:
        return sums.to(x.dtype)
    return sums


def dequantised(weight: Tensor, scale: Tensor | None) -> Tensor:
    """weight (n, rows, columns) in float32, each row multiplied by its scale (n, rows) if any."""
    if scale is None:
        return weight.float()
    return weight.float() * scale.float()[..., None]


def rope_and_cache(
    qkv: Tensor,
    freqs_cis: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rows: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rotated queries (T, heads, D) of qkv, whose rotated keys and values are cached."""
    kv_heads, head_dim = cache_k.shape[2:]
    by_head = qkv.view(len(qkv), -1, head_dim)
    heads = by_head.shape[1] - 2 * kv_heads
    q, k, v = by_head.split((heads, kv_heads, kv_heads), dim=1)
    factors = freqs_cis[positions, None]  # (T, 1, D / 2)
    cache_k[rows, positions] = apply_rotary_emb(k, factors)
    cache_v[rows, positions] = v
    return apply_rotary_emb(q, factors)


def attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Attention (T, heads D) of q (T, heads, D) over positions 0..positions[t] of row rows[t]."""
    out = []
    for query, row, last in zip(q.float(), rows.tolist(), positions.tolist()):
        k = cache_k[row, : last + 1].float().transpose(0, 1)  # (kv_heads, length, D)
        v = cache_v[row, : last + 1].float().transpose(0, 1)
        # One query, so no mask: the heads of a key head are as many queries of it.
        by_key_head = query.unflatten(0, (len(k), -1))  # (kv_heads, heads per key head, D)
        out.append(F.scaled_dot_product_attention(by_key_head, k, v).flatten())
    return torch.stack(out).to(q.dtype)
