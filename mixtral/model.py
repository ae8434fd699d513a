"""Mixtral: Llama's transformer with a sparse mixture of experts as feed-forward layer.

Read top to bottom: attention as in Llama 2, then `MoE`, then `Transformer`, which puts
every layer's experts on a list of devices. The T tokens of a forward, of one cache row
or of many, lie end to end in one (T, dim) tensor: there is no padding.
"""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On a GPU, a forward of so few tokens never makes the host wait, for it is decoding.
DECODE_TOKENS = 16


@dataclass
class ModelArgs:
    """The sizes of a model, 8x7B's by default, and of its cache."""

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
    """Where the T tokens of one forward belong, for the host in spans, else on device.

    With spans None each token is its row's next and goes through mixtral.kernels, which
    look their rotary factors up; otherwise freqs_cis holds those of the T tokens.
    """

    spans: Sequence[Span] | None
    rows: Tensor  # (T,)
    positions: Tensor  # (T,)
    freqs_cis: Tensor  # (max_seq_len, head_dim / 2) or (T, 1, head_dim / 2)


@functools.cache
def kernels() -> ModuleType | None:
    """mixtral.kernels, or None where Triton's kernels cannot run: all works without."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("mixtral.kernels")


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x @ weight.T, plus residual if given, by the fastest product for the shape."""
    if x.is_cuda and len(x) <= 4 and kernels():
        return kernels().linear_decode(x, weight, residual)
    onednn = torch.backends.mkldnn
    if len(x) <= 2 and onednn.enabled and not x.is_cuda:
        # For a row PyTorch has a matrix-vector product that is as fast as memory. oneDNN
        # repacks the weights, and is half as fast, until three rows share the work.
        onednn.enabled = False
        try:
            out = [F.linear(row, weight) for row in x.split(1)]
        finally:
            onednn.enabled = True
        out = out[0] if len(x) == 1 else torch.cat(out)
    else:
        out = F.linear(x, weight)
    return out if residual is None else residual + out


class Linear(nn.Module):
    """A product with a weight that lies where it was allocated, perhaps in a stack."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, residual)


class RMSNorm(nn.Module):
    """Root mean square normalisation: https://arxiv.org/abs/1910.07467."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and not x.is_cuda:  # three operations instead of nine
            norm = torch.linalg.vector_norm(x, dtype=torch.float32).item()
            return x * (norm * norm / x.shape[1] + self.eps) ** -0.5 * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def precompute_freqs_cis(head_dim: int, end: int, theta: float) -> Tensor:
    """Rotary factors e^(i m theta^(-2j / head_dim)), complex64 (end, head_dim / 2).

    m is the position and j the pair: https://arxiv.org/abs/2104.09864.
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn the interleaved pairs of x (T, heads, head_dim), in float32.

    freqs_cis is (T, 1, head_dim / 2).
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:2], -1, 2))
    return torch.view_as_real(pairs * freqs_cis).view(x.shape).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention over a cache of keys and values."""

    def __init__(self, args: ModelArgs, device: torch.device, dtype: torch.dtype):
        super().__init__()
        empty = functools.partial(torch.empty, dtype=dtype, device=device)
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim = args.head_dim
        heads = (args.n_heads, args.n_kv_heads, args.n_kv_heads)
        # wq, wk and wv are slices of one matrix: one product.
        self.wqkv = empty(sum(heads) * args.head_dim, args.dim)
        slices = self.wqkv.split([n * args.head_dim for n in heads])
        self.wq, self.wk, self.wv = map(Linear, slices)
        self.wo = Linear(empty(args.dim, args.n_heads * args.head_dim))
        cache = (args.max_batch_size, args.max_seq_len, args.n_kv_heads, args.head_dim)
        self.cache_k, self.cache_v = empty(cache), empty(cache)

    def forward(self, x: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        spans, rows, positions, freqs_cis = batch
        heads, kv_heads = self.n_heads, self.n_kv_heads
        qkv = linear(x, self.wqkv).view(len(x), -1, self.head_dim)
        xqk, xv = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if spans is None:
            xq, xk = xqk.split((heads, kv_heads), dim=1)
            cache = (self.cache_k, self.cache_v, rows, positions)
            xq = kernels().rope_and_cache(xq, xk, xv, freqs_cis, *cache)
            out = kernels().decode_attention(xq, *cache)
        else:
            xqk = apply_rotary_emb(xqk, freqs_cis)
            xq, xk = xqk.split((heads, kv_heads), dim=1)
            self.cache_k[rows, positions], self.cache_v[rows, positions] = xk, xv
            queries = xq.split([span.length for span in spans])
            out = torch.cat([self.attend(*each) for each in zip(queries, spans)])
        return self.wo(out.view(len(x), -1), residual)

    def attend(self, q: Tensor, span: Span) -> Tensor:
        """A row's new queries (length, n_heads, head_dim) over all it has up to them.

        Heads that share a key are its queries where one position needs no mask, else
        a batch over keys that are expanded, not copied.
        """
        row, end = slice(span.row, span.row + 1), span.start + span.length
        k = self.cache_k[row, :end].transpose(1, 2)  # (1, n_kv_heads, end, head_dim)
        v = self.cache_v[row, :end].transpose(1, 2)
        if span.length == 1:
            q = q.view(1, self.n_kv_heads, -1, self.head_dim)  # n_rep in length's place
            return F.scaled_dot_product_attention(q, k, v).view(1, -1)
        # (n_rep, n_kv_heads, length, head_dim)
        q = q.unflatten(1, (self.n_kv_heads, -1)).permute(2, 1, 0, 3)
        k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
        if span.start == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # a late import, for it takes longer than all others
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(span.length, end)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.permute(2, 1, 0, 3).reshape(span.length, -1)


class FeedForward(nn.Module):
    """One expert, a SwiGLU: https://arxiv.org/abs/2002.05202."""

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(w1), Linear(w2), Linear(w3)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))


