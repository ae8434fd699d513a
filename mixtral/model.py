"""Mixtral: Llama's transformer with a sparse mixture of experts in every layer.

It reads from top to bottom: attention as in Llama 2, `MoE` in the place of the feed-forward
layer, and `Transformer`. The T tokens of a pass may belong to one row of the cache or to many;
they lie end to end in one (T, dim) tensor, without padding. This is plain PyTorch for any
device; on GPUs, decode.py is the fast way to compute one new token per row.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's is left out: it makes a new plan for every length of a prompt.
ATTENTION_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# If an expert is in host memory, its weights are sent to the GPU for a slice of at least this many
# tokens. Sending them, 352 MB in 8x7B, takes 30 to 60 ms; a CPU of 1 TFLOP/s processes about this
# many tokens in that time. (An estimate, not measured.)
TOKENS_TO_MOVE_WEIGHTS = 128


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
            name = field.name
            value = getattr(self, name)
            if name in ("norm_eps", "rope_theta"):
                if type(value) not in (int, float) or not 0 < value < 1e300:
                    raise ValueError(f"{name} must be a finite number above 0, not {value!r:.40}")
            elif type(value) is not int or not 0 < value < 2**31:
                raise ValueError(
                    f"{name} must be a whole number, at least 1 and below 2**31, not {value!r:.40}"
                )
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


class Place(NamedTuple):
    """Where weights are, and as which type."""

    device: torch.device
    dtype: torch.dtype

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)


class Fixed(nn.Module):
    """A module whose parameters may be slices of larger tensors, which products use as a whole.

    Fill the parameters in place. Replacing them would leave the larger tensor as it was, so .to(),
    .float() and load_state_dict(assign=True) raise RuntimeError.
    """

    def _apply(self, fn: Callable, recurse: bool = True) -> NoReturn:
        raise RuntimeError("a model stays as it was built: build another for this device or dtype")

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any
    ) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            raise RuntimeError("load_state_dict must copy into the model's weights, not assign")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Linear(Fixed):
    """A bias-free linear layer whose weight may be a slice of a larger tensor.

    A weight of type int8 has a scale for each of its rows.
    """

    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device)  # it may be in host memory
        if self.scale is None:
            return linear(x, weight)
        return linear_int8(x, weight, self.scale.to(x.device))


@functools.cache
def has_amx() -> bool:
    """Whether the processor has Intel's matrix unit for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, in_features) times the transpose of weight (out_features, in_features).

    The result may lie transposed in memory.
    """
    if x.is_cuda:
        return F.linear(x, weight)
    uses_amx = x.dtype == torch.bfloat16 and has_amx()
    if uses_amx and len(x) <= 64:
        return linear_few_rows(x, weight)
    if not uses_amx and len(x) == 1 and torch.backends.mkldnn.enabled:
        return linear_one_row(x, weight)
    return F.linear(x, weight)


def linear_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """linear() with the weight as the left matrix, which AMX reads as it lies in memory.

    oneDNN repacks a right matrix at every call. On an Intel Xeon with AMX this way takes 0.5 to
    0.8 of the time for 8x7B's matrices and up to 64 rows, and the results are identical.
    """
    columns = x.t()  # (in_features, T)
    if len(x) == 1:
        columns = columns.expand(-1, 2)  # a single column would be multiplied without AMX
    return torch.mm(weight, columns).t()[: len(x)]


def linear_one_row(x: Tensor, weight: Tensor) -> Tensor:
    """linear() with PyTorch's own kernel instead of oneDNN's.

    On one AMD Zen 4 core it reads a bfloat16 weight at 21 GB/s. oneDNN repacks the weight and
    reaches 10 GB/s; from two rows on it is as fast or faster.
    """
    onednn = torch.backends.mkldnn
    onednn.enabled = False  # type: ignore[assignment]  # mypy does not see that it is a property
    try:
        return F.linear(x, weight)
    finally:
        onednn.enabled = True  # type: ignore[assignment]


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """linear() for a weight whose rows are multiplied by scale (out_features,)."""
    if x.is_cuda:
        return F.linear(x, weight.to(x.dtype).mul_(scale[:, None]))
    # PyTorch's 8-bit product is slow for many rows, and reads rows in steps of 16 bytes, beyond the
    # end of a row whose length is not a multiple of 16.
    if len(x) <= 24 and weight.shape[1] % 16 == 0:
        return torch._weight_int8pack_mm(x, weight, scale)
    return linear_int8_in_blocks(x, weight, scale)


def linear_int8_in_blocks(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """linear_int8() that converts 1024 rows of the weight at a time, into the same memory again.

    The whole weight in x's type would be written to new memory and read again. On an Intel Xeon
    with AMX, blocks take 0.3 to 0.4 of the time for 32 rows of x, and 0.7 to 0.8 for 512.
    """
    block = torch.empty(1024, weight.shape[1], dtype=x.dtype)
    parts: list[Tensor] = []  # (T, 1024), but the last may be smaller
    for rows, scales in zip(weight.split(1024), scale.split(1024)):
        rows_of_x_type = block[: len(rows)].copy_(rows).mul_(scales[:, None])
        parts.append(linear(x, rows_of_x_type))
    return torch.cat(parts, dim=1)


def precompute_freqs_cis(head_dim: int, end: int, theta: float) -> Tensor:
    """Rotary factors e^(i m theta^(-2j / head_dim)), complex64 (end, head_dim / 2).

    m is the position and j the pair: https://arxiv.org/abs/2104.09864.
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (T, heads, head_dim), in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:2], -1, 2))  # (T, heads, head_dim / 2)
    return torch.view_as_real(pairs * freqs_cis).view(x.shape).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention over a cache of keys and values."""

    cache_k: Tensor
    cache_v: Tensor

    def __init__(self, args: ModelArgs, place: Place):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads
        self.head_dim = args.head_dim
        q_size = args.n_heads * args.head_dim
        kv_size = args.n_kv_heads * args.head_dim
        # One matrix, so that one product serves all three. wq, wk and wv are slices of it.
        self.wqkv = place.empty(q_size + 2 * kv_size, args.dim)
        wq, wk, wv = self.wqkv.split((q_size, kv_size, kv_size))
        self.wq = Linear(wq)
        self.wk = Linear(wk)
        self.wv = Linear(wv)
        self.wo = Linear(place.empty(args.dim, q_size))
        cache = (args.max_batch_size, args.max_seq_len, args.n_kv_heads, args.head_dim)
        self.register_buffer("cache_k", place.empty(*cache), persistent=False)
        self.register_buffer("cache_v", place.empty(*cache), persistent=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        qkv = linear(x, self.wqkv)  # (T, (n_heads + 2 n_kv_heads) head_dim)
        # (T, n_heads + 2 n_kv_heads, head_dim)
        qkv = qkv.contiguous().view(len(x), -1, self.head_dim)
        xqk, xv = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=1)
        xqk = apply_rotary_emb(xqk, batch.freqs_cis)
        xq, xk = xqk.split((self.n_heads, self.n_kv_heads), dim=1)
        self.cache_k[batch.rows, batch.positions] = xk  # (T, n_kv_heads, head_dim)
        self.cache_v[batch.rows, batch.positions] = xv
        queries = xq.split([span.length for span in batch.spans])  # (length, n_heads, head_dim)
        parts = [self.attend(q, span) for q, span in zip(queries, batch.spans)]
        return self.wo(torch.cat(parts))  # (T, dim)

    def attend(self, q: Tensor, span: Span) -> Tensor:
        """Attention of a span's queries (length, n_heads, head_dim) over its row of the cache."""
        end = span.start + span.length
        k = self.cache_k[span.row, :end].transpose(0, 1)  # (n_kv_heads, end, head_dim)
        v = self.cache_v[span.row, :end].transpose(0, 1)
        if span.length == 1:
            # One position needs no mask, so the n_rep query heads of a key head can be n_rep
            # queries of it: keys are read once.
            q = q.view(1, self.n_kv_heads, -1, self.head_dim)  # (1, n_kv_heads, n_rep, head_dim)
            return F.scaled_dot_product_attention(q, k[None], v[None]).reshape(1, -1)
        # Axis 0 is the n_rep query heads that share a key head. It serves as a batch axis, along
        # which keys and values expand without a copy.
        q = q.unflatten(1, (self.n_kv_heads, -1))  # (length, n_kv_heads, n_rep, head_dim)
        q = q.permute(2, 1, 0, 3)  # (n_rep, n_kv_heads, length, head_dim)
        k = k.expand(len(q), -1, -1, -1)  # (n_rep, n_kv_heads, end, head_dim)
        v = v.expand(len(q), -1, -1, -1)
        if span.start == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = causal_lower_right(span.length, end)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.permute(2, 1, 0, 3).reshape(span.length, -1)  # (length, n_heads head_dim)


