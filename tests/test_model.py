"""The model against transformers, and against itself where the results must agree."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import random_transformer, to_transformers

from mixtral import Mixtral, ModelArgs, Tokenizer, Transformer
from mixtral.checkpoint import load_checkpoint, read_params
from mixtral.model import Span

SMALL = ModelArgs(
    dim=24,
    n_layers=2,
    head_dim=8,
    hidden_dim=40,
    n_heads=6,
    n_kv_heads=2,
    vocab_size=100,
    num_experts=8,
    max_batch_size=4,
    max_seq_len=32,
)
SAME = {"rtol": 0, "atol": 1e-5}  # float32, but for the order of its sums
ENDLESS = SimpleNamespace(eos_id=-1)  # a tokenizer with which no text ends


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


def random_prompts(args: ModelArgs, lengths: list[int], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(args.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def reference_model(args: ModelArgs, state, dtype=torch.float32):
    """transformers' loop over experts: its grouped products refuse odd sizes."""
    reference = to_transformers(args, state, dtype)
    reference.set_experts_implementation("eager")
    return reference


def reference_logits(reference, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0].float()


def packed_logits(model: Transformer, prompts: list[list[int]], **kwargs):
    spans = [Span(row, 0, len(prompt)) for row, prompt in enumerate(prompts)]
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    return model.forward_packed(tokens, spans, **kwargs)


# Against transformers


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink a failure takes minutes
)
@given(
    args=configurations(),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_random_configurations(args, lengths, seed):
    """Logits of each prompt, and what greedy decoding makes of all in one batch."""
    model = random_transformer(args, seed=seed)
    reference = reference_model(args, model.state_dict())
    prompts = random_prompts(args, lengths, seed)
    logits = packed_logits(model, prompts).split(lengths)
    new, _ = Mixtral(model, ENDLESS).generate(prompts, max_gen_len=8, temperature=0)
    for prompt, ours, continuation in zip(prompts, logits, new):
        assert len(continuation) == 8
        theirs = reference_logits(reference, prompt + continuation)
        torch.testing.assert_close(ours, theirs[: len(prompt)], rtol=0, atol=1e-4)
        # Each token is the likeliest after those before it: this is greedy decoding.
        assert continuation == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_generate_equals_generate():
    """Token by token with transformers' own loop, at the same length of prompts."""
    model = random_transformer(SMALL, seed=3)
    reference = reference_model(SMALL, model.state_dict())
    prompts = random_prompts(SMALL, [7] * 4)
    theirs = reference.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(4, 7, dtype=torch.long),
        generation_config=type(reference.generation_config)(
            max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        ),
    )
    ours, _ = Mixtral(model, ENDLESS).generate(prompts, 20, temperature=0, echo=True)
    assert ours == theirs.tolist()


def test_long_prompts():
    """More tokens than one forward of generate() takes, so that prompts are cut."""
    args = ModelArgs(**{**vars(SMALL), "n_layers": 1, "max_seq_len": 1000})
    model = random_transformer(args)
    reference = reference_model(args, model.state_dict())
    prompts = random_prompts(args, [990, 3, 700, 900])
    ours, _ = Mixtral(model, ENDLESS).generate(prompts, 4, temperature=0)
    for prompt, continuation in zip(prompts, ours):
        theirs = reference_logits(reference, prompt + continuation)
        assert continuation == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_all_tokens_choose_the_same_experts():
    """No capacity, no dropped tokens: nothing changes when two experts do all work."""
    model = random_transformer(SMALL)
    with torch.inference_mode():
        model.tok_embeddings.weight[:, 1] = 8  # large in every token, up to the last
        for layer in model.layers:
            layer.feed_forward.gate.weight.zero_()
            layer.feed_forward.gate.weight[5, 1] = 1
            layer.feed_forward.gate.weight[2, 1] = 0.5
    reference = reference_model(SMALL, model.state_dict())
    lengths = [32, 32, 9, 1]
    prompts = random_prompts(SMALL, lengths)
    logits = packed_logits(model, prompts).split(lengths)
    for prompt, ours in zip(prompts, logits):
        with torch.inference_mode():
            out = reference(torch.tensor([prompt]), output_router_logits=True)
        for scores in out.router_logits:
            assert (scores.topk(2).indices == torch.tensor([5, 2])).all()
        torch.testing.assert_close(ours, out.logits[0], rtol=0, atol=1e-4)


