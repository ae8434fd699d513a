"""A tiny Mixtral, what transformers makes of its prompts, and stand-ins for a model."""

import dataclasses
import functools
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from helpers.reference import random_transformer, reference_logits, to_transformers
from mixtral import Mixtral, ModelArgs, Tokenizer, Transformer

LIMIT = 40
ARGS = ModelArgs(
    dim=24,
    n_layers=2,
    head_dim=8,
    hidden_dim=40,
    n_heads=6,
    n_kv_heads=2,
    vocab_size=61,
    num_experts=8,
    max_batch_size=8,
    max_seq_len=LIMIT,
)
NEAR = functools.partial(pytest.approx, rel=0, abs=1e-4)  # for log-probabilities


def random_prompts(
    lengths: list[int], vocab_size: int = ARGS.vocab_size, seed: int = 0
) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths]


@functools.cache
def model_of(max_seq_len: int = LIMIT) -> Transformer:
    """The same weights for all lengths."""
    return random_transformer(dataclasses.replace(ARGS, max_seq_len=max_seq_len))


class Counted:
    """A Transformer that counts, for each pass, tokens in and rows of logits out."""

    def __init__(self, model: Transformer):
        self.model, self.sizes = model, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def forward_packed(self, tokens, spans, last_only=False):
        logits = self.model.forward_packed(tokens, spans, last_only=last_only)
        self.sizes.append((len(tokens), len(logits)))
        return logits


def tiny(eos: int = -1, max_seq_len: int = LIMIT, seed: int = 1) -> Mixtral:
    """By default none of its texts ends before max_seq_len."""
    return Mixtral(Counted(model_of(max_seq_len)), SimpleNamespace(eos_id=eos), seed)


# What is right: transformers, one prompt alone, the whole text anew for every token.


@functools.cache
def reference():
    return to_transformers(ARGS, model_of().state_dict())


def logprobs_of(tokens: list[int]) -> list[float]:
    """The log-probability of each token after those before it, 0 for the first."""
    rows = reference_logits(reference(), tokens).log_softmax(-1)
    return [0.0, *(rows[i, t].item() for i, t in enumerate(tokens[1:]))]


@functools.cache
def to_the_limit(prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """The prompt and its likeliest continuation, with all log-probabilities."""
    tokens = list(prompt)
    while len(tokens) < LIMIT:
        tokens.append(reference_logits(reference(), tokens)[-1].argmax().item())
    return tokens, logprobs_of(tokens)


def expected(
    prompt: list[int], max_gen_len=LIMIT, eos=-1, room=LIMIT, echo=False
) -> tuple[list[int], list[float]]:
    tokens, values = to_the_limit(tuple(prompt))
    begin, end = len(prompt), min(len(prompt) + max_gen_len, room)
    if eos in tokens[begin:end]:
        end = tokens.index(eos, begin)
    begin = 0 if echo else begin
    return tokens[begin:end], values[begin:end]


def check_greedy(
    generator: Mixtral,
    prompts: list[list[int]],
    max_gen_len: int = LIMIT,
    temperature: float = 0,
    top_p: float = 0.9,
    logprobs: bool = True,
    echo: bool = False,
) -> None:
    """generate() returns what is expected of each prompt alone."""
    tokens, values = generator.generate(prompts, max_gen_len, temperature, top_p, logprobs, echo)
    (eos,), room = generator.stop_ids, generator.model.params.max_seq_len
    right = [expected(prompt, max_gen_len, eos, room, echo) for prompt in prompts]
    assert tokens == [its_tokens for its_tokens, _ in right]
    if logprobs:
        assert values == [NEAR(its_values) for _, its_values in right]
    else:
        assert values is None


def in_thread(function: Callable, *args, **options) -> Future:
    """Run function in a daemon thread, which cannot keep pytest from ending."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args, **options))
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# Stand-ins for a model


class Stub:
    """In a Transformer's place: answer(row, tokens so far) are the row's next logits."""

    device = torch.device("cpu")

    def __init__(self, answer: Callable[[int, list[int]], torch.Tensor] | None, **sizes: int):
        self.answer, self.heard, self.n_passes = answer, {}, 0
        self.params = ModelArgs(**{"max_batch_size": 8} | sizes)

    def forward_packed(self, tokens, spans, last_only=False):
        self.n_passes += 1
        logits = []
        for span, part in zip(spans, tokens.split([s.length for s in spans])):
            before = self.heard.get(span.row, [])[: span.start]
            assert len(before) == span.start
            heard = self.heard[span.row] = before + part.tolist()
            ends = range(span.start + 1, len(heard) + 1)
            ends = ends[-1:] if last_only else ends
            logits += [self.answer(span.row, heard[:end]) for end in ends]
        return torch.stack(logits)


def saying(
    tokenizer: Tokenizer, prompts: list[list[int]], scripts: list[list[int]], **sizes
) -> Mixtral:
    """A Mixtral that says scripts[row] after prompts[row], and then eos."""

    def answer(row: int, heard: list[int]) -> torch.Tensor:
        said = heard[len(prompts[row]) :]
        assert said == scripts[row][: len(said)]
        logits = torch.zeros(tokenizer.n_words)
        logits[[*scripts[row], tokenizer.eos_id][len(said)]] = 1000.0
        return logits

    stub = Stub(answer, vocab_size=tokenizer.n_words, **sizes)
    return Mixtral(stub, tokenizer)
