"""The model against transformers, and against itself where results must be the same."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import random_transformer, reference_logits, to_transformers
from helpers.tiny import ARGS, LIMIT, model_of, random_prompts

from mixtral import Mixtral, ModelArgs, Tokenizer, Transformer
from mixtral.checkpoint import load_checkpoint, read_params
from mixtral.model import Span, linear_int8

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def assert_same(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def packed_logits(model: Transformer, prompts: list[list[int]]) -> torch.Tensor:
    spans = [Span(row, 0, len(prompt)) for row, prompt in enumerate(prompts)]
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    return model.forward_packed(tokens, spans)


def check_with_transformers(model: Transformer, prompts: list[list[int]], steps=8):
    """Logits of each prompt, and what greedy decoding makes of all in one batch."""
    reference = to_transformers(model.params, model.state_dict())
    logits = packed_logits(model, prompts).split([len(prompt) for prompt in prompts])
    endless = SimpleNamespace(eos_id=-1)
    new, _ = Mixtral(model, endless).generate(prompts, steps, temperature=0)
    for prompt, ours, continuation in zip(prompts, logits, new, strict=True):
        assert len(continuation) == steps
        theirs = reference_logits(reference, prompt + continuation)
        assert_same(ours, theirs[: len(prompt)], atol=1e-4)
        # Each token is the likeliest after those before it: this is greedy decoding.
        assert continuation == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()


# Against transformers


@st.composite
def configurations(draw):
    def one_of(*values):
        return draw(st.sampled_from(values))

    n_kv_heads, num_experts = one_of(1, 2, 3), one_of(1, 2, 3, 8)
    return ModelArgs(
        dim=one_of(8, 20, 33),
        n_layers=one_of(1, 2, 3),
        head_dim=one_of(2, 8, 18),
        hidden_dim=one_of(1, 16, 50),
        n_heads=n_kv_heads * one_of(1, 2, 4),
        n_kv_heads=n_kv_heads,
        norm_eps=one_of(1e-6, 1e-5, 1e-2),
        vocab_size=one_of(11, 64, 301),
        num_experts=num_experts,
        num_experts_per_tok=draw(st.integers(1, num_experts)),
        rope_theta=one_of(100.0, 1e4, 1e6),
        max_batch_size=4,
        max_seq_len=48,
    )


@hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # to shrink a failure takes minutes
)
@hypothesis.given(
    args=configurations(),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_random_configurations(args, lengths, seed):
    model = random_transformer(args, seed=seed)
    check_with_transformers(model, random_prompts(lengths, args.vocab_size, seed))


def test_long_prompts():
    """Prompts of more tokens than one pass takes are cut."""
    args = dataclasses.replace(ARGS, n_layers=1, max_seq_len=1000)
    prompts = random_prompts([990, 3, 700, 900])
    check_with_transformers(random_transformer(args), prompts, steps=4)


def test_all_tokens_choose_the_same_experts():
    """An expert has no capacity: two of them can do all the work."""
    model = random_transformer(ARGS)
    with torch.inference_mode():
        model.tok_embeddings.weight[:, 1] = 8  # large in every token, up to the last
        for layer in model.layers:
            gate = layer.feed_forward.gate.weight.zero_()
            gate[5, 1], gate[2, 1] = 1, 0.5
        prompts = random_prompts([32, 32, 9, 1])
        reference = to_transformers(ARGS, model.state_dict())
        out = reference(torch.tensor(prompts[:2]), output_router_logits=True)
    for scores in out.router_logits:
        assert (scores.topk(2).indices == torch.tensor([5, 2])).all()
    check_with_transformers(model, prompts)


def bfloat16_errors(model, prompts) -> tuple[float, float]:
    """How far we and transformers are in bfloat16 from transformers in float32.

    The median over tokens of root mean squares: if two experts score nearly the same,
    which one is chosen is chance, and such a token is far off with either.
    """
    args, state = model.params, model.state_dict()
    exact = to_transformers(args, {name: t.float() for name, t in state.items()})
    rounded = to_transformers(args, state, torch.bfloat16)
    right, theirs = (
        torch.cat([reference_logits(reference, prompt) for prompt in prompts])
        for reference in (exact, rounded)
    )
    ours = packed_logits(model, prompts)
    assert ours.dtype == torch.float32
    errors = (ours - right, theirs - right)
    return tuple(e.square().mean(-1).sqrt().median().item() for e in errors)


@pytest.mark.parametrize("top_k", [2, 8])
def test_bfloat16(top_k):
    """Nearer to float32 than transformers in bfloat16."""
    sizes = {"dim": 64, "vocab_size": 300, "num_experts_per_tok": top_k}
    args = dataclasses.replace(ARGS, **sizes)
    for seed in range(2):
        model = random_transformer(args, dtype=torch.bfloat16, seed=seed)
        prompts = random_prompts([32] * 4, args.vocab_size, seed)
        ours, theirs = bfloat16_errors(model, prompts)
        assert ours < 0.01  # the logits are about 1
        assert ours < theirs


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_on_any_processor(monkeypatch, amx):
    """The products that are chosen with AMX and without it are right, for one row and for more."""
    monkeypatch.setattr("mixtral.model.has_amx", lambda: amx)
    args = dataclasses.replace(ARGS, dim=64, vocab_size=300, max_seq_len=80)
    model = random_transformer(args, dtype=torch.bfloat16)
    ours, _ = bfloat16_errors(model, random_prompts([1, 2, 3], 300))
    assert ours < 0.01
    ours, _ = bfloat16_errors(model, random_prompts([70, 9], 300))
    assert ours < 0.01
    (prompt,) = random_prompts([20], 300)
    whole = model.forward(torch.tensor([prompt]))
    steps = [model.forward(torch.tensor([[token]]), i) for i, token in enumerate(prompt)]
    assert_same(torch.cat(steps, dim=1), whole, atol=0.1)


def load_demo(demo, dtype) -> tuple[Transformer, list[list[int]]]:
    """The trained model, and excerpts of a text that it has not seen."""
    model = Transformer(read_params(demo, 256, 4), dtype=dtype)
    load_checkpoint(model, demo)
    text = (demo / "heldout.txt").read_text(encoding="utf-8")
    tokens = Tokenizer(demo / "tokenizer.model").encode(text, bos=False, eos=False)
    cuts = [(len(tokens) * i // 4, n) for i, n in enumerate((120, 80, 50, 3))]
    return model, [[1, *tokens[start : start + n]] for start, n in cuts]


def test_demo_float32(demo):
    check_with_transformers(*load_demo(demo, torch.float32), steps=32)


def test_demo_bfloat16(demo):
    model, heldout = load_demo(demo, torch.bfloat16)
    ours, theirs = bfloat16_errors(model, heldout)
    assert ours < 1.05 * theirs
    # Weights in wrong places would do no better than chance, log(vocab_size).
    logits = packed_logits(model, heldout[:1])
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(heldout[0][1:]))
    assert loss < 0.6 * math.log(model.params.vocab_size)


# Against itself


ROWS = torch.tensor(random_prompts([LIMIT] * 4))


@pytest.mark.parametrize(
    "chunks", [[1] * 40, [39, 1], [1, 39], [20, 20], [5, 1, 1, 28, 2, 3]], ids=len
)
def test_cached_chunks_equal_one_forward(chunks):
    model = model_of()
    whole = model.forward(ROWS)
    assert whole.shape == (4, LIMIT, ARGS.vocab_size)
    parts = ROWS.split(chunks, dim=1)
    logits = [model.forward(p, sum(chunks[:i])) for i, p in enumerate(parts)]
    assert_same(torch.cat(logits, dim=1), whole)


def test_a_start_position_per_row():
    """What lies in the cache at a row's later positions has no influence."""
    model, starts = model_of(), [0, 3, 11, 24]
    whole = model.forward(ROWS)
    model.forward(ROWS.flip(1))
    for row, start in enumerate(starts[1:], 1):
        model.forward_packed(ROWS[row, :start], [Span(row, 0, start)])
    for length in (1, 4, 1):
        parts = [row[s : s + length] for row, s in zip(ROWS, starts)]
        right = [row[s : s + length] for row, s in zip(whole, starts)]
        assert_same(model.forward(torch.stack(parts), starts), torch.stack(right))
        starts = [start + length for start in starts]