def bfloat16_errors(model, prompts) -> tuple[float, float]:
    """How far we and transformers are in bfloat16 from transformers in float32.

    Of the root mean squares of each token's errors, the median: where two experts score
    nearly the same, the one chosen is chance, and such a token is far off with either.
    """
    args, state = model.params, model.state_dict()
    exact = reference_model(args, {name: t.float() for name, t in state.items()})
    rounded = reference_model(args, state, torch.bfloat16)
    right = torch.cat([reference_logits(exact, prompt) for prompt in prompts])
    theirs = torch.cat([reference_logits(rounded, prompt) for prompt in prompts])
    ours = packed_logits(model, prompts)
    return tuple(
        (logits - right).square().mean(-1).sqrt().median().item()
        for logits in (ours, theirs)
    )


@pytest.mark.parametrize("top_k", [2, 8])
def test_bfloat16(top_k):
    """Nearer to float32 than transformers is in bfloat16, by a tenth."""
    sizes = {"dim": 64, "vocab_size": 300, "num_experts_per_tok": top_k}
    args = ModelArgs(**{**vars(SMALL), **sizes})
    for seed in range(2):
        model = random_transformer(args, dtype=torch.bfloat16, seed=seed)
        ours, theirs = bfloat16_errors(model, random_prompts(args, [32] * 4, seed))
        assert ours < 0.01  # the logits are about 1
        assert ours < theirs


@pytest.fixture(scope="module")
def heldout(demo) -> list[list[int]]:
    """Three excerpts of the text that the demo has not seen, and a short one."""
    text = (demo / "heldout.txt").read_text(encoding="utf-8")
    tokens = Tokenizer(demo / "tokenizer.model").encode(text, bos=False, eos=False)
    starts = [len(tokens) * i // 4 for i in range(4)]
    return [
        [1, *tokens[start : start + length]]
        for start, length in zip(starts, (120, 80, 50, 3))
    ]


def load_demo(demo, dtype) -> Transformer:
    model = Transformer(read_params(demo, 256, 4), dtype=dtype)
    load_checkpoint(model, demo)
    return model


def test_demo_float32(demo, heldout):
    model = load_demo(demo, torch.float32)
    reference = reference_model(model.params, model.state_dict())
    lengths = [len(prompt) for prompt in heldout]
    logits = packed_logits(model, heldout).split(lengths)
    new, _ = Mixtral(model, ENDLESS).generate(heldout, max_gen_len=32, temperature=0)
    for prompt, ours, continuation in zip(heldout, logits, new):
        theirs = reference_logits(reference, prompt + continuation)
        torch.testing.assert_close(ours, theirs[: len(prompt)], rtol=0, atol=1e-4)
        assert continuation == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_demo_bfloat16(demo, heldout):
    model = load_demo(demo, torch.bfloat16)
    ours, theirs = bfloat16_errors(model, heldout)
    assert ours < 1.05 * theirs


def test_demo_has_learnt(demo, heldout):
    """Weights in the wrong places would do no better than chance, log(vocab_size)."""
    model = load_demo(demo, torch.bfloat16)
    tokens = torch.tensor(heldout[0])
    loss = torch.nn.functional.cross_entropy(
        model.forward(tokens[None])[0, :-1], tokens[1:]
    )
    assert loss < 0.6 * math.log(model.params.vocab_size)


# Against itself


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_transformer(SMALL)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.tensor(random_prompts(SMALL, [32] * 4))


@pytest.mark.parametrize(
    "chunks",
    [[1] * 32, [31, 1], [1, 31], [16, 16], [5, 1, 1, 20, 2, 3]],
    ids=["steps", "prompt and step", "step and prompt", "halves", "mixed"],
)
def test_cached_chunks_equal_one_forward(model, rows, chunks):
    whole = model.forward(rows)
    start, parts = 0, []
    for length in chunks:
        parts.append(model.forward(rows[:, start : start + length], start))
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **SAME)


def test_a_start_position_per_row(model, rows):
    """Rows at different places of their texts move on together."""
    whole = model.forward(rows)
    starts = [0, 3, 11, 24]
    packed_logits(model, [row[:start].tolist() for row, start in zip(rows, starts)][1:])
    for row, start in enumerate(starts):  # leaves every cache with its first part only
        if start:
            model.forward_packed(rows[row, :start], [Span(row, 0, start)])
    for length in (1, 4, 1):
        tokens = torch.stack([row[s : s + length] for row, s in zip(rows, starts)])
        logits = model.forward(tokens, starts)
        for row, start in enumerate(starts):
            right = whole[row, start : start + length]
            torch.testing.assert_close(logits[row], right, **SAME)
        starts = [start + length for start in starts]