def causal_lower_right(length: int, end: int) -> Tensor:
    """A mask for the last `length` of `end` positions: each sees itself and all before it."""
    # This import takes one or two seconds, and a prompt that is read in one pass needs no mask.
    from torch.nn.attention import bias

    return bias.causal_lower_right(length, end)


class FeedForward(nn.Module):
    """One expert, a SwiGLU network: https://arxiv.org/abs/2002.05202."""

    def __init__(self, w1: Linear, w2: Linear, w3: Linear):
        super().__init__()
        self.w1 = w1
        self.w2 = w2
        self.w3 = w3

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))

    def bring(self, x: Tensor) -> Tensor:
        """x on the weights' device, or where it is if moving the weights to x is cheaper."""
        device = self.w1.weight.device
        weights_move = device.type == "cpu" and len(x) >= TOKENS_TO_MOVE_WEIGHTS
        return x if weights_move else x.to(device)


class Stack(NamedTuple):
    """The weights of the n experts of one place: each expert has a slice of each tensor."""

    first: int  # the id of the first of them
    w1: Tensor  # (n, hidden_dim, dim)
    w2: Tensor  # (n, dim, hidden_dim)
    w3: Tensor  # (n, hidden_dim, dim)
    scales: tuple[Tensor, Tensor, Tensor] | None  # of the rows of w1, w2 and w3, if int8

    def experts(self) -> Iterator[FeedForward]:
        for e in range(len(self.w1)):
            weights = (self.w1[e], self.w2[e], self.w3[e])
            if self.scales is None:
                yield FeedForward(*map(Linear, weights))
            else:
                yield FeedForward(*map(Linear, weights, [scale[e] for scale in self.scales]))


