"""Mixtral: Llama's transformer with a sparse mixture of experts in every layer.

It reads from top to bottom: attention as in Llama 2, `MoE` in the place of the
feed-forward layer, and `Transformer`. The T tokens of a pass, of one row of the cache or
of many, lie end to end in one (T, dim) tensor without padding. This is plain PyTorch for
any device; decode.py makes GPUs fast at one new token a row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's is left out: it prepares itself anew for every length of a prompt.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
ATTENTION += [SDPBackend.MATH]

# A GPU processes slices of at least so many tokens even if their expert is in host
# memory. Its weights, 352 MB in 8x7B, cross in 30 to 60 ms, in which a processor of
# 1 TFLOP/s processes about as many tokens. (An estimate, not measured.)
MOVE_WEIGHTS = 128


@dataclass(frozen=True)
class ModelArgs:
    """The sizes of a model, by default 8x7B's, and of its cache of keys and values.

    Raises ValueError for sizes that no Mixtral can have.
    """

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

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), "a whole number from 1 to 2**31"
            good = type(value) is int and 0 < value < 2**31
            if field.type is float:
                kind = "a finite number above 0"
                good = type(value) in (int, float) and 0 < value < 1e300
            if not good:
                raise ValueError(f"{field.name} must be {kind}, not {value!r:.40}")
        if self.head_dim % 2 or self.n_heads % self.n_kv_heads:
            raise ValueError("head_dim must be even, n_heads a multiple of n_kv_heads")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError("num_experts_per_tok must be at most num_experts")
        if self.norm_eps > 0.1 or self.rope_theta < 1:
            raise ValueError("norm_eps must be at most 0.1, rope_theta at least 1")


class Span(NamedTuple):
    """`length` new tokens of cache row `row`, the first of them at position `start`."""

    row: int
    start: int
    length: int


class Batch(NamedTuple):
    """Where the T tokens of a pass belong."""

    spans: Sequence[Span]
    rows: Tensor  # (T,)
    positions: Tensor  # (T,)
    freqs_cis: Tensor  # (T, 1, head_dim / 2)


class Linear(nn.Module):
    """A bias-free linear layer whose weight may be a slice of a larger tensor.

    A weight of type int8 has a scale for each of its rows.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device)  # it may be in host memory
        if self.scale is None:
            return linear(x, weight)
        return linear_int8(x, weight, self.scale.to(x.device))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, in_features) times the transpose of weight (out_features, in_features)."""
    onednn = torch.backends.mkldnn
    if len(x) > 1 or x.is_cuda or not onednn.enabled:
        return F.linear(x, weight)
    # For a single row PyTorch's own kernel is twice as fast as oneDNN, which repacks
    # the weight at every call. From two rows on oneDNN is as fast or faster.
    onednn.enabled = False
    try:
        return F.linear(x, weight)
    finally:
        onednn.enabled = True


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """linear() for a weight whose rows are multiplied by scale (out_features,)."""
    # PyTorch's 8-bit product reads rows in steps of 16 bytes, even beyond their end.
    if x.is_cuda or len(x) > 32 or weight.shape[1] % 16:
        return F.linear(x, weight.to(x.dtype)) * scale
    return torch._weight_int8pack_mm(x, weight, scale)


def precompute_freqs_cis(head_dim: int, end: int, theta: float) -> Tensor:
    """Rotary factors e^(i m theta^(-2j / head_dim)), complex64 (end, head_dim / 2).

    m is the position and j the pair: https://arxiv.org/abs/2104.09864.
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (T, heads, head_dim), in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:2], -1, 2))
    return torch.view_as_real(pairs * freqs_cis).view(x.shape).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention over a cache of keys and values."""

    def __init__(self, args: ModelArgs, factory: dict):
        super().__init__()
        empty = functools.partial(torch.empty, **factory)
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim = args.head_dim
        sizes = [n * args.head_dim for n in (args.n_heads, *[args.n_kv_heads] * 2)]
        # wq, wk and wv are slices of one matrix, so that one product serves all three.
        self.wqkv = empty(sum(sizes), args.dim)
        self.wq, self.wk, self.wv = map(Linear, self.wqkv.split(sizes))
        self.wo = Linear(empty(args.dim, args.n_heads * args.head_dim))
        cache = (args.max_batch_size, args.max_seq_len, args.n_kv_heads, args.head_dim)
        self.register_buffer("cache_k", empty(cache), persistent=False)
        self.register_buffer("cache_v", empty(cache), persistent=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        heads, kv_heads = self.n_heads, self.n_kv_heads
        qkv = linear(x, self.wqkv).view(len(x), -1, self.head_dim)
        xqk, xv = qkv.split((heads + kv_heads, kv_heads), dim=1)
        xqk = apply_rotary_emb(xqk, batch.freqs_cis)
        xq, xk = xqk.split((heads, kv_heads), dim=1)  # (T, n_heads, head_dim), ...
        self.cache_k[batch.rows, batch.positions] = xk
        self.cache_v[batch.rows, batch.positions] = xv
        queries = xq.split([span.length for span in batch.spans])
        parts = [self.attend(q, span) for q, span in zip(queries, batch.spans)]
        return self.wo(torch.cat(parts))  # (T, dim)

    def attend(self, q: Tensor, span: Span) -> Tensor:
        """Attention of a span's queries (length, n_heads, head_dim) over its row."""
        row, end = slice(span.row, span.row + 1), span.start + span.length
        k = self.cache_k[row, :end].transpose(1, 2)  # (1, n_kv_heads, end, head_dim)
        v = self.cache_v[row, :end].transpose(1, 2)
        if span.length == 1:  # no mask: a key's n_rep heads are as many queries
            q = q.view(1, self.n_kv_heads, -1, self.head_dim)
            return F.scaled_dot_product_attention(q, k, v).view(1, -1)
        # (n_rep, n_kv_heads, length, head_dim): keys are expanded, not copied
        q = q.unflatten(1, (self.n_kv_heads, -1)).permute(2, 1, 0, 3)
        k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
        if span.start == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            from torch.nn.attention.bias import causal_lower_right  # takes 2 seconds

            mask = causal_lower_right(span.length, end)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.permute(2, 1, 0, 3).reshape(span.length, -1)


