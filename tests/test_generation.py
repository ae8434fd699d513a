"""Generation: batches, chunks, streams, dialogs, draws, and where a text ends."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from reference import random_transformer, to_transformers
from simulated import simulated_cuda

import mixtral.generation
import mixtral.model
from mixtral import Mixtral, ModelArgs, Tokenizer, Transformer
from mixtral.generation import sample_top_p


def chunks_of(tokens: int) -> dict[str, int]:
    """PREFILL_TOKENS, the same on every device."""
    return dict.fromkeys(("cpu", "cuda"), tokens)


LIMIT = 40
ARGS = ModelArgs(
    dim=24,
    n_layers=2,
    head_dim=8,
    hidden_dim=40,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=61,
    num_experts=8,
    max_batch_size=8,
    max_seq_len=LIMIT,
)
ROOMS = (7, 24, LIMIT)  # what max_seq_len may be
RAGGED = (2, 31, 9, 1, 17)
NEAR = functools.partial(pytest.approx, rel=0, abs=1e-4)  # for log-probabilities
TAGS = ("[INST]", "[/INST]", "<s>", "</s>")
TEXTS = {
    "words": "Simply put, the theory of relativity states that",
    "Chinese": "混合专家模型把每个词元交给两个专家。",
    "Chinese in bytes": "龘靐 齉爩",
    "emoji": "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽 duck: 🦆",
    "combining marks": "e\u0301 n\u0303 o\u0308\u0304 क्षि",
    "mixture": "  a\n\n\tœuvre 𐍈é𓀀 end ",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small are these models that threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def model_of(max_seq_len: int) -> Transformer:
    """The same weights for all lengths."""
    return random_transformer(dataclasses.replace(ARGS, max_seq_len=max_seq_len))


def tiny(eos: int = -1, max_seq_len: int = LIMIT, seed: int = 1) -> Mixtral:
    """By default no text of it ends before its limit."""
    return Mixtral(model_of(max_seq_len), SimpleNamespace(eos_id=eos), seed)


@functools.cache
def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(f"{length} {seed}")
    return tuple(draw.randrange(ARGS.vocab_size) for _ in range(length))


def ragged() -> list[list[int]]:
    return [list(prompt_of(length)) for length in RAGGED]


# The plain way: transformers, one prompt, the whole text anew for every token.


@functools.cache
def reference():
    model = to_transformers(ARGS, model_of(LIMIT).state_dict())
    model.set_experts_implementation("eager")
    return model


def reference_logprobs(tokens: list[int]) -> torch.Tensor:
    """Those of all tokens of the vocabulary after each of these."""
    with torch.inference_mode():
        return reference()(torch.tensor([tokens])).logits[0].log_softmax(-1)


def logprobs_of(tokens: list[int]) -> list[float]:
    """That of each token after those before it, 0 for the first."""
    rows = reference_logprobs(tokens)
    return [0.0, *(rows[i, t].item() for i, t in enumerate(tokens[1:]))]


@functools.cache
def to_the_limit(prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """The prompt and its likeliest continuation, and all log-probabilities."""
    tokens, values = list(prompt), logprobs_of(list(prompt))
    while len(tokens) < LIMIT:
        last = reference_logprobs(tokens)[-1]
        tokens.append(last.argmax().item())
        values.append(last[tokens[-1]].item())
    return tokens, values


def expected(
    prompt, max_gen_len=LIMIT, eos=-1, room=LIMIT, echo=False
) -> tuple[list[int], list[float]]:
    tokens, values = to_the_limit(tuple(prompt))
    begin, end = len(prompt), min(len(prompt) + max_gen_len, room)
    if eos in tokens[begin:end]:
        end = tokens.index(eos, begin)
    begin = 0 if echo else begin
    return tokens[begin:end], values[begin:end]


def check(results, prompts, *, echo=False, **limits):
    """Results of generate(), greedy and with log-probabilities, are as expected."""
    tokens, values = results
    assert len(tokens) == len(values) == len(prompts)
    for prompt, ours, its_values in zip(prompts, tokens, values):
        right, right_values = expected(prompt, echo=echo, **limits)
        assert ours == right
        assert its_values == NEAR(right_values)
        if echo:
            assert its_values[0] == 0.0


def greedy(generator: Mixtral, prompts, max_gen_len=LIMIT, **options):
    options = {"logprobs": True} | options
    return generator.generate(prompts, max_gen_len, temperature=0, **options)


@contextlib.contextmanager
def watched(model: Transformer):
    """For each pass through the model, how many tokens go in and logits come out."""
    sizes = []
    enters = model.tok_embeddings.register_forward_pre_hook(
        lambda _, args: sizes.append([args[0].numel()])
    )
    leaves = model.output.register_forward_hook(
        lambda _, args, out: sizes[-1].append(len(out))
    )
    try:
        yield sizes
    finally:
        enters.remove()
        leaves.remove()


# Batches


def test_prompts_of_all_lengths_take_one_pass():
    """Then every pass is one step of all rows, each at its own position."""
    generator = tiny()
    with watched(generator.model) as sizes:
        results = greedy(generator, ragged(), 6)
    assert sizes == [[sum(RAGGED), 5]] + [[5, 5]] * 5
    check(results, ragged(), max_gen_len=6)


def test_alone_or_together():
    together = greedy(tiny(), ragged(), 12, echo=True)
    check(together, ragged(), max_gen_len=12, echo=True)
    for prompt, tokens, values in zip(ragged(), *together):
        (alone,), (its_values,) = greedy(tiny(), [prompt], 12, echo=True)
        assert alone == tokens
        assert its_values == NEAR(values)


def test_a_row_does_not_matter():
    """The same prompt in every row, among others, in any order."""
    prompts = ragged()[:3]
    for order in itertools.permutations(range(3)):
        batch = [prompts[i] for i in (*order, *order)]
        check(greedy(tiny(), batch, 4), batch, max_gen_len=4)


def test_forward_takes_a_start_position_per_row():
    model, starts = model_of(LIMIT), [4, 20, 1]
    texts = [to_the_limit(prompt_of(length))[0] for length in (1, 2, 9)]
    longest = torch.tensor([text[: max(starts)] for text in texts])
    model.forward(longest)  # beyond its start a row's cache is not to be looked at
    for length in (1, 5, 1):
        parts = [text[s : s + length] for text, s in zip(texts, starts)]
        logits = model.forward(torch.tensor(parts), starts)
        assert logits.shape == (3, length, ARGS.vocab_size)
        for text, start, ours in zip(texts, starts, logits):
            theirs = reference_logprobs(text[: start + length])[start:]
            torch.testing.assert_close(ours.log_softmax(-1), theirs, rtol=0, atol=1e-4)
        starts = [start + length for start in starts]


def last_steps(prompts, eos: int, max_gen_len: int) -> list[int]:
    """The step at which each row ends: that of its eos, or of its last token."""
    lengths = [len(expected(p, max_gen_len, eos)[0]) for p in prompts]
    limits = [min(max_gen_len, LIMIT - len(p)) for p in prompts]
    return [min(length, limit - 1) for length, limit in zip(lengths, limits)]


def test_rows_that_have_ended_leave():
    """By eos, max_gen_len or max_seq_len: a pass has as many tokens as rows go on."""
    shrank = 0
    for i, step in enumerate((0, 1, 4, 8)):
        prompts = [list(prompt_of(n, seed=i)) for n in (3, 12, 35, 40, 1, 29)]
        eos = to_the_limit(tuple(prompts[i % 2]))[0][len(prompts[i % 2]) + step]
        generator = tiny(eos)
        with watched(generator.model) as sizes:
            results = greedy(generator, prompts, 11)
        check(results, prompts, max_gen_len=11, eos=eos)
        last = last_steps(prompts, eos, 11)
        going = [sum(end > k for end in last) for k in range(max(last))]
        assert sizes[1:] == [[n, n] for n in going]
        shrank += len(set(going)) > 2
    assert shrank >= 3  # or it would have shown little


POOL = [
    prompt_of(length, seed)
    for seed, lengths in enumerate(
        [(1, 2, 3, 5, 7, 11, 16, 23, 24, 31, 39, LIMIT), (1, 1, 4, 6, 7, 7, 19, 24)]
    )
    for length in lengths
]


@st.composite
def requests(draw):
    room = draw(st.sampled_from(ROOMS))
    fitting = [prompt for prompt in POOL if len(prompt) <= room]
    prompts = draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=8))
    # Often a token that is to come somewhere, which makes its row end there.
    tokens = to_the_limit(draw(st.sampled_from(prompts)))[0]
    eos = draw(st.one_of(st.just(-1), st.sampled_from(tokens)))
    return SimpleNamespace(
        prompts=[list(prompt) for prompt in prompts],
        eos=eos,
        room=room,
        max_gen_len=draw(st.one_of(st.integers(0, 9), st.integers(0, LIMIT + 5))),
        chunk=draw(st.sampled_from([2048, 2048, 1, 3, 7, 16])),
        echo=draw(st.booleans()),
        logprobs=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(request=requests())
def test_random_batches(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtral.generation, "PREFILL_TOKENS", chunks_of(request.chunk))
        tokens, values = greedy(
            tiny(request.eos, request.room),
            request.prompts,
            request.max_gen_len,
            logprobs=request.logprobs,
            echo=request.echo,
        )
    limits = {name: getattr(request, name) for name in ("max_gen_len", "eos", "room")}
    if request.logprobs:
        check((tokens, values), request.prompts, echo=request.echo, **limits)
    else:
        assert values is None
        for prompt, ours in zip(request.prompts, tokens, strict=True):
            assert ours == expected(prompt, echo=request.echo, **limits)[0]


# Prompts in chunks


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks(monkeypatch, chunk, echo):
    """The same results from passes that are full, and no more of them than needed."""
    monkeypatch.setattr(mixtral.generation, "PREFILL_TOKENS", chunks_of(chunk))
    generator = tiny()
    with watched(generator.model) as sizes:
        results = greedy(generator, ragged(), 4, echo=echo)
    check(results, ragged(), max_gen_len=4, echo=echo)
    whole, rest = divmod(sum(RAGGED), chunk)
    chunks = [chunk] * whole + [rest] * (rest > 0)
    assert [tokens for tokens, _ in sizes] == chunks + [5] * 3


@pytest.mark.parametrize(
    "echo, logprobs, logits",
    [(False, False, 5), (True, False, 5), (False, True, 5), (True, True, sum(RAGGED))],
)
def test_only_the_logits_that_are_asked_for(echo, logprobs, logits):
    generator = tiny()
    with watched(generator.model) as sizes:
        greedy(generator, ragged(), 1, echo=echo, logprobs=logprobs)
    assert sizes == [[sum(RAGGED), logits]]


def test_no_mask_of_a_whole_prompt(monkeypatch):
    """What a long prompt takes grows with its length times that of a chunk.

    The profiler sees what is allocated inside composite operations too.
    """
    length, chunk = 4096, 256
    args = ModelArgs(
        dim=8,
        n_layers=1,
        head_dim=4,
        hidden_dim=8,
        n_heads=2,
        n_kv_heads=1,
        vocab_size=16,
        num_experts=2,
        max_batch_size=1,
        max_seq_len=length,
    )
    generator = Mixtral(random_transformer(args), SimpleNamespace(eos_id=-1))
    monkeypatch.setattr(mixtral.generation, "PREFILL_TOKENS", chunks_of(chunk))
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        watched(generator.model) as sizes,
    ):
        greedy(generator, [[3] * length], 1)
    assert sizes == [[chunk, 1]] * (length // chunk)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert chunk * length <= largest  # the profiler does see the chunks' masks
    assert largest <= 8 * chunk * length < length * length


# Stand-ins for a model


class Stub:
    """In a Transformer's place: answer(row, tokens of the row so far) are its logits."""

    device = torch.device("cpu")

    def __init__(self, answer, max_batch_size: int = 8, max_seq_len: int = 4096):
        self.answer, self.heard, self.passes = answer, {}, 0
        self.params = ModelArgs(max_batch_size=max_batch_size, max_seq_len=max_seq_len)

    def forward_packed(self, tokens, spans, last_only=False):
        self.passes += 1
        logits = []
        for span, part in zip(spans, tokens.split([s.length for s in spans])):
            before = self.heard.get(span.row, [])[: span.start]
            assert len(before) == span.start
            heard = self.heard[span.row] = before + part.tolist()
            ends = range(span.start + 1, len(heard) + 1)
            ends = ends[-1:] if last_only else ends
            logits += [self.answer(span.row, heard[:end]) for end in ends]
        return torch.stack(logits)