def test_spans_in_any_order():
    """New prompts and single steps together, in no order of rows, not of all rows."""
    model = model_of()
    whole = model.forward(ROWS)
    model.forward_packed(ROWS[1, :9], [Span(1, 0, 9)])
    model.forward_packed(ROWS[2, :20], [Span(2, 0, 20)])
    spans = [Span(2, 20, 1), Span(3, 0, 6), Span(1, 9, 4)]
    tokens, right = (
        torch.cat([x[s.row, s.start : s.start + s.length] for s in spans]) for x in (ROWS, whole)
    )
    assert_same(model.forward_packed(tokens, spans), right)


@pytest.mark.parametrize("devices", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_devices_share_the_work(devices, top_k):
    """Of prompts and of a step, with the result of one device that has it all."""
    args = dataclasses.replace(ARGS, num_experts_per_tok=top_k)
    together = random_transformer(args)
    apart = random_transformer(args, ["cpu"] * devices)
    assert_same(apart.forward(ROWS), together.forward(ROWS))
    assert_same(apart.forward(ROWS[:, -1:], 39), together.forward(ROWS[:, -1:], 39))


@pytest.mark.parametrize("devices", [[], ["cpu"] * 9, ["cpu", "meta"]], ids=str)
def test_devices_that_cannot_share(devices):
    with pytest.raises(ValueError, match="share|one type"):
        Transformer(ARGS, devices)


def test_weights_are_not_replaced():
    """That would leave behind the larger tensors which some of them are slices of."""
    model = random_transformer(ARGS)
    right = model.forward(ROWS)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for replace in (model.float, model.half, model.layers[0].float, model.layers[1].attention.half):
        with pytest.raises(RuntimeError, match="build another"):
            replace()
    with pytest.raises(RuntimeError, match="build another"):
        model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="copy into"):
        model.load_state_dict(state, assign=True)
    other = random_transformer(ARGS, seed=1)
    other.load_state_dict(state)
    assert_same(model.forward(ROWS), right, atol=0)
    assert_same(other.forward(ROWS), right, atol=0)