class FeedForward(nn.Module):
    """One expert, a SwiGLU: https://arxiv.org/abs/2002.05202."""

    def __init__(self, w1: Linear, w2: Linear, w3: Linear):
        super().__init__()
        self.w1, self.w2, self.w3 = w1, w2, w3

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))

    def fetch(self, x: Tensor) -> Tensor:
        """x where it is to be processed: with the weights, unless they had better move."""
        device = self.w1.weight.device
        return x if device.type == "cpu" and len(x) >= MOVE_WEIGHTS else x.to(device)


class MoE(nn.Module):
    """Sparse mixture of experts: each token is processed by its top_k experts only.

    The experts are dealt out to the places, devices or host memory, in order.
    """

    def __init__(self, args: ModelArgs, factory: dict, places: Sequence[dict]):
        super().__init__()
        self.top_k, self.places = args.num_experts_per_tok, places
        self.gate = Linear(torch.empty(args.num_experts, args.dim, **factory))
        self.experts, self.grouped = nn.ModuleList(), None
        n, up = args.num_experts // len(places), (args.hidden_dim, args.dim)
        for place in places:
            layers = [stack(n, *s, place, factory) for s in (up, up[::-1], up)]
            self.experts.extend(map(FeedForward, *layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.gate(x)).type_as(x)

    def mix(self, x: Tensor, logits: Tensor) -> Tensor:
        """Each token's experts of x (T, dim), weighted and summed: float32 (T, dim)."""
        logits, chosen = logits.float().topk(self.top_k)  # (T, top_k)
        weights = logits.softmax(dim=-1)
        # Sorted by expert, the (token, choice) pairs of an expert are a slice.
        pairs = chosen.flatten().argsort(stable=True)  # (T * top_k,)
        counts = F.one_hot(chosen, len(self.experts)).sum((0, 1))
        tokens = x[pairs // self.top_k]  # (T * top_k, dim)
        process = self.grouped or self.one_by_one  # the former set by decode.py
        out = torch.empty_like(tokens)
        out[pairs] = process(tokens, counts)
        return (out.view(*chosen.shape, -1) * weights[..., None]).sum(dim=1)

    def one_by_one(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """The slices of tokens, counts[e] of them for expert e, after their experts."""
        slices = tokens.split(counts.tolist())  # the layer's one wait
        work = [(e, part) for e, part in zip(self.experts, slices) if len(part)]
        work = [(e, e.fetch(part)) for e, part in work]  # copies first,
        outs = [expert(part) for expert, part in work]  # all work under way,
        return torch.cat([out.to(tokens.device) for out in outs])  # copies back last


def deal(n_experts: int, n_places: int) -> list[int]:
    """How many experts each place gets, as evenly as possible: the first ones get one more."""
    each, rest = divmod(n_experts, n_places)
    return [each + 1] * rest + [each] * (n_places - rest)


def stack(n: int, rows: int, columns: int, place: dict, factory: dict) -> Iterator[Linear]:
    """n linear layers whose weights are slices of one tensor."""
    weights = torch.empty(n, rows, columns, **place)
    if weights.dtype != torch.int8:
        return map(Linear, weights)
    scale = torch.empty(n, rows, dtype=factory["dtype"], device=weights.device)
    return map(Linear, weights, scale)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, factory: dict, places: Sequence[dict]):
        super().__init__()
        self.attention = Attention(args, factory)
        self.feed_forward = MoE(args, factory, places)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps, **factory)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps, **factory)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        h = x + self.attention(self.attention_norm(x), batch)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The whole model under the checkpoint's names; its weights are not yet filled.

    Expert e of a layer is on devices[e // (num_experts / len(devices))], or in host
    memory in the last cpu_layers layers; all else is on devices[0]. A device may be
    named more than once. Raises ValueError if the devices cannot share the experts.
    """

    def __init__(
        self,
        params: ModelArgs,
        devices: Sequence[str | torch.device] = ("cpu",),
        dtype: torch.dtype = torch.bfloat16,
        cpu_layers: int = 0,
        int8: bool = False,
    ):
        super().__init__()
        devices = [torch.device(device) for device in devices]
        if not devices or params.num_experts % len(devices):
            shared = f"{params.num_experts} experts cannot be shared equally by"
            raise ValueError(f"{shared} {len(devices)} devices")
        if len({device.type for device in devices}) > 1:
            raise ValueError(f"{devices} are not all of one type")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
        self.params, self.devices, self.device = params, devices, devices[0]
        self.decoder = None  # see prepare()
        factory = {"device": self.device, "dtype": dtype}
        kind = {"dtype": torch.int8 if int8 else dtype}
        on_devices = [{"device": device, **kind} for device in devices]
        on_host = [{"device": torch.device("cpu"), **kind}]
        places = [on_devices] * (params.n_layers - cpu_layers) + [on_host] * cpu_layers
        table = torch.empty(params.vocab_size, params.dim, **factory)
        self.tok_embeddings = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(TransformerBlock(params, factory, each) for each in places)
        self.norm = nn.RMSNorm(params.dim, params.norm_eps, **factory)
        self.output = Linear(torch.empty(params.vocab_size, params.dim, **factory))
        rope = params.head_dim, params.max_seq_len, params.rope_theta
        freqs_cis = precompute_freqs_cis(*rope)
        self.register_buffer("freqs_cis", freqs_cis.to(self.device), persistent=False)
        self.requires_grad_(False)

    def prepare(self, report: Callable[[str], None]) -> None:
        """Compile and record what makes GPUs fast: see decode.py.

        To be called once the weights are loaded and before the first prompt, since it
        writes to the cache. If it fails, report is called with the reason, and all runs
        in plain PyTorch.
        """
        if self.device.type == "cuda":
            try:
                from .decode import Decoder  # imports Triton

                self.decoder = self.decoder or Decoder(self, report)
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises
                why = str(error).partition("\n")[0]
                report(f"warning: decoding without fast kernels, slower: {why}")

    def forward(self, tokens: Tensor, start_pos: int | Sequence[int] = 0) -> Tensor:
        """Logits, float32 (bsz, seqlen, vocab), after each of tokens (bsz, seqlen).

        start_pos is the position of each row's first token, or one for all rows; the
        tokens before it are in the cache.
        """
        bsz, seqlen = tokens.shape
        starts = [start_pos] * bsz if isinstance(start_pos, int) else start_pos
        spans = [Span(row, start, seqlen) for row, start in enumerate(starts)]
        return self.forward_packed(tokens.flatten(), spans).view(bsz, seqlen, -1)

    @torch.inference_mode()
    def forward_packed(
        self, tokens: Tensor, spans: Sequence[Span], last_only: bool = False
    ) -> Tensor:
        """Logits, float32 (T, vocab), after each token of the spans laid end to end.

        If last_only, only those after each span's last token, (len(spans), vocab).
        """
        where = [(s.row, s.start + i) for s in spans for i in range(s.length)]
        where = torch.tensor(where).T.contiguous()  # (2, T)
        rows, positions = where.to(self.device, non_blocking=True)
        tokens = tokens.to(self.device, non_blocking=True)
        if self.decoder and len(tokens) == len(spans) <= self.decoder.max_rows:
            return self.decoder(tokens, rows, positions)
        batch = Batch(spans, rows, positions, self.freqs_cis[positions, None])
        with sdpa_kernel(ATTENTION):
            h = self.tok_embeddings(tokens)  # (T, dim)
            for layer in self.layers:
                h = layer(h, batch)
        if last_only:
            ends = torch.tensor([span.length for span in spans]).cumsum(0) - 1
            h = h[ends.to(self.device, non_blocking=True)]
        return self.output(self.norm(h)).float()