def empty_stack(
    first: int, n: int, args: ModelArgs, place: Place, scale_dtype: torch.dtype
) -> Stack:
    w1 = place.empty(n, args.hidden_dim, args.dim)
    w2 = place.empty(n, args.dim, args.hidden_dim)
    w3 = place.empty(n, args.hidden_dim, args.dim)
    if place.dtype != torch.int8:
        return Stack(first, w1, w2, w3, None)
    scales = Place(place.device, scale_dtype)
    s1 = scales.empty(n, args.hidden_dim)
    s2 = scales.empty(n, args.dim)
    s3 = scales.empty(n, args.hidden_dim)
    return Stack(first, w1, w2, w3, (s1, s2, s3))


def deal(n_experts: int, n_places: int) -> list[int]:
    """How many experts each place gets: as equal as can be, with one more for the first places."""
    least, more = divmod(n_experts, n_places)
    return [least + 1] * more + [least] * (n_places - more)


class MoE(nn.Module):
    """Sparse mixture of experts: each token is processed by its top_k experts only.

    The experts are dealt out to the places, devices or host memory, in order.
    """

    def __init__(self, args: ModelArgs, place: Place, expert_places: Sequence[Place]):
        super().__init__()
        self.top_k = args.num_experts_per_tok
        self.gate = Linear(place.empty(args.num_experts, args.dim))
        self.stacks: list[Stack] = []  # one per GPU that has experts of this layer
        experts: list[FeedForward] = []
        for expert_place, n in zip(expert_places, deal(args.num_experts, len(expert_places))):
            first = len(experts)
            stack = empty_stack(first, n, args, expert_place, place.dtype)
            experts += stack.experts()
            # On the CPU mapped files replace the weights: a stack would keep unused memory alive.
            if expert_place.device.type == "cuda":
                self.stacks.append(stack)
        self.experts = module_list(experts)
        self.grouped = len(expert_places) == 1 and has_grouped_mm(args, expert_places[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.gate(x)).type_as(x)

    def mix(self, x: Tensor, logits: Tensor) -> Tensor:
        """The weighted sum of each token's experts for x (T, dim): float32 (T, dim)."""
        top_logits, chosen = logits.float().topk(self.top_k)  # (T, top_k)
        weights = top_logits.softmax(dim=-1)
        # Once sorted by expert, the (token, choice) pairs of each expert are one slice.
        expert_of_pair, pairs = chosen.flatten().sort(stable=True)  # (T * top_k,)
        ids = torch.arange(len(self.experts), device=x.device)
        ends = torch.searchsorted(expert_of_pair, ids, right=True, out_int32=True)  # (num_experts,)
        tokens = x[pairs // self.top_k]  # (T * top_k, dim)
        process = self.all_at_once if self.grouped else self.one_by_one
        results = process(tokens, ends)  # (T * top_k, dim)
        out = torch.empty_like(results)
        out[pairs] = results  # back in the order of the tokens
        return (out.view(*chosen.shape, -1) * weights[..., None]).sum(dim=1)

    def one_by_one(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Let each expert process its slice of tokens. Expert e's slice ends at ends[e].

        tokens and the result are (T * top_k, dim), with one row for each (token, choice) pair.
        """
        slices = tokens.tensor_split(ends.tolist()[:-1])  # the host waits for the ends
        used = [(expert, part) for expert, part in zip(self.experts, slices) if len(part)]
        # All inputs are sent before any expert runs, so that the devices work at the same time.
        inputs = [expert.bring(part) for expert, part in used]
        outs = [expert(part) for (expert, _), part in zip(used, inputs)]
        return torch.cat([out.to(tokens.device) for out in outs])

    def all_at_once(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """The same as one_by_one in three products, for which the host need not wait."""
        stack = self.stacks[0]
        gate = F.grouped_mm(tokens, stack.w1.mT, offs=ends)  # (T * top_k, hidden_dim)
        up = F.grouped_mm(tokens, stack.w3.mT, offs=ends)
        return F.grouped_mm(F.silu(gate, inplace=True).mul_(up), stack.w2.mT, offs=ends)


def has_grouped_mm(args: ModelArgs, place: Place) -> bool:
    """Whether F.grouped_mm can process a place's experts without making the host wait."""
    if place.device.type != "cuda" or place.dtype != torch.bfloat16:
        return False
    rows_are_aligned = args.dim % 8 == 0 and args.hidden_dim % 8 == 0  # to 16 bytes
    return rows_are_aligned and torch.cuda.get_device_capability(place.device) >= (9, 0)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, place: Place, expert_places: Sequence[Place]):
        super().__init__()
        self.attention = Attention(args, place)
        self.feed_forward = MoE(args, place, expert_places)
        self.attention_norm = rms_norm(args, place)
        self.ffn_norm = rms_norm(args, place)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        h = x + self.attention(self.attention_norm(x), batch)
        return h + self.feed_forward(self.ffn_norm(h))


def rms_norm(args: ModelArgs, place: Place) -> nn.RMSNorm:
    return nn.RMSNorm(args.dim, args.norm_eps, device=place.device, dtype=place.dtype)


class DecodeStep(Protocol):
    """A faster way to compute logits for one new token per row, in at most max_rows rows."""

    max_rows: int

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits, float32 (T, vocab); each argument is (T,)."""


class Transformer(Fixed):
    """The whole model, with a checkpoint's parameter names. Its weights are still to be filled.

    The experts of each layer are dealt out to the devices in order; those of the last cpu_layers
    layers are in host memory instead. All other weights are on devices[0]. A device may be named
    more than once. Raises ValueError if there are more devices than experts, or if an argument is
    invalid.
    """

    freqs_cis: Tensor

    def __init__(
        self,
        params: ModelArgs,
        devices: Sequence[str | torch.device] = ("cpu",),
        dtype: torch.dtype = torch.bfloat16,
        cpu_layers: int = 0,
        int8: bool = False,
    ):
        super().__init__()
        self.devices = [torch.device(device) for device in devices]
        if not 1 <= len(devices) <= params.num_experts:
            raise ValueError(
                f"{params.num_experts} experts cannot be shared by {len(devices)} devices"
            )
        if len({device.type for device in self.devices}) > 1:
            raise ValueError(f"{self.devices} are not all of one type")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
        if not 0 <= cpu_layers <= params.n_layers:
            raise ValueError(f"cpu_layers must be 0 to {params.n_layers}, not {cpu_layers}")
        self.params = params
        self.device = self.devices[0]
        self.decoder: DecodeStep | None = None  # attached by generation.py, made by decode.py
        self.n_passes = 0  # so that a generator notices passes that it did not make

        place = Place(self.device, dtype)
        expert_dtype = torch.int8 if int8 else dtype
        on_devices = [Place(device, expert_dtype) for device in self.devices]
        on_host = [Place(torch.device("cpu"), expert_dtype)]
        self.tok_embeddings = nn.Embedding.from_pretrained(
            place.empty(params.vocab_size, params.dim)
        )
        layers: list[TransformerBlock] = []
        for i in range(params.n_layers):
            places = on_devices if i < params.n_layers - cpu_layers else on_host
            layers.append(TransformerBlock(params, place, places))
        self.layers = module_list(layers)
        self.norm = rms_norm(params, place)
        self.output = Linear(place.empty(params.vocab_size, params.dim))
        freqs_cis = precompute_freqs_cis(params.head_dim, params.max_seq_len, params.rope_theta)
        self.register_buffer("freqs_cis", freqs_cis.to(self.device), persistent=False)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, start_pos: int | Sequence[int] = 0) -> Tensor:
        """Logits, float32 (bsz, seqlen, vocab), after each of tokens (bsz, seqlen).

        start_pos is the position of each row's first token, or one for all rows; the tokens
        before it are in the cache. This is Llama's signature; generation.py has rows of
        different lengths and calls forward_packed. Raises ValueError if the tokens do not
        fit into the cache.
        """
        bsz, seqlen = tokens.shape
        starts = [start_pos] * bsz if isinstance(start_pos, int) else start_pos
        if len(starts) != bsz or bsz > self.params.max_batch_size:
            most = self.params.max_batch_size
            raise ValueError(f"{bsz} rows, {len(starts)} starts: max_batch_size is {most}")
        if min(starts, default=0) < 0 or max(starts, default=0) + seqlen > self.params.max_seq_len:
            raise ValueError(f"{seqlen} tokens from positions {starts} on exceed max_seq_len")
        spans = [Span(row, start, seqlen) for row, start in enumerate(starts)]
        return self.forward_packed(tokens.flatten(), spans).view(bsz, seqlen, -1)

    @torch.inference_mode()
    def forward_packed(
        self, tokens: Tensor, spans: Sequence[Span], last_only: bool = False
    ) -> Tensor:
        """Logits, float32 (T, vocab), after each token of the spans laid end to end.

        If last_only, only those after each span's last token, (len(spans), vocab).
        """
        self.n_passes += 1
        row_of_token: list[int] = []
        position_of_token: list[int] = []
        for span in spans:
            row_of_token += [span.row] * span.length
            position_of_token += range(span.start, span.start + span.length)
        indices = torch.tensor([row_of_token, position_of_token], device="cpu")  # (2, T)
        rows, positions = send(indices, self.device)
        tokens = send(tokens, self.device)
        one_token_each = len(tokens) == len(spans)
        if self.decoder and one_token_each and len(spans) <= self.decoder.max_rows:
            return self.decoder(tokens, rows, positions)
        batch = Batch(spans, rows, positions, self.freqs_cis[positions, None])
        with sdpa_kernel(ATTENTION_BACKENDS):
            h = self.tok_embeddings(tokens)  # (T, dim)
            for layer in self.layers:
                h = layer(h, batch)
        if last_only:
            ends = torch.tensor([span.length for span in spans], device="cpu").cumsum(0)
            h = h[send(ends - 1, self.device)]  # (len(spans), dim)
        return self.output(self.norm(h)).float().contiguous()


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy x to device; only a copy to a GPU is asynchronous.

    The host could read an asynchronous copy from a GPU before it has arrived.
    """
    return x.to(device, non_blocking=device.type == "cuda")


Module = TypeVar("Module", bound=nn.Module)


def module_list(modules: Iterable[Module]) -> Sequence[Module]:
    """An nn.ModuleList, which type checkers take for a sequence of what is in it."""
    return cast(Sequence[Module], nn.ModuleList(modules))