def test_prompts_do_not_see_each_other(model):
    """Alone or packed with others, in any row of the cache, a prompt is the same."""
    prompts = random_prompts(SMALL, [1, 32, 5, 17])
    packed = packed_logits(model, prompts).split([1, 32, 5, 17])
    for prompt, logits in zip(prompts, packed):
        for row in range(4):
            alone = model.forward_packed(
                torch.tensor(prompt), [Span(row, 0, len(prompt))]
            )
            torch.testing.assert_close(alone, logits, **SAME)


def test_spans_in_any_order(model, rows):
    """New prompts and single steps together, in no order of rows, not all rows."""
    whole = model.forward(rows)
    model.forward_packed(rows[1, :9], [Span(1, 0, 9)])
    model.forward_packed(rows[2, :20], [Span(2, 0, 20)])
    spans = [Span(2, 20, 1), Span(3, 0, 6), Span(1, 9, 4)]
    tokens = torch.cat([rows[s.row, s.start : s.start + s.length] for s in spans])
    parts = model.forward_packed(tokens, spans).split([1, 6, 4])
    for (row, start, length), logits in zip(spans, parts):
        torch.testing.assert_close(logits, whole[row, start : start + length], **SAME)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [6], [1, 32, 5, 17]], ids=str)
def test_last_only(model, lengths):
    prompts = random_prompts(SMALL, lengths)
    every = packed_logits(model, prompts).split(lengths)
    last = packed_logits(model, prompts, last_only=True)
    assert last.shape == (len(lengths), SMALL.vocab_size)
    torch.testing.assert_close(last, torch.stack([e[-1] for e in every]), **SAME)


def test_logits_are_float32():
    model = random_transformer(SMALL, dtype=torch.bfloat16)
    logits = model.forward(torch.tensor([[1, 2], [3, 4]]))
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 2, SMALL.vocab_size)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_devices_share_the_work(devices, top_k, rows):
    """Experts apart and summed, or together: the same, for prompts and for a step."""
    args = ModelArgs(**{**vars(SMALL), "num_experts_per_tok": top_k})
    together = random_transformer(args)
    apart = random_transformer(args, ["cpu"] * devices)
    torch.testing.assert_close(apart.forward(rows), together.forward(rows), **SAME)
    step = rows[:, -1:]
    torch.testing.assert_close(
        apart.forward(step, 31), together.forward(step, 31), **SAME
    )


@pytest.mark.parametrize("devices", [0, 3, 5, 16])
def test_devices_that_cannot_share(devices):
    with pytest.raises(ValueError):
        Transformer(SMALL, ["cpu"] * devices)


# The checkpoint's layout


def layout(
    *, dim, layers, heads, kv_heads, head_dim, hidden, vocab, experts
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the torrent's file."""
    table = {
        "tok_embeddings.weight": (vocab, dim),
        "norm.weight": (dim,),
        "output.weight": (vocab, dim),
    }
    for n in range(layers):
        table |= {
            f"layers.{n}.attention_norm.weight": (dim,),
            f"layers.{n}.ffn_norm.weight": (dim,),
            f"layers.{n}.attention.wq.weight": (heads * head_dim, dim),
            f"layers.{n}.attention.wk.weight": (kv_heads * head_dim, dim),
            f"layers.{n}.attention.wv.weight": (kv_heads * head_dim, dim),
            f"layers.{n}.attention.wo.weight": (dim, heads * head_dim),
            f"layers.{n}.feed_forward.gate.weight": (experts, dim),
        }
        for m in range(experts):
            table |= {
                f"layers.{n}.feed_forward.experts.{m}.w1.weight": (hidden, dim),
                f"layers.{n}.feed_forward.experts.{m}.w2.weight": (dim, hidden),
                f"layers.{n}.feed_forward.experts.{m}.w3.weight": (hidden, dim),
            }
    return table


def test_small_layout():
    args = ModelArgs(
        dim=12,
        n_layers=3,
        head_dim=4,
        hidden_dim=10,
        n_heads=6,
        n_kv_heads=2,
        vocab_size=50,
        num_experts=5,
        max_seq_len=1,
    )
    table = layout(
        dim=12,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=4,
        hidden=10,
        vocab=50,
        experts=5,
    )
    state = Transformer(args).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == table


@pytest.mark.parametrize("devices", [1, 4])
def test_8x7b_layout(devices):
    """The published sizes are ModelArgs' own, and no tensor has another name."""
    table = layout(
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        hidden=14336,
        vocab=32000,
        experts=8,
    )
    state = Transformer(ModelArgs(), ["meta"] * devices).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == table
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in state.values()) == 46_702_792_704
