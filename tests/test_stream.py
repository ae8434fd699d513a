"""Streams: text_completion's text in pieces, and one request after another."""

import dataclasses
import threading
from concurrent.futures import TimeoutError

import pytest
from helpers.reference import random_transformer
from helpers.tiny import ARGS, in_thread, saying

from mixtral import Mixtral, Tokenizer, Transformer


@pytest.fixture(scope="module")
def tokenizer(v1) -> Tokenizer:
    return Tokenizer(v1)


@pytest.fixture(scope="module")
def writer(tokenizer) -> Transformer:
    """A real model, whose texts are a jumble of all languages."""
    sizes = {"dim": 16, "n_layers": 1, "vocab_size": tokenizer.n_words}
    args = dataclasses.replace(ARGS, **sizes, max_seq_len=96)
    return random_transformer(args, seed=5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "states that",
        "龘靐 齉爩",
        "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽 duck: 🦆",
        "e\u0301 n\u0303 o\u0308\u0304 क्षि",
    ],
    ids=len,
)
def test_stream_cut_anywhere(tokenizer, text):
    """Wherever it is cut, even within a character, it is what text_completion returns."""
    prompt = tokenizer.encode("Bonjour", bos=True, eos=False)
    script = tokenizer.encode(text, bos=False, eos=False)
    generator = saying(tokenizer, [prompt], [script])
    for length in (*range(len(script) + 1), None):
        pieces = list(generator.stream_completion("Bonjour", max_gen_len=length))
        (whole,) = generator.text_completion(["Bonjour"], max_gen_len=length)
        assert "".join(pieces) == whole["generation"]
        # A character that never becomes whole is out with the last piece, if at all.
        assert all(pieces) and not any("\ufffd" in piece for piece in pieces[:-1])
    assert whole["generation"] == text


def test_stream_comes_as_it_is_made(tokenizer):
    """A piece comes at the latest one pass after its token."""
    prompt = tokenizer.encode("zero", bos=True, eos=False)
    script = tokenizer.encode("one two three four five six", bos=False, eos=False)
    generator = saying(tokenizer, [prompt], [script])
    stream = generator.stream_completion("zero", 0)
    passes = [generator.model.n_passes for _ in stream]
    assert passes == sorted(set(passes))
    assert passes[0] <= 2 and len(passes) >= len(script) - 1


@pytest.mark.parametrize(
    "temperature, top_p, max_gen_len",
    [(0, 0.9, 25), (0.6, 0.9, 25), (1.5, 1.0, 25), (1.0, 0.5, None)],
)
def test_stream_equals_text_completion(tokenizer, writer, temperature, top_p, max_gen_len):
    for seed, prompt in enumerate(["", "混合 🙂"]):
        options = temperature, top_p, max_gen_len
        stream = Mixtral(writer, tokenizer, seed).stream_completion(prompt, *options)
        (whole,) = Mixtral(writer, tokenizer, seed).text_completion([prompt], *options)
        pieces = list(stream)
        assert "".join(pieces) == whole["generation"]
        assert len(pieces) > 10


@pytest.mark.parametrize("close", [True, False])
def test_an_unfinished_stream(tokenizer, writer, close):
    """Closed or not, it changes no later call; and it cannot be continued after one."""
    generator = Mixtral(writer, tokenizer)
    fresh = Mixtral(writer, tokenizer).text_completion(["One", "Another one"], 0)
    for _ in range(2):
        stream = generator.stream_completion("A long story that nobody hears out", 0)
        assert next(stream) and next(stream) and next(stream)
        if close:
            stream.close()
        assert generator.text_completion(["One", "Another one"], 0) == fresh
        if not close:
            with pytest.raises(RuntimeError, match="another request"):
                list(stream)
        pieces = list(generator.stream_completion("One", 0))
        assert "".join(pieces) == fresh[0]["generation"]


def two_texts(generator: Mixtral, prompt: str) -> list[str]:
    """The same, from generate() and as a stream."""
    tokens = generator.tokenizer.encode(prompt, bos=True, eos=False)
    (new,), _ = generator.generate([tokens], 12, temperature=0)
    stream = generator.stream_completion(prompt, 0, max_gen_len=12)
    return [generator.tokenizer.decode(new), "".join(stream)]


def test_threads(tokenizer, writer):
    """Requests of several threads take turns: each gets the text that it gets alone."""
    generator = Mixtral(writer, tokenizer)
    prompts = ["One", "Another one, and longer", "混合", ""]
    alone = [two_texts(generator, prompt) for prompt in prompts]

    def work(prompt):
        return [two_texts(generator, prompt) for _ in range(5)]

    threads = [in_thread(work, prompt) for prompt in prompts]
    for thread, texts in zip(threads, alone):
        assert texts[0] == texts[1]
        assert thread.result(30) == [texts] * 5


def test_a_stream_of_a_thread_that_has_ended(tokenizer, writer):
    generator, kept = Mixtral(writer, tokenizer), []

    def leave_unfinished():
        kept.append(generator.stream_completion("A story", 0))
        next(kept[0])

    thread = threading.Thread(target=leave_unfinished)
    thread.start()
    thread.join()
    alone = two_texts(Mixtral(writer, tokenizer), "One")
    assert in_thread(two_texts, generator, "One").result(30) == alone


@pytest.mark.parametrize("end", ["finish", "close", "delete", "close before it starts"])
def test_another_thread_waits_for_a_stream(tokenizer, writer, end):
    generator = Mixtral(writer, tokenizer)
    alone = two_texts(generator, "One")
    whole = "".join(generator.stream_completion("A story", 0))
    stream = generator.stream_completion("A story", 0)
    others = []
    if end != "close before it starts":
        text = next(stream)
        others.append(in_thread(two_texts, generator, "One"))
        with pytest.raises(TimeoutError):
            others[0].result(0.3)
    if end == "finish":
        assert text + "".join(stream) == whole
    elif end == "delete":
        del stream
    else:
        stream.close()
        others.append(in_thread(two_texts, generator, "One"))
    # A thread that went on would use the model, which other tests have too.
    assert [other.result(30) for other in others] == [alone] * len(others)
