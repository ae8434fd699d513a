"""Mixtral: Llama's transformer with a sparse mixture of experts as its feed-forward layer.

Read top to bottom: attention as in Llama 2, then `MoE`, then `Transformer`, which puts the experts of every
layer on a list of devices. Tokens of all rows lie end to end in one (T, dim) tensor, without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right


@dataclass
class ModelArgs:
    """Sizes of a model, 8x7B's where not given, and of its cache: max_batch_size rows of max_seq_len positions."""

    dim: int = 4096
    n_layers: int = 32
    head_dim: int = 128
    hidden_dim: int = 14336
    n_heads: int = 32
    n_kv_heads: int = 8
    norm_eps: float = 1e-5
    vocab_size: int = 32000
    num_experts: int = 8
    num_experts_per_tok: int = 2
    rope_theta: float = 1e6
    max_batch_size: int = 4
    max_seq_len: int = 4096


class Span(NamedTuple):
    """`length` new tokens of cache row `row`, the first of them at position `start`."""

    row: int
    start: int
    length: int


class Batch(NamedTuple):
    """Where the T tokens of one forward stand in the cache; spans says it to the host, the tensors to the device."""

    spans: Sequence[Span]
    rows: Tensor  # (T,)
    positions: Tensor  # (T,)


class Linear(nn.Module):
    """x @ weight.T, on a weight that was allocated elsewhere: it may be a slice of a larger one."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def precompute_freqs_cis(head_dim: int, end: int, theta: float) -> Tensor:
    """Rotary factors e^(i m theta^(-2j / head_dim)) of position m, pair j: complex64 (end, head_dim / 2).

    Rotary position embedding: Su et al., https://arxiv.org/abs/2104.09864.
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (T, heads, head_dim), in float32, by freqs_cis (T, head_dim / 2)."""
    pairs = torch.view_as_complex(
        x.float().unflatten(-1, (-1, 2))
    )  # (T, heads, head_dim / 2)
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention over a cache of keys and values, all of it on one device."""

    def __init__(self, args: ModelArgs, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = (
            args.n_heads,
            args.n_kv_heads,
            args.head_dim,
        )
        self.widths = (
            args.n_heads * args.head_dim,
            args.n_kv_heads * args.head_dim,
            args.n_kv_heads * args.head_dim,
        )
        # wq, wk and wv are slices of one matrix, so that they are one product.
        self.wqkv = torch.empty(sum(self.widths), args.dim, dtype=dtype, device=device)
        self.wq, self.wk, self.wv = map(Linear, self.wqkv.split(self.widths))
        self.wo = Linear(
            torch.empty(args.dim, self.widths[0], dtype=dtype, device=device)
        )
        cache = (args.max_batch_size, args.max_seq_len, args.n_kv_heads, args.head_dim)
        self.cache_k = torch.empty(cache, dtype=dtype, device=device)
        self.cache_v = torch.empty(cache, dtype=dtype, device=device)

    def forward(self, x: Tensor, freqs_cis: Tensor, batch: Batch) -> Tensor:
        qkv = F.linear(x, self.wqkv).view(
            len(x), -1, self.head_dim
        )  # (T, n_heads + 2 n_kv_heads, head_dim)
        xqk, xv = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=1)
        xq, xk = apply_rotary_emb(xqk, freqs_cis).split(
            (self.n_heads, self.n_kv_heads), dim=1
        )
        self.cache_k[batch.rows, batch.positions] = xk
        self.cache_v[batch.rows, batch.positions] = xv
        out = [
            self.attend(q, span)
            for q, span in zip(xq.split([s.length for s in batch.spans]), batch.spans)
        ]
        return self.wo(torch.cat(out).flatten(1))

    def attend(self, q: Tensor, span: Span) -> Tensor:
        """Attention of one row's new queries (length, n_heads, head_dim) over all that row holds up to them."""
        end = span.start + span.length
        k = self.cache_k[span.row, :end].transpose(0, 1)  # (n_kv_heads, end, head_dim)
        v = self.cache_v[span.row, :end].transpose(0, 1)
        # The query heads that share a key head are queries of one head when there is one position and so no mask,
        # and a batch over an expanded, never copied, key when there are several.
        if span.length == 1:
            q = q.view(
                1, self.n_kv_heads, -1, self.head_dim
            )  # (1, n_kv_heads, n_rep, head_dim)
            return F.scaled_dot_product_attention(q, k[None], v[None]).view(
                1, self.n_heads, self.head_dim
            )
        q = q.unflatten(1, (self.n_kv_heads, -1)).permute(
            2, 1, 0, 3
        )  # (n_rep, n_kv_heads, length, head_dim)
        k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(span.length, end)
        )
        return out.permute(2, 1, 0, 3).flatten(1, 2)  # (length, n_heads, head_dim)


