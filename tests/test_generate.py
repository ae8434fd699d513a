"""Batches of prompts: every row ends up with the tokens that transformers gives it."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.reference import random_transformer
from helpers.tiny import (
    ARGS,
    LIMIT,
    Stub,
    check_greedy,
    expected,
    in_thread,
    random_prompts,
    saying,
    tiny,
    to_the_limit,
)

from mixtral import Mixtral, ModelArgs, Tokenizer, generation

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

PROMPTS = random_prompts([2, 31, 9, 1, 17])
POOL = random_prompts([1, 2, 3, 5, 7, 11, 16, 23, 24, 31, 39, LIMIT, 1, 4, 6, 7, 19])


@st.composite
def requests(draw):
    room = draw(st.sampled_from([7, 24, LIMIT]))
    fitting = [prompt for prompt in POOL if len(prompt) <= room]
    prompts = draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=8))
    # Often a token that is to come in some row, which ends there, or is in a prompt.
    tokens, _ = to_the_limit(tuple(draw(st.sampled_from(prompts))))
    return SimpleNamespace(
        eos=draw(st.one_of(st.just(-1), st.sampled_from(tokens))),
        room=room,
        chunk=draw(st.sampled_from([2048, 2048, 1, 3, 7, 16])),
        arguments={
            "prompts": prompts,
            "max_gen_len": draw(st.one_of(st.integers(0, 9), st.integers(0, LIMIT + 5))),
            "echo": draw(st.booleans()),
            "logprobs": draw(st.booleans()),
        },
    )


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(request=requests())
def test_random_batches(request):
    """Prompts up to max_seq_len, in any number of passes, with any token as eos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "prefill_tokens", lambda device: request.chunk)
        check_greedy(tiny(request.eos, request.room), **request.arguments)


@pytest.mark.parametrize("chunk, cut", [(1, 1), (3, 2), (7, 2), (2048, 5)])
def test_passes(monkeypatch, chunk, cut):
    """Prompts share passes that are full, then each pass is one step of all rows.

    Logits within a prompt are computed only for echo with logprobs.
    """
    monkeypatch.setattr(generation, "prefill_tokens", lambda device: chunk)
    whole, rest = divmod(sum(map(len, PROMPTS)), chunk)
    chunks = [chunk] * whole + [rest] * (rest > 0)
    for echo, logprobs in itertools.product([False, True], repeat=2):
        generator = tiny()
        check_greedy(generator, PROMPTS, 4, echo=echo, logprobs=logprobs)
        sizes = generator.model.sizes
        assert [tokens for tokens, _ in sizes] == chunks + [5] * 3
        assert sizes[0][1] == (chunks[0] if echo and logprobs else cut)


def test_rows_that_have_ended_leave():
    """By eos, max_gen_len or max_seq_len: a pass has as many tokens as rows go on."""
    for step in (0, 1, 4, 8):
        prompts = random_prompts([3, 12, 35, 40, 1, 29], seed=step)
        eos = to_the_limit(tuple(prompts[step % 2]))[0][len(prompts[step % 2]) + step]
        generator = tiny(eos)
        check_greedy(generator, prompts, 11)
        # A row's last token is not put into the model, unless eos has come after it.
        last = [
            min(len(expected(prompt, 11, eos)[0]), min(11, LIMIT - len(prompt)) - 1)
            for prompt in prompts
        ]
        going = [sum(end > k for end in last) for k in range(max(last))]
        assert generator.model.sizes[1:] == [(rows, rows) for rows in going]


def test_no_mask_of_a_whole_prompt(monkeypatch):
    """What a long prompt takes grows with its length times that of a chunk.

    The profiler sees what is allocated inside composite operations too.
    """
    length, chunk = 4096, 256
    sizes = {"dim": 8, "n_layers": 1, "head_dim": 4, "n_heads": 2, "n_kv_heads": 1}
    sizes |= {"hidden_dim": 8, "vocab_size": 16, "num_experts": 2}
    args = ModelArgs(**sizes, max_batch_size=1, max_seq_len=length)
    generator = Mixtral(random_transformer(args), SimpleNamespace(eos_id=-1))
    monkeypatch.setattr(generation, "prefill_tokens", lambda device: chunk)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        generator.generate([[3] * length], 1, temperature=0)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert chunk * length <= largest  # the profiler does see the chunks' masks
    assert largest <= 8 * chunk * length < length * length


@pytest.mark.parametrize("passes", [0, 2, 4, 9])
def test_after_an_interruption(monkeypatch, passes):
    """In a prompt's first chunk, in a later one, or while decoding."""
    monkeypatch.setattr(generation, "prefill_tokens", lambda device: 16)
    generator, count = tiny(), itertools.count()

    def interrupt(*_):
        if next(count) == passes:
            raise KeyboardInterrupt

    hook = generator.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS[::-1], 12, temperature=0)
    hook.remove()
    in_thread(check_greedy, generator, PROMPTS, 6, echo=True).result(30)