def test_attention_whose_result_lies_otherwise_in_memory(monkeypatch):
    """PyTorch's memory-efficient attention returns heads and positions transposed."""
    model = model_of()
    right = model.forward(ROWS[:, :5])
    attention = F.scaled_dot_product_attention

    def transposed(*args, **kwargs):
        return attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    logits = [model.forward(ROWS[:, i : i + 1], i) for i in range(5)]
    assert_same(torch.cat(logits, dim=1), right)
    assert_same(model.forward(ROWS[:, :5]), right)


@pytest.mark.parametrize("rows", [24, 25])
def test_int8_of_more_rows_than_a_block(rows):
    """PyTorch's own product, and blocks of 1024 rows of the weight, of which the last is short."""
    x = torch.randn(rows, 48)
    weight = torch.randint(-127, 128, (2100, 48), dtype=torch.int8)
    scale = torch.rand(2100)
    want = x.double() @ (weight * scale.double()[:, None]).T
    assert_same(linear_int8(x, weight, scale).double(), want, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 40])
def test_int8_does_not_overflow_float16(rows):
    """The sums of unscaled 8-bit weights would be too large for it."""
    x = torch.full((rows, 4096), 0.5, dtype=torch.float16)
    weight = torch.full((16, 4096), 100, dtype=torch.int8)
    scale = torch.full((16,), 1e-3, dtype=torch.float16)
    want = x.double() @ (weight * scale.double()[:, None]).T
    assert_same(linear_int8(x, weight, scale).double(), want, atol=0.5)


@pytest.mark.parametrize(
    ("tokens", "start"), [(ROWS, 1), (ROWS[:, :2], -1), (ROWS.repeat(3, 1), 0), (ROWS, [0, 0])]
)
def test_tokens_beyond_the_cache(tokens, start):
    with pytest.raises(ValueError, match="max_"):
        model_of().forward(tokens, start)


@pytest.mark.parametrize("cpu_layers", [-1, 3])
def test_more_layers_on_the_host_than_there_are(cpu_layers):
    with pytest.raises(ValueError, match="cpu_layers must be 0 to 2"):
        Transformer(ARGS, cpu_layers=cpu_layers)


@pytest.mark.parametrize("field", vars(ARGS))
def test_impossible_sizes(field):
    positive = field in ("norm_eps", "rope_theta")
    values = (math.nan, math.inf, 10**400) if positive else (1.5, True)
    for value in (0, -1, None, "8", *values):
        with pytest.raises(ValueError, match=field):
            ModelArgs(**{field: value})


@pytest.mark.parametrize(
    "sizes", [{"head_dim": 7}, {"n_heads": 12}, {"num_experts_per_tok": 9}], ids=str
)
def test_sizes_that_do_not_go_together(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        ModelArgs(**sizes)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("args", [ARGS, ModelArgs()], ids=["tiny", "8x7B"])
def test_layout(args, devices):
    """All names and shapes of the torrent's file; ModelArgs' own sizes are 8x7B's."""
    dim, hidden, vocab = args.dim, args.hidden_dim, args.vocab_size
    heads, kv_heads = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    shapes = {"norm": (dim,), "output": (vocab, dim), "tok_embeddings": (vocab, dim)}
    layer = {"attention_norm": (dim,), "ffn_norm": (dim,)}
    layer |= {"attention.wq": (heads, dim), "attention.wk": (kv_heads, dim)}
    layer |= {"attention.wv": (kv_heads, dim), "attention.wo": (dim, heads)}
    layer |= {"feed_forward.gate": (args.num_experts, dim)}
    for e in range(args.num_experts):
        expert = f"feed_forward.experts.{e}"
        layer |= {f"{expert}.{w}": (hidden, dim) for w in ("w1", "w3")}
        layer |= {f"{expert}.w2": (dim, hidden)}
    for n in range(args.n_layers):
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    state = Transformer(args, ["meta"] * devices).state_dict()
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert ours == {f"{name}.weight": shape for name, shape in shapes.items()}
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    if args == ModelArgs():
        assert args.n_layers == 32 and (dim, heads, hidden) == (4096, 4096, 14336)
        assert sum(t.numel() for t in state.values()) == 46_702_792_704