class FeedForward(nn.Module):
    """One expert: SwiGLU (Shazeer, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(w1), Linear(w2), Linear(w3)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """Sparse mixture of experts: each token goes to the experts with its highest gate logits, no token is dropped.

    The experts are spread over the devices in order, equally many on each. A device is sent every token with its
    logits, in one copy, finds its experts' share by itself, and sends back one partial sum.
    """

    def __init__(
        self, args: ModelArgs, devices: Sequence[torch.device], dtype: torch.dtype
    ):
        super().__init__()
        self.dim, self.num_experts, self.top_k = (
            args.dim,
            args.num_experts,
            args.num_experts_per_tok,
        )
        self.devices, self.n_local = devices, args.num_experts // len(devices)
        self.gate = Linear(
            torch.empty(args.num_experts, args.dim, dtype=dtype, device=devices[0])
        )
        self.experts = nn.ModuleList()
        up, down = (args.hidden_dim, args.dim), (args.dim, args.hidden_dim)
        for device in devices:
            stacks = (
                torch.empty(self.n_local, *shape, dtype=dtype, device=device)
                for shape in (up, down, up)
            )
            self.experts.extend(map(FeedForward, *stacks))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        sent = [(x, logits)]
        if len(self.devices) > 1:
            packed = torch.cat((x, logits), dim=-1)
            copies = [
                packed.to(device, non_blocking=True) for device in self.devices[1:]
            ]
            sent += [
                copy.split((self.dim, self.num_experts), dim=-1) for copy in copies
            ]
        # Where nothing may wait for the host, it never learns who chose what; else it counts, once for all devices.
        counts = None if x.is_cuda and len(x) <= 16 else self.count(logits)
        partial = [
            self.local_experts(i, *sent[i], counts) for i in reversed(range(len(sent)))
        ]
        return sum(
            (p.to(x.device, non_blocking=True) for p in partial[:-1]), partial[-1]
        )

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights, float32, and ids of each token's experts: both (T, top_k)."""
        logits, selected = torch.topk(logits.float(), self.top_k)
        return logits.softmax(dim=-1), selected

    def count(self, logits: Tensor) -> list[int]:
        """How many tokens chose each expert: a wait for the device, the only one of the layer."""
        _, selected = self.route(logits)
        return (
            (
                selected[..., None]
                == torch.arange(self.num_experts, device=logits.device)
            )
            .sum((0, 1))
            .tolist()
        )

    def local_experts(
        self, i: int, x: Tensor, logits: Tensor, counts: list[int] | None
    ) -> Tensor:
        """The sum over device i's experts of weight * expert(x), for all tokens: (T, dim)."""
        first = i * self.n_local
        experts = self.experts[first : first + self.n_local]
        weights, selected = self.route(logits)
        if counts is None:
            dense = torch.zeros_like(logits, dtype=torch.float32).scatter(
                1, selected, weights
            )[:, first:]
            return sum(
                w[:, None] * expert(x) for w, expert in zip(dense.unbind(1), experts)
            ).type_as(x)
        # (token, choice) pairs sorted by expert: each expert works once, on a slice.
        pairs = selected.flatten().argsort(stable=True)[sum(counts[:first]) :]
        counts = counts[first : first + self.n_local]
        pairs = pairs[: sum(counts)]
        chosen = [
            e(part)
            for e, part in zip(experts, x[pairs // self.top_k].split(counts))
            if len(part)
        ]
        out = x.new_zeros(len(x) * self.top_k, self.dim)
        if chosen:
            out[pairs] = torch.cat(chosen)
        return (
            (out.view(len(x), self.top_k, self.dim) * weights[..., None])
            .sum(1)
            .type_as(x)
        )


class TransformerBlock(nn.Module):
    def __init__(
        self, args: ModelArgs, devices: Sequence[torch.device], dtype: torch.dtype
    ):
        super().__init__()
        self.attention = Attention(args, devices[0], dtype)
        self.feed_forward = MoE(args, devices, dtype)
        self.attention_norm = RMSNorm(
            torch.empty(args.dim, dtype=dtype, device=devices[0]), args.norm_eps
        )
        self.ffn_norm = RMSNorm(
            torch.empty(args.dim, dtype=dtype, device=devices[0]), args.norm_eps
        )

    def forward(self, x: Tensor, freqs_cis: Tensor, batch: Batch) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, batch)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The whole model, its weights allocated but not filled, under the names of the published checkpoint.

    Expert e of every layer is on devices[e // (num_experts / len(devices))], all else on devices[0]. A device may
    be named more than once. Raises ValueError where the experts do not divide among the devices.
    """

    def __init__(
        self,
        params: ModelArgs,
        devices: Sequence[str | torch.device] = ("cpu",),
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        devices = [torch.device(device) for device in devices]
        if not devices or params.num_experts % len(devices):
            raise ValueError(
                f"{params.num_experts} experts cannot be shared equally by {len(devices)} devices"
            )
        self.params, self.device = params, devices[0]
        self.tok_embeddings = nn.Embedding.from_pretrained(
            torch.empty(params.vocab_size, params.dim, dtype=dtype, device=self.device)
        )
        self.layers = nn.ModuleList(
            TransformerBlock(params, devices, dtype) for _ in range(params.n_layers)
        )
        self.norm = RMSNorm(
            torch.empty(params.dim, dtype=dtype, device=self.device), params.norm_eps
        )
        self.output = Linear(
            torch.empty(params.vocab_size, params.dim, dtype=dtype, device=self.device)
        )
        self.freqs_cis = precompute_freqs_cis(
            params.head_dim, params.max_seq_len, params.rope_theta
        ).to(self.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int | Sequence[int] = 0) -> Tensor:
        """Logits, float32 (bsz, seqlen, vocab), after each of tokens (bsz, seqlen).

        start_pos is the position of each row's first token, or one for all rows; what precedes it is in the cache.
        """
        bsz, seqlen = tokens.shape
        starts = [start_pos] * bsz if isinstance(start_pos, int) else start_pos
        spans = [Span(row, start, seqlen) for row, start in enumerate(starts)]
        return self.forward_packed(tokens.flatten(), spans).view(bsz, seqlen, -1)

    @torch.inference_mode()
    def forward_packed(
        self, tokens: Tensor, spans: Sequence[Span], last_only: bool = False
    ) -> Tensor:
        """Logits, float32 (T, vocab), of spans laid end to end; with last_only those after each span's end alone."""
        rows = torch.tensor(
            [s.row for s in spans for _ in range(s.length)], device=self.device
        )
        positions = torch.tensor(
            [p for s in spans for p in range(s.start, s.start + s.length)],
            device=self.device,
        )
        batch = Batch(spans, rows, positions)
        h = self.tok_embeddings(tokens.to(self.device))  # (T, dim)
        freqs_cis = self.freqs_cis[positions]
        for layer in self.layers:
            h = layer(h, freqs_cis, batch)
        if last_only and len(h) > len(spans):
            ends = torch.tensor([s.length for s in spans]).cumsum(0) - 1
            h = h[ends.to(self.device)]
        return self.output(self.norm(h)).float()