@pytest.mark.parametrize("echo", [False, True])
def test_text_completion(v1, echo):
    """A row ends before eos, even if that comes first, or at max_seq_len."""
    tokenizer = Tokenizer(v1)
    said = {"Hello": "there 🙂", "": "x", "混 é": "", "Go": "on and " * 100}
    prompts = [tokenizer.encode(text, bos=True, eos=False) for text in said]
    scripts = [tokenizer.encode(text, bos=False, eos=False) for text in said.values()]
    generator = saying(tokenizer, prompts, scripts, max_seq_len=100)
    tokens = [
        (prompt + script)[0 if echo else len(prompt) : 100]
        for prompt, script in zip(prompts, scripts)
    ]
    texts = [tokenizer.decode(ids) for ids in tokens]
    assert texts[:3] == (["Hello there 🙂", "x", "混 é"] if echo else ["there 🙂", "x", ""])
    answers = generator.text_completion([*said], echo=echo)
    assert answers == [{"generation": text} for text in texts]
    answers = generator.text_completion([*said], echo=echo, logprobs=True)
    for answer, text, ids, prompt in zip(answers, texts, tokens, prompts, strict=True):
        values = answer.pop("logprobs")
        pieces = [tokenizer.decode([token]) for token in ids]
        assert answer == {"generation": text, "tokens": pieces}
        assert len(values) == len(ids)
        assert not any(values[len(prompt) * echo :]) and not any(values[:echo])


def test_no_prompts(v1):
    generator = Mixtral(Stub(None), Tokenizer(v1))
    assert generator.generate([], 5) == ([], None)
    assert generator.generate([], 5, logprobs=True) == ([], [])
    for options in ({}, {"logprobs": True, "max_gen_len": 5}):
        assert generator.text_completion([], **options) == []
        assert generator.chat_completion([], **options) == []


@pytest.mark.parametrize(
    "prompts",
    [
        *([[1]] * 9, [[1], []], [[1], [1] * (LIMIT + 1)]),
        *([[61]], [[1], [2, -1]], [[1, 2.0]], [["a"]], [[None]], [[10**30]]),
        *("abc", ["abc"], [1, 2, 3], [None]),
    ],
    ids=lambda prompts: str(prompts)[:20],
)
def test_impossible_prompts(prompts):
    generator = tiny()
    with pytest.raises(ValueError):
        generator.generate(prompts, 3)
    assert generator.model.sizes == []


@pytest.mark.parametrize(
    "option, values",
    [
        ("max_gen_len", (-1, 1.5, "3", True, math.nan)),
        ("temperature", (-0.1, "0.6", None, math.inf, math.nan, 10**400)),
        ("top_p", (0.0, -0.1, 1.1, "0.9", None, math.nan)),
    ],
)
def test_impossible_options(option, values):
    generator = tiny()
    for value in values:
        with pytest.raises(ValueError, match=option):
            generator.generate([[1]], **{"max_gen_len": 3, option: value})
    assert generator.model.sizes == []


def test_impossible_calls(demo):
    """A stream is checked when it is asked for, not when its first piece is."""
    tokenizer = Tokenizer(demo / "tokenizer.model")
    generator = Mixtral(Stub(None, vocab_size=2048, max_seq_len=16), tokenizer)
    for method, argument, options in [
        ("text_completion", "abc", {}),
        ("text_completion", [7], {}),
        ("text_completion", ["In the beginning " * 9], {}),
        ("stream_completion", ["abc"], {}),
        ("stream_completion", "In the beginning " * 9, {}),
        ("stream_completion", "abc", {"temperature": math.nan}),
        ("stream_completion", "abc", {"max_gen_len": -1}),
        ("chat_completion", [{"role": "user", "content": "Hi"}], {}),
        ("chat_completion", {"role": "user", "content": "Hi"}, {}),
        *((name, None, {}) for name in ("text_completion", "chat_completion")),
        *(("generate", tokens, {"max_gen_len": 2}) for tokens in (None, iter([[1]]))),
        ("chat_completion", [[{"role": "user", "content": "Hi"}]], {"top_p": 2}),
    ]:
        with pytest.raises(ValueError):
            getattr(generator, method)(argument, **options)


@pytest.mark.parametrize(
    "option, value",
    [
        *(("max_seq_len", value) for value in (0, -1, 2.5, True)),
        *(("max_batch_size", value) for value in (0, -4)),
        *(("dtype", getattr(torch, name)) for name in ("int8", "bool", "complex64")),
        *(("seed", value) for value in (None, 1.5, "a", -1, 2**64)),
        ("int8", "no"),
    ],
)
def test_impossible_build(demo, option, value):
    options = {"max_seq_len": 8, "max_batch_size": 1, "num_gpus": 0, option: value}
    with pytest.raises(ValueError, match=option):
        Mixtral.build(demo, demo / "tokenizer.model", **options)


@pytest.mark.parametrize(
    "name, value",
    [
        ("layers.1.ffn_norm.weight", math.nan),
        ("layers.1.feed_forward.gate.weight", math.inf),
        ("output.weight", math.nan),
    ],
)
def test_damaged_weights(demo, name, value):
    """Logits that are not finite end a request and free the cache for other threads."""
    model = random_transformer(dataclasses.replace(ARGS, vocab_size=2048))
    model.get_parameter(name).view(-1)[5] = value
    generator = Mixtral(model, Tokenizer(demo / "tokenizer.model"))
    prompt, dialog = "In the beginning", [{"role": "user", "content": "Hi"}]
    prompt_only = {"max_gen_len": 0, "echo": True, "logprobs": True}
    for call in (
        lambda: generator.generate([[1, 2, 3]], None),
        lambda: generator.generate([[1, 2, 3]], None, temperature=0),
        lambda: generator.text_completion([prompt]),
        lambda: generator.text_completion([prompt], **prompt_only),
        lambda: list(generator.stream_completion(prompt)),
        lambda: generator.chat_completion([dialog]),
    ):
        with pytest.raises(RuntimeError, match="damaged"):
            in_thread(call).result(30)