class MoE(nn.Module):
    """Sparse mixture of experts: a token goes to those with its top_k gate logits.

    The experts are dealt out to the devices in order. A device gets every token with
    its logits, in one copy, and sends back the sum over its own experts, in another.
    """

    def __init__(
        self, args: ModelArgs, devices: Sequence[torch.device], dtype: torch.dtype
    ):
        super().__init__()
        self.devices, self.top_k = devices, args.num_experts_per_tok
        self.n_local = args.num_experts // len(devices)
        self.gate = Linear(
            torch.empty(args.num_experts, args.dim, dtype=dtype, device=devices[0])
        )
        self.experts, self.stacks = nn.ModuleList(), []
        up, down = (args.hidden_dim, args.dim), (args.dim, args.hidden_dim)
        for device in devices:
            empty = functools.partial(torch.empty, dtype=dtype, device=device)
            stack = [empty(self.n_local, *shape) for shape in (up, down, up)]
            self.experts.extend(map(FeedForward, *stack))
            if device.type == "cuda":  # for the kernels, which find an expert by number
                self.stacks.append(stack)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        logits = self.gate(x)
        counts = None if len(x) <= DECODE_TOKENS else self.count(logits)
        if len(self.devices) == 1:
            return self.local_sum(0, x, logits, counts, residual)
        inputs, packed = [(x, logits)], torch.cat((x, logits), dim=1)
        for device in self.devices[1:]:
            copy = packed.to(device, non_blocking=True)
            inputs.append(copy.split((x.shape[1], logits.shape[1]), dim=1))
        # The first device is last to be given its work: it has had the packing to do.
        sums = [self.local_sum(i, *inputs[i], counts) for i in range(len(inputs))[::-1]]
        out = sums.pop()
        for part in sums:
            out = out + part.to(x.device, non_blocking=True)
        return residual + out

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights, in float32, and ids of each token's experts, both (T, top_k)."""
        logits, selected = torch.topk(logits.float(), self.top_k)
        return logits.softmax(dim=-1), selected

    def count(self, logits: Tensor) -> list[int]:
        """How many tokens chose each expert: the layer's one wait for the device."""
        experts = torch.arange(logits.shape[1], device=logits.device)
        _, selected = self.route(logits)
        return (selected[..., None] == experts).sum((0, 1)).tolist()

    def local_sum(
        self,
        i: int,
        x: Tensor,
        logits: Tensor,
        counts: list[int] | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The sum of weight * expert(x) over device i's experts, (T, dim)."""
        first, last = i * self.n_local, (i + 1) * self.n_local
        if counts is None and x.is_cuda and kernels():
            routing = (first, self.top_k, residual)
            return kernels().moe_decode(x, logits, *self.stacks[i], *routing)
        weights, selected = self.route(logits)
        if counts is None and not x.is_cuda:
            # The host sees who was chosen, and few tokens it deals out quickest itself.
            out = torch.zeros_like(x) if residual is None else residual
            out = out.to(torch.float32, copy=True)
            rows, sums = x.split(1), out.split(1)
            chosen: dict[int, list[tuple[int, float]]] = {}
            for token, pairs in enumerate(zip(selected.tolist(), weights.tolist())):
                for e, weight in zip(*pairs):
                    chosen.setdefault(e, []).append((token, weight))
            for e in chosen.keys() & range(first, last):
                part = self.experts[e](
                    torch.cat([rows[token] for token, _ in chosen[e]])
                )
                for (token, weight), row in zip(chosen[e], part.split(1)):
                    sums[token].add_(row, alpha=weight)
            return out.type_as(x)
        if counts is None:
            # A GPU is not asked whom it chose: a weight of 0 says who was not.
            weights = torch.zeros_like(logits).float().scatter(1, selected, weights)
            held = zip(weights[:, first:last].split(1, dim=1), self.experts[first:last])
            out = sum(weight * expert(x) for weight, expert in held).type_as(x)
        else:  # (token, choice) pairs sorted by expert: each works once, on a slice
            begin, end = sum(counts[:first]), sum(counts[:last])
            pairs = selected.flatten().argsort(stable=True)[begin:end]
            parts = x[pairs // self.top_k].split(counts[first:last])
            experts = self.experts[first:last]
            chosen = [expert(part) for expert, part in zip(experts, parts) if len(part)]
            out = x.new_zeros(len(x) * self.top_k, x.shape[1])
            if chosen:
                out[pairs] = torch.cat(chosen)
            out = out.view(*selected.shape, -1) * weights[..., None]  # (T, top_k, dim)
            out = out.sum(1).type_as(x)
        return out if residual is None else residual + out


class TransformerBlock(nn.Module):
    def __init__(
        self, args: ModelArgs, devices: Sequence[torch.device], dtype: torch.dtype
    ):
        super().__init__()
        norms = torch.empty(2, args.dim, dtype=dtype, device=devices[0])
        self.attention = Attention(args, devices[0], dtype)
        self.feed_forward = MoE(args, devices, dtype)
        self.attention_norm = RMSNorm(norms[0], args.norm_eps)
        self.ffn_norm = RMSNorm(norms[1], args.norm_eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        h = self.attention(self.attention_norm(x), x, batch)  # x + attention
        return self.feed_forward(self.ffn_norm(h), h)  # h + feed_forward


class Transformer(nn.Module):
    """The whole model under the checkpoint's names, its weights allocated, not filled.

    Expert e of every layer is on devices[e // (num_experts / len(devices))], all else
    on devices[0]. A device may be named more than once. Raises ValueError where the
    devices cannot have equally many experts.
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
                f"{params.num_experts} experts cannot be shared equally "
                f"by {len(devices)} devices"
            )
        if len({device.type for device in devices}) > 1:
            raise ValueError(f"{devices} are not all of one type")
        self.params, self.devices, self.device = params, devices, devices[0]
        if self.device.type == "cuda":
            # cuDNN's attention would be preferred, and plans anew for every length.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.graphs, self.pool = {}, None  # by number of rows: see decode()
        empty = functools.partial(torch.empty, dtype=dtype, device=self.device)
        table = empty(params.vocab_size, params.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(
            TransformerBlock(params, devices, dtype) for _ in range(params.n_layers)
        )
        self.norm = RMSNorm(empty(params.dim), params.norm_eps)
        self.output = Linear(empty(params.vocab_size, params.dim))
        self.freqs_cis = precompute_freqs_cis(
            params.head_dim, params.max_seq_len, params.rope_theta
        ).to(self.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int | Sequence[int] = 0) -> Tensor:
        """Logits, float32 (bsz, seqlen, vocab), after each of tokens (bsz, seqlen).

        start_pos is the position of each row's first token, or one for all rows; what
        precedes it is in the cache.
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

        With last_only only those after each span's last token, (len(spans), vocab).
        """
        to_device = functools.partial(
            torch.Tensor.to, device=self.device, non_blocking=True
        )
        where = [(s.row, s.start + i) for s in spans for i in range(s.length)]
        rows, positions = to_device(torch.tensor(where).T.contiguous())
        tokens = to_device(tokens)
        one_each = len(tokens) == len(spans) <= DECODE_TOKENS
        if one_each and self.device.type == "cuda" and kernels():
            return self.decode(tokens, rows, positions)
        ends = torch.tensor([s.length for s in spans]).cumsum(0) - 1
        batch = Batch(spans, rows, positions, self.freqs_cis[positions, None])
        return self.run(tokens, batch, to_device(ends) if last_only else None)

    def run(self, tokens: Tensor, batch: Batch, ends: Tensor | None = None) -> Tensor:
        h = self.tok_embeddings(tokens)  # (T, dim)
        for layer in self.layers:
            h = layer(h, batch)
        if ends is not None:
            h = h[ends]
        return self.output(self.norm(h)).float()

    def decode(self, *inputs: Tensor) -> Tensor:
        """run() of one token for each row, given their tokens, rows and positions.

        On one device it is recorded once for each number of rows, as a CUDA graph that
        holds for all positions, and from then on replayed: one launch for hundreds.
        """
        n = len(inputs[0])
        if n not in self.graphs:
            self.graphs[n] = self.capture(inputs)
        if self.graphs[n] is None:
            return self.run(inputs[0], Batch(None, *inputs[1:], self.freqs_cis))
        graph, buffers, logits = self.graphs[n]
        for buffer, value in zip(buffers, inputs):
            buffer.copy_(value)
        graph.replay()
        return logits.clone()  # the next replay writes over the graph's own

    def capture(
        self, inputs: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Tensor] | None:
        """The recorded step, its inputs and its output; None where it cannot be had."""
        if len(set(self.devices)) > 1:
            return None
        buffers = [x.clone() for x in inputs]
        step = functools.partial(
            self.run, buffers[0], Batch(None, *buffers[1:], self.freqs_cis)
        )
        with torch.cuda.device(self.device):
            step()  # compiles what is not compiled, which a recording cannot
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            options = {"pool": self.pool, "stream": torch.cuda.Stream()}
            try:
                with torch.cuda.graph(graph, **options):
                    logits = step()
            except RuntimeError as error:
                torch.cuda.set_stream(current)
                warnings.warn(f"decoding without a CUDA graph: {error}", stacklevel=2)
                return None
        return graph, buffers, logits