def saying(tokenizer: Tokenizer, prompts: list[str], *scripts: list[int], **sizes):
    """A Mixtral that says scripts[row] after prompts[row], and then eos."""
    lengths = [len(tokenizer.encode(p, bos=True, eos=False)) for p in prompts]

    def answer(row, heard):
        said = heard[lengths[row] :]
        assert said == scripts[row][: len(said)]
        logits = torch.zeros(tokenizer.n_words)
        logits[[*scripts[row], tokenizer.eos_id][len(said)]] = 1000.0
        return logits

    return Mixtral(Stub(answer, **sizes), tokenizer)


@pytest.fixture(scope="module", params=["v1", "v3"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def writer(tokenizer) -> Transformer:
    """A real model, whose texts are a jumble of all languages."""
    sizes = {"dim": 16, "n_layers": 1, "vocab_size": tokenizer.n_words}
    return random_transformer(
        dataclasses.replace(ARGS, **sizes, max_seq_len=96), seed=5
    )


# Streams


@pytest.mark.parametrize("name", TEXTS)
def test_stream_of_text(tokenizer, name):
    text = TEXTS[name]
    script = tokenizer.encode(text, bos=False, eos=False)
    generator = saying(tokenizer, ["Bonjour"], script)
    for temperature in (0, 0.6):
        pieces = list(generator.stream_completion("Bonjour", temperature))
        assert "".join(pieces) == text
        assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
        (whole,) = generator.text_completion(["Bonjour"], temperature)
        assert whole == {"generation": text}


@pytest.mark.parametrize("name", ["Chinese in bytes", "emoji", "combining marks"])
def test_stream_cut_anywhere(tokenizer, name):
    """In the middle of a character it gives what text_completion gives."""
    script = tokenizer.encode(TEXTS[name], bos=False, eos=False)
    generator = saying(tokenizer, [""], script)
    cut = 0
    for length in range(len(script) + 2):
        pieces = list(generator.stream_completion("", 0, max_gen_len=length))
        (whole,) = generator.text_completion([""], 0, max_gen_len=length)
        assert "".join(pieces) == whole["generation"]
        # A character that never becomes whole is out with the last piece, if at all.
        assert not any("\ufffd" in piece for piece in pieces[:-1])
        cut += "\ufffd" in whole["generation"]
    assert cut or name == "combining marks"


def test_stream_comes_as_it_is_made(tokenizer):
    script = tokenizer.encode("one two three four five six", bos=False, eos=False)
    generator = saying(tokenizer, ["zero"], script)
    stream = generator.stream_completion("zero", 0)
    assert generator.model.passes == 0
    passes = []
    for _ in stream:
        passes.append(generator.model.passes)
    assert passes == sorted(set(passes))
    assert passes[0] <= 2 and len(passes) >= len(script) - 1


@pytest.mark.parametrize("temperature, top_p", [(0, 0.9), (0.6, 0.9), (1.5, 1.0)])
def test_stream_equals_text_completion(tokenizer, writer, temperature, top_p):
    for seed, prompt in enumerate(["", "混合 🙂"]):
        options = {"temperature": temperature, "top_p": top_p, "max_gen_len": 25}
        stream = Mixtral(writer, tokenizer, seed).stream_completion(prompt, **options)
        pieces = list(stream)
        (whole,) = Mixtral(writer, tokenizer, seed).text_completion([prompt], **options)
        assert "".join(pieces) == whole["generation"]
        assert len(pieces) > 10


def test_stream_of_random_bytes(tokenizer):
    """Most of them no characters at all, between pieces of all kinds."""
    n_words, first = tokenizer.n_words, tokenizer.sp_model.piece_to_id("<0x00>")
    logits = torch.full((n_words,), -11.0)
    logits[first + 0x80 : first + 0x100] = 0.0
    logits[tokenizer.eos_id] = -math.inf
    broken = 0
    for seed in range(8):
        options = {"temperature": 1.0, "top_p": 1.0, "max_gen_len": 40}
        stream, whole = (
            Mixtral(Stub(lambda row, heard: logits), tokenizer, seed) for _ in range(2)
        )
        text = whole.text_completion(["x"], **options)[0]["generation"]
        assert "".join(stream.stream_completion("x", **options)) == text
        broken += "\ufffd" in text
    assert broken == 8


def test_stream_of_max_seq_len(tokenizer, writer):
    pieces = Mixtral(writer, tokenizer).stream_completion("Hello", 0)
    (whole,) = Mixtral(writer, tokenizer).text_completion(["Hello"], 0, logprobs=True)
    prompt = tokenizer.encode("Hello", bos=True, eos=False)
    assert len(prompt) + len(whole["tokens"]) == writer.params.max_seq_len
    assert "".join(pieces) == whole["generation"]


def test_abandoned_stream(tokenizer, writer):
    """Closed or only left lying, it changes nothing for later calls."""
    generator = Mixtral(writer, tokenizer)
    fresh = Mixtral(writer, tokenizer).text_completion(["One", "Another one"], 0)
    for close in (True, False):
        stream = generator.stream_completion("A long story, which nobody hears out", 0)
        assert next(stream) and next(stream) and next(stream)
        if close:
            stream.close()
        assert generator.text_completion(["One", "Another one"], 0) == fresh
        pieces = list(generator.stream_completion("One", 0))
        assert "".join(pieces) == fresh[0]["generation"]


# Dialogs


def dialog(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def random_text(draw: random.Random, least: int) -> str:
    """Of at least so many parts, and without tags."""
    parts = [*TEXTS.values(), "a", "Hi", " ", "  ", "\n", "\n\n", "\t", "\r\n", "é"]
    parts += ["🦆", "[", "]", "[INST ]", "/INST]", "<", "s>", "<unk>", "▁", "\x00", "�"]
    parts += [chr(draw.choice([0x20, 0x3A0, 0x4E00, 0x1F600]) + draw.randrange(64))]
    while True:
        text = "".join(draw.choices(parts, k=draw.randint(least, 6)))
        if not any(tag in text for tag in TAGS):
            return text


def random_dialog(draw: random.Random) -> list[dict[str, str]]:
    """Of one to seven turns; only what the user says may be empty."""
    turns = 2 * draw.randint(0, 3) + 1
    contents = [random_text(draw, i % 2) for i in range(turns)]
    system = random_text(draw, 1) if draw.random() < 0.5 else None
    return dialog(*contents, system=system)


@pytest.fixture(scope="module")
def official(tokenizer) -> MistralTokenizer:
    versions = {32000: MistralTokenizer.v1, 32768: MistralTokenizer.v3}
    return versions[tokenizer.n_words]()


def official_tokens(official: MistralTokenizer, messages) -> list[int]:
    kinds = {"system": SystemMessage, "user": UserMessage}
    kinds["assistant"] = AssistantMessage
    typed = [kinds[m["role"]](content=m["content"]) for m in messages]
    return official.encode_chat_completion(ChatCompletionRequest(messages=typed)).tokens


def heard_by_a_model(tokenizer: Tokenizer, dialogs) -> list[list[int]]:
    """The prompts that chat_completion makes of dialogs."""
    logits = torch.zeros(tokenizer.n_words)
    logits[tokenizer.eos_id] = 1.0
    stub = Stub(lambda row, heard: logits, max_batch_size=len(dialogs))
    answers = Mixtral(stub, tokenizer).chat_completion(dialogs, temperature=0)
    assert answers == [{"generation": {"role": "assistant", "content": ""}}] * len(
        dialogs
    )
    return [stub.heard[row] for row in range(len(dialogs))]


def test_dialogs_are_encoded_as_published(tokenizer, official):
    draw = random.Random(7)
    dialogs = [random_dialog(draw) for _ in range(200)]
    before = copy.deepcopy(dialogs)
    prompts = heard_by_a_model(tokenizer, dialogs)
    for messages, prompt in zip(dialogs, prompts, strict=True):
        assert prompt == official_tokens(official, messages), messages
    assert dialogs == before


def test_an_empty_system_message_says_nothing(tokenizer, official):
    dialogs = [dialog("Hi", system=""), dialog("Hi", "Hello", "How?", system="")]
    for messages, prompt in zip(dialogs, heard_by_a_model(tokenizer, dialogs)):
        assert prompt == official_tokens(official, messages)


GOOD = [
    dialog("Who are you?"),
    dialog("Hi", "Hello!", "And now?", system="Be brief."),
    dialog("1", "2", "3", "4", "5"),
]
BAD = {
    "empty": [],
    "only a system message": dialog(system="Be brief."),
    "ends with the assistant": dialog("Hi", "Hello!"),
    "ends with the assistant, after system": dialog("Hi", "Hello!", system="Brief."),
    "begins with the assistant": dialog("Hi", "Hello!", "Well")[1:],
    "the user twice": dialog("Hi", "Hello!", "Well")[::2],
    "the assistant twice": [*dialog("Hi", "Hello!"), *dialog("Hi", "Hello!", "?")[1:]],
    "two system messages": [*dialog(system="A"), *dialog("Hi", system="B")],
    "a late system message": [*dialog("Hi", "Hello!"), *dialog("Well", system="A")],
    "system, then assistant": [*dialog(system="A"), *dialog("Hi", "Hello!", "?")[1:]],
    "unknown role": [{"role": "tool", "content": "42"}],
}
BAD |= {f"user: {tag}": dialog(f"a{tag}b") for tag in TAGS}
BAD |= {f"system: {tag}": dialog("Hi", system=tag) for tag in TAGS}
BAD |= {f"assistant: {tag}": dialog("Hi", f"{tag} ", "Well") for tag in TAGS}


def check_refusal(answer, logprobs: bool):
    assert answer["generation"].keys() == {"role", "content"}
    assert answer["generation"]["role"] == "assistant"
    assert answer["generation"]["content"].startswith("Error:")
    if logprobs:
        assert answer.keys() == {"generation", "tokens", "logprobs"}
        assert len(answer["tokens"]) == len(answer["logprobs"])
    else:
        assert answer.keys() == {"generation"}


@pytest.mark.parametrize("name", BAD)
def test_a_refused_dialog(tokenizer, name):
    """Alone it needs no model."""
    for logprobs in (False, True):
        (answer,) = Mixtral(Stub(None), tokenizer).chat_completion(
            [BAD[name]], logprobs=logprobs
        )
        check_refusal(answer, logprobs)


@pytest.mark.parametrize("logprobs", [False, True])
def test_refused_among_others(tokenizer, writer, logprobs):
    """The others get the answers that they get alone."""
    options = {"temperature": 0, "max_gen_len": 7, "logprobs": logprobs}
    bad = iter(BAD.values())
    dialogs = [next(bad), GOOD[0], GOOD[1], next(bad), next(bad), GOOD[2], *bad]
    answers = Mixtral(writer, tokenizer).chat_completion(dialogs, **options)
    assert len(answers) == len(dialogs)
    for messages, answer in zip(dialogs, answers):
        if messages not in GOOD:
            check_refusal(answer, logprobs)
            continue
        (alone,) = Mixtral(writer, tokenizer).chat_completion([messages], **options)
        if logprobs:
            assert answer.pop("logprobs") == NEAR(alone.pop("logprobs"))
        assert answer == alone


def test_chat_results(tokenizer):
    """Llama's dictionaries, and text that ends before eos."""
    said = ["I am a model. 🙂", "", "混合"]
    scripts = [tokenizer.encode(text, bos=False, eos=False) for text in said]
    prompts = [tokenizer.encode_dialog(messages) for messages in GOOD]

    def answer(row, heard):
        logits = torch.zeros(tokenizer.n_words)
        position = len(heard) - len(prompts[row])
        logits[[*scripts[row], tokenizer.eos_id][position]] = 1000.0
        return logits

    generator = Mixtral(Stub(answer), tokenizer)
    answers = generator.chat_completion(GOOD)
    assert answers == [
        {"generation": {"role": "assistant", "content": text}} for text in said
    ]
    answers = generator.chat_completion(GOOD, logprobs=True)
    assert answers == [
        {
            "generation": {"role": "assistant", "content": text},
            "tokens": [tokenizer.decode([token]) for token in script],
            "logprobs": [0.0] * len(script),
        }
        for text, script in zip(said, scripts)
    ]


# text_completion


@pytest.mark.parametrize("echo", [False, True])
def test_text_results(tokenizer, echo):
    prompts, said = ["Hello", "", "混 é"], ["there 🙂", "x", ""]
    scripts = [tokenizer.encode(text, bos=False, eos=False) for text in said]
    generator = saying(tokenizer, prompts, *scripts)
    tokens = [
        tokenizer.encode(prompt, bos=True, eos=False) * echo + script
        for prompt, script in zip(prompts, scripts)
    ]
    texts = [tokenizer.decode(each) for each in tokens]
    assert texts == (["Hello there 🙂", "x", "混 é"] if echo else said)
    answers = generator.text_completion(prompts, echo=echo)
    assert answers == [{"generation": text} for text in texts]
    answers = generator.text_completion(prompts, echo=echo, logprobs=True)
    for answer, text, ids, script in zip(answers, texts, tokens, scripts, strict=True):
        assert answer.keys() == {"generation", "tokens", "logprobs"}
        assert answer["generation"] == text
        assert answer["tokens"] == [tokenizer.decode([token]) for token in ids]
        assert len(answer["logprobs"]) == len(ids)
        assert answer["logprobs"][len(ids) - len(script) :] == [0.0] * len(script)
        if echo:
            assert answer["logprobs"][0] == 0.0


def test_text_of_a_real_model(tokenizer, writer):
    prompts = ["Hello", "", "A somewhat longer one"]
    options = {"max_gen_len": 9, "logprobs": True}
    generator = Mixtral(writer, tokenizer)
    new = generator.text_completion(prompts, 0, **options)
    all_of_it = generator.text_completion(prompts, 0, echo=True, **options)
    for prompt, short, long in zip(prompts, new, all_of_it):
        length = len(tokenizer.encode(prompt, bos=True, eos=False))
        assert len(short["tokens"]) == len(short["logprobs"]) == 9
        assert len(long["tokens"]) == len(long["logprobs"]) == length + 9
        assert long["tokens"][length:] == short["tokens"]
        assert long["logprobs"][length:] == NEAR(short["logprobs"])
        assert long["generation"].startswith(prompt)


# Draws


def nucleus(probs: np.ndarray, p: float) -> np.ndarray:
    """The likeliest tokens until they have p together, scaled up to 1, in float64."""
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    kept = np.where(before < p, probs[order], 0.0)
    out = np.empty_like(probs)
    out[order] = kept / kept.sum()
    return out


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def check_distribution(drawn, right: np.ndarray):
    """Chi-square; 16 tokens exceed the threshold once in a million times."""
    counts = np.bincount(np.asarray(drawn), minlength=len(right))
    assert (counts[right == 0] == 0).all()
    meant = right[right > 0] * len(drawn)
    assert ((counts[right > 0] - meant) ** 2 / meant).sum() < 57


LOGITS = np.random.default_rng(0).normal(size=16) * 1.5


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_distribution(p):
    probs = softmax(LOGITS)
    rows = torch.tensor(probs, dtype=torch.float32).expand(20000, -1)
    drawn = sample_top_p(rows, p, torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    check_distribution(drawn.flatten(), nucleus(probs, p))


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.9), (1.0, 1.0), (2.0, 0.8)])
def test_distribution_of_generate(temperature, top_p):
    """Temperature comes first, then the nucleus."""
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    stub = Stub(lambda row, heard: logits, max_batch_size=8000)
    generator = Mixtral(stub, SimpleNamespace(eos_id=-1))
    tokens, values = generator.generate(
        [[0]] * 8000, 1, temperature, top_p, logprobs=True
    )
    drawn = [token for (token,) in tokens]
    check_distribution(drawn, nucleus(softmax(LOGITS / temperature), top_p))
    plain = np.log(softmax(LOGITS))  # log-probabilities know neither of the two
    assert [value for (value,) in values] == NEAR(plain[drawn].tolist())


def test_rows_are_drawn_each_from_its_own():
    probs = np.stack([softmax(np.roll(LOGITS, shift)) for shift in range(4)])
    rows = torch.tensor(probs, dtype=torch.float32).repeat(5000, 1)
    drawn = sample_top_p(rows, 0.9, torch.Generator().manual_seed(1)).view(-1, 4)
    for row in range(4):
        check_distribution(drawn[:, row], nucleus(probs[row], 0.9))
    # And independently: two neighbours' tokens are those of the product.
    pairs = drawn[:, 0] * 16 + drawn[:, 1]
    joint = np.outer(nucleus(probs[0], 0.9), nucleus(probs[1], 0.9)).flatten()
    counts = np.bincount(pairs, minlength=256)
    meant = joint[joint > 0] * 5000
    chi2 = ((counts[joint > 0] - meant) ** 2 / meant).sum()
    assert chi2 < len(meant) + 5 * math.sqrt(2 * len(meant))


def test_a_large_vocabulary():
    probs = softmax(np.random.default_rng(2).normal(size=32000) * 3)
    rows = torch.tensor(probs, dtype=torch.float32).expand(50, -1)
    for p in (0.2, 0.9):
        drawn = sample_top_p(rows, p, torch.Generator().manual_seed(3)).flatten()
        # Where float32's sums leave no doubt.
        assert (nucleus(probs, p + 1e-5)[drawn] > 0).all()
        assert len(set(drawn.tolist())) > 5


@pytest.mark.parametrize("p", [1e-30, 1e-9, 1e-3])
def test_one_token_always_stays(p):
    rows = torch.randn(500, 300, generator=torch.Generator().manual_seed(4))
    rows = rows.softmax(-1)
    drawn = sample_top_p(rows, p, torch.Generator().manual_seed(5))
    assert drawn.flatten().tolist() == rows.argmax(-1).tolist()


def test_ties():
    generator = torch.Generator().manual_seed(6)
    quarters = torch.full((4000, 4), 0.25)
    drawn = sample_top_p(quarters, 0.6, generator).unique().tolist()
    assert len(drawn) == 3  # no fewer have 0.6
    assert len(sample_top_p(quarters, 0.1, generator).unique()) == 1
    drawn = sample_top_p(quarters, 1.0, generator).flatten()
    check_distribution(drawn, np.full(4, 0.25))
    twins = torch.tensor([0.1, 0.4, 0.1, 0.4]).expand(4000, -1)
    assert set(sample_top_p(twins, 0.7, generator).flatten().tolist()) == {1, 3}
    assert len(sample_top_p(twins, 0.3, generator).unique()) == 1
    certain = torch.tensor([0.0, 1.0, 0.0]).expand(4000, -1)
    for p in (0.5, 1.0):
        assert sample_top_p(certain, p, generator).unique().tolist() == [1]


@pytest.mark.parametrize(
    "temperature, top_p", [(0, 0.9), (0, 1.0), (1e-6, 0.9), (0.8, 1e-9), (5.0, 1e-9)]
)
def test_greedy_in_many_ways(temperature, top_p):
    results = tiny().generate(ragged(), 9, temperature, top_p, logprobs=True)
    check(results, ragged(), max_gen_len=9)


@pytest.mark.parametrize("temperature, top_p", [(1.5, 0.8), (0.7, 1.0)])
def test_logprobs_of_drawn_tokens(temperature, top_p):
    tokens, values = tiny().generate(
        ragged(), 9, temperature, top_p, logprobs=True, echo=True
    )
    greedy_tokens, _ = greedy(tiny(), ragged(), 9, echo=True)
    assert tokens != greedy_tokens
    for prompt, ours, its_values in zip(ragged(), tokens, values):
        assert ours[: len(prompt)] == prompt and len(ours) == len(prompt) + 9
        assert its_values == NEAR(logprobs_of(ours))


def test_seeds():
    """One seed, one result; but a second call goes on where the first one ended."""

    def two_calls(seed):
        generator = tiny(seed=seed)
        return [generator.generate(ragged(), 9, 1.0, 0.9)[0] for _ in range(2)]

    torch.manual_seed(0)
    first = two_calls(3)
    torch.manual_seed(1)  # the global generator has no part in it
    assert two_calls(3) == first
    assert first[0] != first[1]
    assert two_calls(4)[0] != first[0]


# Where a text ends


@pytest.mark.parametrize("echo", [False, True])
def test_eos_as_the_first_token(tokenizer, echo):
    generator = saying(tokenizer, ["Hi", "Hello"], [], [400, 500])
    options = {"echo": echo, "logprobs": True}
    first, second = generator.text_completion(["Hi", "Hello"], 0, **options)
    prompt = tokenizer.encode("Hi", bos=True, eos=False) * echo
    assert first["generation"] == "Hi" * echo
    assert len(first["tokens"]) == len(first["logprobs"]) == len(prompt)
    assert second["tokens"][-2:] == [tokenizer.decode([i]) for i in (400, 500)]
    assert list(generator.stream_completion("Hi", 0)) == []


def test_only_new_tokens_end_a_row():
    """What stands in a prompt does not, be it eos."""
    prompts = ragged()
    eos = prompts[1][4]
    results = greedy(tiny(eos), prompts, 9, echo=True)
    check(results, prompts, max_gen_len=9, eos=eos, echo=True)


@pytest.mark.parametrize("max_gen_len", [0, 1, 2])
def test_max_gen_len(max_gen_len):
    for echo in (False, True):
        results = greedy(tiny(), ragged(), max_gen_len, echo=echo)
        check(results, ragged(), max_gen_len=max_gen_len, echo=echo)
        lengths = [echo * length + max_gen_len for length in RAGGED]
        assert list(map(len, results[0])) == lengths


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize("room", ROOMS)
def test_a_prompt_of_max_seq_len(monkeypatch, room, chunk):
    """There is no room for more, and what has room goes on."""
    monkeypatch.setattr(mixtral.generation, "PREFILL_TOKENS", chunks_of(chunk))
    prompts = [list(prompt_of(n)) for n in (room, 1, room - 1, room)]
    for echo in (False, True):
        results = greedy(tiny(max_seq_len=room), prompts, echo=echo)
        check(results, prompts, room=room, echo=echo)
        lengths = [room] * 4 if echo else [0, room - 1, 1, 0]
        assert list(map(len, results[0])) == list(map(len, results[1])) == lengths
    with pytest.raises(ValueError, match="max_seq_len"):
        greedy(tiny(max_seq_len=room), [[1], [1] * (room + 1)])


def test_max_gen_len_none(tokenizer, writer):
    """All the way to max_seq_len, from whatever prompt."""
    prompts = ["", "Hello there", "One more, a little longer"]
    answers = Mixtral(writer, tokenizer).text_completion(
        prompts, 0, logprobs=True, echo=True
    )
    assert [len(answer["tokens"]) for answer in answers] == [96] * 3
    (answer,) = Mixtral(writer, tokenizer).chat_completion(
        [GOOD[1]], 0, max_gen_len=None, logprobs=True
    )
    assert len(answer["tokens"]) == 96 - len(tokenizer.encode_dialog(GOOD[1]))


def test_text_of_max_seq_len(tokenizer):
    """The same through text_completion and its stream."""
    prompt = "Hello there"
    length = len(tokenizer.encode(prompt, bos=True, eos=False))
    generator = saying(tokenizer, [prompt], [400] * 99, max_seq_len=length)
    (answer,) = generator.text_completion([prompt], 0, logprobs=True, echo=True)
    assert answer["generation"] == prompt
    assert len(answer["tokens"]) == len(answer["logprobs"]) == length
    assert generator.text_completion([prompt], 0) == [{"generation": ""}]
    assert list(generator.stream_completion(prompt, 0)) == []


def test_empty_prompt(tokenizer, writer):
    """bos alone."""
    (answer,) = Mixtral(writer, tokenizer).text_completion(
        [""], 0, max_gen_len=3, logprobs=True, echo=True
    )
    logits = writer.forward(torch.tensor([[tokenizer.bos_id]]))[0, 0]
    first = logits.argmax().item()
    assert len(answer["tokens"]) == 4
    assert answer["tokens"][1] == tokenizer.decode([first])
    assert answer["logprobs"][1] == NEAR(logits.log_softmax(-1)[first].item())


def test_no_prompts(tokenizer):
    generator = Mixtral(Stub(None), tokenizer)
    for options in ({}, {"logprobs": True}, {"max_gen_len": 5, "temperature": 0}):
        assert generator.text_completion([], **options) == []
        assert generator.text_completion([], echo=True, **options) == []
        assert generator.chat_completion([], **options) == []
    assert generator.generate([], 5) == ([], None)
    assert generator.generate([], 5, logprobs=True) == ([], [])


@pytest.mark.parametrize(
    "prompts, options",
    [
        ([[1]] * 9, {}),
        ([[1], []], {}),
        ([[1]], {"temperature": -0.1}),
        ([[1]], {"temperature": math.nan}),
        ([[1]], {"top_p": 0.0}),
        ([[1]], {"top_p": 1.1}),
        ([[1]], {"top_p": math.nan}),
    ],
)
def test_requests_without_sense(prompts, options):
    with pytest.raises(ValueError):
        tiny().generate(prompts, 3, **options)


# One generator, many calls


def test_long_then_short():
    generator = tiny()
    for prompts in (
        [list(prompt_of(n)) for n in (LIMIT, 30, 35, 1, 20, 39, 2, 8)],
        [list(prompt_of(1))],
        [list(prompt_of(n)) for n in (3, 1)],
        ragged(),
    ):
        check(greedy(generator, prompts, 8), prompts, max_gen_len=8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("passes", [0, 2, 4, 9])
def test_after_an_interruption(monkeypatch, passes, error):
    """In a prompt's first chunk, in a later one, or while decoding."""
    monkeypatch.setattr(mixtral.generation, "PREFILL_TOKENS", chunks_of(16))
    generator, count = tiny(), itertools.count()

    def interrupt(*_):
        if next(count) == passes:
            raise error

    hook = generator.model.layers[-1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(error):
            greedy(generator, ragged()[::-1], 12)
    finally:
        hook.remove()
    check(greedy(generator, ragged(), 6, echo=True), ragged(), max_gen_len=6, echo=True)


# Devices


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_simulated_devices(monkeypatch, devices, chunk):
    """A GPU is a step ahead of the host, and its experts are spread: no difference."""
    monkeypatch.setattr(mixtral.model, "kernels", lambda: None)
    monkeypatch.setattr(mixtral.generation, "PREFILL_TOKENS", chunks_of(chunk))
    prompts, eos = ragged(), to_the_limit(prompt_of(9))[0][12]
    drawn = tiny(eos).generate(prompts, 4, 1.0, 0.9)
    with simulated_cuda(devices):
        names = [f"cuda:{i}" for i in range(devices)]
        model = random_transformer(ARGS, names)
        generator = Mixtral(model, SimpleNamespace(eos_id=eos))
        with watched(model) as sizes:
            results = greedy(generator, prompts, 10, echo=True)
        # The same seed gives the same draws, for its generator is a CPU's.
        assert generator.generate(prompts, 4, 1.0, 0.9) == drawn
    check(results, prompts, max_gen_len=10, eos=eos, echo=True)
    # Rows that have ended are gone at most one step later.
    last = last_steps(prompts, eos, 10)
    decoding = [logits for _, logits in sizes[math.ceil(sum(RAGGED) / chunk) :]]
    rows = [sum(end >= k for end in last) for k in range(max(last) + 1)]
    assert decoding in (rows, rows[:-1])


def test_simulated_limits(monkeypatch):
    """A step ahead of the host must not be a step beyond max_seq_len."""
    monkeypatch.setattr(mixtral.model, "kernels", lambda: None)
    room = ROOMS[0]
    prompts = [list(prompt_of(n)) for n in (room, 1, room - 1, 3)]
    args = dataclasses.replace(ARGS, max_seq_len=room)
    with simulated_cuda(2):
        model = random_transformer(args, ["cuda:0", "cuda:1"])
        generator = Mixtral(model, SimpleNamespace(eos_id=-1))
        results = greedy(generator, prompts, echo=True)
        nothing = greedy(generator, prompts, 0, echo=True)
    check(results, prompts, room=room, echo=True)
    check(nothing, prompts, room=room, max_gen_len=0, echo=True)


@pytest.mark.cuda
@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cuda:0"]], ids=len)
@pytest.mark.parametrize("way", ["graph", "kernels", "plain"])
def test_gpu(monkeypatch, way, devices):
    """In float32, recorded, launched one by one, or without kernels of our own."""
    if way == "plain":
        monkeypatch.setattr(mixtral.model, "kernels", lambda: None)
    elif not mixtral.model.kernels():
        pytest.skip("needs Triton")
    elif way == "kernels":
        monkeypatch.setattr(Transformer, "capture", lambda self, inputs: None)
    # Twenty rows are too many for the kernels, until some of them have ended.
    prompts = [list(prompt_of(length)) for length in range(2, LIMIT + 1, 2)]
    args = dataclasses.replace(ARGS, max_batch_size=20)
    cpu = Mixtral(random_transformer(args), SimpleNamespace(eos_id=-1))
    model = random_transformer(args, devices)
    gpu = Mixtral(model, SimpleNamespace(eos_id=-1))
    # The second time what has been recorded is there from the beginning.
    for batch in (prompts[:5], prompts, prompts[3:4], prompts[:5]):
        right = greedy(cpu, batch, 12, echo=True)
        ours = greedy(gpu, batch, 12, echo=True)
        assert ours[0] == right[0]
        for values, right_values in zip(ours[1], right[1]):
            assert values == NEAR(right_values)
    recorded = [graph is not None for graph in model.graphs.values()]
    assert (
        (len(recorded) > 1 and all(recorded)) if way == "graph" else not any(recorded)
    )


@pytest.mark.cuda
def test_gpu_chunks_and_ends(monkeypatch):
    monkeypatch.setattr(mixtral.generation, "PREFILL_TOKENS", chunks_of(7))
    prompts, eos = ragged(), to_the_limit(prompt_of(9))[0][12]
    generator = Mixtral(
        random_transformer(ARGS, ["cuda:0"]), SimpleNamespace(eos_id=eos)
    )
    for max_gen_len in (10, LIMIT):
        results = greedy(generator, prompts, max_gen_len, echo=True)
        check(results, prompts, max_gen_len=max_gen_len, eos=eos, echo=True)


@pytest.mark.cuda
def test_gpu_distribution():
    probs = softmax(LOGITS)
    rows = torch.tensor(probs, dtype=torch.float32, device="cuda").expand(20000, -1)
    for p in (0.3, 0.9, 1.0):
        drawn = sample_top_p(rows, p, torch.Generator("cuda").manual_seed(0))
        check_distribution(drawn.flatten().cpu(), nucleus(probs, p))


def test_a_stream_that_lost_the_cache_says_so():
    """Every request has the cache from its first row on: two at once cannot be."""
    mixtral = tiny()
    first = mixtral.decode(mixtral.prefill([[1, 5]])[0], [2], 8, 0, 0.9)
    next(first)
    mixtral.generate([[1, 6, 7]], 2, temperature=0)
    with pytest.raises(RuntimeError, match="another request"):
        list(first)


def test_a_temperature_of_next_to_nothing_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    for temperature in (0, 1e-300, 1e-46, 1e-39, 1e-7, 1e-5):
        assert tiny().sample(logits, temperature, 0.9).tolist() == [1]


def test_devices_of_one_type():
    with pytest.raises(ValueError, match="one type"):
        Transformer(ARGS, ["cpu", "meta"])
