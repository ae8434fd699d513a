"""Which token is drawn: distributions against a nucleus in float64, seeds, greedy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import NEAR, Stub, check_greedy, logprobs_of, random_prompts, tiny

from mixtral import Mixtral
from mixtral.generation import sample_top_p

PROMPTS = random_prompts([2, 31, 9, 1, 17])
LOGITS = np.random.default_rng(0).normal(size=16) * 1.5


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def nucleus(probs: np.ndarray, p: float) -> np.ndarray:
    """The likeliest tokens until they have p together, scaled up to 1, in float64."""
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    kept = np.where(before < p, probs[order], 0.0)
    out = np.empty_like(probs)
    out[order] = kept / kept.sum()
    return out


def draw(probs: np.ndarray, p: float, times: int = 20000) -> np.ndarray:
    rows = torch.tensor(probs, dtype=torch.float32).expand(times, -1)
    drawn = sample_top_p(rows, p, torch.Generator().manual_seed(0))
    assert drawn.shape == (times,)
    return drawn.numpy()


def check_distribution(drawn: np.ndarray, right: np.ndarray):
    """Chi-square, five standard deviations and more from its mean."""
    counts = np.bincount(drawn, minlength=len(right))
    assert (counts[right == 0] == 0).all()
    meant = right[right > 0] * len(drawn)
    chi2 = ((counts[right > 0] - meant) ** 2 / meant).sum()
    assert chi2 < len(meant) + 5 * math.sqrt(2 * len(meant)) + 15


@pytest.mark.parametrize("p", [1e-30, 1e-9, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_distribution(p):
    probs = softmax(LOGITS)
    check_distribution(draw(probs, p), nucleus(probs, p))


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.9), (1.0, 1.0), (2.0, 0.8)])
def test_distribution_of_generate(temperature, top_p):
    """Temperature comes first, then the nucleus; neither changes log-probabilities."""
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    stub = Stub(lambda row, heard: logits, max_batch_size=8000, vocab_size=16)
    generator = Mixtral(stub, SimpleNamespace(eos_id=-1))
    results = generator.generate([[0]] * 8000, 1, temperature, top_p, logprobs=True)
    drawn, values = (np.array(result).flatten() for result in results)
    check_distribution(drawn, nucleus(softmax(LOGITS / temperature), top_p))
    assert values.tolist() == NEAR(np.log(softmax(LOGITS))[drawn].tolist())


def test_rows_are_drawn_each_from_its_own():
    probs = np.stack([softmax(np.roll(LOGITS, shift)) for shift in range(4)])
    rows = torch.tensor(probs, dtype=torch.float32).repeat(5000, 1)
    drawn = sample_top_p(rows, 0.9, torch.Generator().manual_seed(1))
    drawn = drawn.view(-1, 4).numpy()
    for row in range(4):
        check_distribution(drawn[:, row], nucleus(probs[row], 0.9))
    # And independently: two neighbours' tokens are those of the product.
    joint = np.outer(nucleus(probs[0], 0.9), nucleus(probs[1], 0.9)).flatten()
    check_distribution(drawn[:, 0] * 16 + drawn[:, 1], joint)


@pytest.mark.parametrize("p", [0.2, 0.9])
def test_a_large_vocabulary(p):
    probs = softmax(np.random.default_rng(2).normal(size=32000) * 3)
    drawn = draw(probs, p, times=50)
    # With a margin, since its sums are in float32.
    assert (nucleus(probs, p + 1e-5)[drawn] > 0).all()
    assert len(set(drawn.tolist())) > 5


@pytest.mark.parametrize(
    "probs, p, tokens",  # how many different ones are drawn
    [
        ([0.25] * 4, 0.6, 3),
        ([0.25] * 4, 0.1, 1),
        ([0.25] * 4, 1.0, 4),
        ([0.1, 0.4, 0.1, 0.4], 0.7, 2),
        ([0.1, 0.4, 0.1, 0.4], 0.3, 1),
        ([0.0, 1.0, 0.0], 0.5, 1),
        ([0.0, 1.0, 0.0], 1.0, 1),
    ],
)
def test_ties(probs, p, tokens):
    """Of equally likely tokens only as many are kept as reach p."""
    drawn = set(draw(np.array(probs), p, times=4000).tolist())
    assert len(drawn) == tokens
    assert min(probs[token] for token in drawn) == sorted(probs)[-tokens]


@pytest.mark.parametrize(
    "temperature, top_p",
    [(0, 1.0), (1e-300, 0.9), (1e-46, 0.9), (1e-39, 0.9), (1e-6, 0.9), (5.0, 1e-9)],
)
def test_greedy_in_many_ways(temperature, top_p):
    check_greedy(tiny(), PROMPTS, 9, temperature, top_p)


@pytest.mark.parametrize("temperature, top_p", [(1.5, 0.8), (0.7, 1.0)])
def test_logprobs_of_drawn_tokens(temperature, top_p):
    options = {"top_p": top_p, "logprobs": True, "echo": True}
    tokens, values = tiny().generate(PROMPTS, 9, temperature, **options)
    assert tokens != tiny().generate(PROMPTS, 9, 0, **options)[0]
    for prompt, ours, its_values in zip(PROMPTS, tokens, values):
        assert ours[: len(prompt)] == prompt and len(ours) == len(prompt) + 9
        assert its_values == NEAR(logprobs_of(ours))


def test_seeds():
    """One seed, one result; a second call goes on in the same sequence of draws."""

    def two_calls(seed):
        generator = tiny(seed=seed)
        return [generator.generate(PROMPTS, 9, 1.0, 0.9)[0] for _ in range(2)]

    torch.manual_seed(0)
    first = two_calls(3)
    torch.manual_seed(1)  # the global generator has no part in it
    assert two_calls(3) == first
    assert first[0] != first[1]
    assert two_calls(4)[0] != first[0]
