"""Models on simulated GPUs, or on real ones, beside the same models on the CPU."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from simulated.cuda import kernel

from helpers import plain_kernels
from helpers.reference import random_transformer
from helpers.tiny import NEAR, random_prompts
from mixtral import Mixtral, ModelArgs, Transformer, generation
from mixtral.devices import find_devices
from mixtral.model import Span

SIZES = {"dim": 24, "head_dim": 8, "hidden_dim": 40, "n_heads": 4, "n_kv_heads": 2}
ARGS = ModelArgs(n_layers=2, vocab_size=61, max_batch_size=5, max_seq_len=40, **SIZES)
GPUS = pytest.mark.parametrize("n_gpus", [1, 2, 3, 4, 8])
# How many kernels each wrapper launches.
LAUNCHES = {"linear": 1, "experts": 2, "rope_and_cache": 1, "attention": 2}


@pytest.fixture
def plain_kernels_on_gpus(monkeypatch):
    """Simulated GPUs compute in plain PyTorch what Triton's kernels would."""
    for name, launches in LAUNCHES.items():
        stand_in = kernel(launches)(getattr(plain_kernels, name))
        monkeypatch.setattr(f"mixtral.kernels.{name}", stand_in)


simulated = pytest.mark.usefixtures("plain_kernels_on_gpus")


def model_on(n_gpus: int, args: ModelArgs = ARGS, **options) -> Transformer:
    """Random weights on simulated GPUs: the same for any number of them."""
    return random_transformer(args, find_devices(n_gpus), **options)


def prepare(model: Transformer) -> Transformer:
    generation.attach_decoder(model)
    assert model.decoder is not None
    return model


def generator_of(model: Transformer, eos: int = -1) -> Mixtral:
    return Mixtral(model, SimpleNamespace(eos_id=eos))


def decode_steps(model: Transformer, n_rows: int, n_steps: int) -> torch.Tensor:
    """Logits (n_steps, n_rows, vocab) after the same tokens every time, from position 0 on."""
    logits = []
    for step in range(n_steps):
        tokens = torch.arange(n_rows) * 7 + step + 1
        spans = [Span(row, step, 1) for row in range(n_rows)]
        logits.append(model.forward_packed(tokens, spans))
    return torch.stack([part.cpu() for part in logits])


def calls_of(model: Transformer, n_rows: int) -> list:
    """What the host does in a recorded step."""
    return inspect.getclosurevars(model.decoder.steps[n_rows]).nonlocals["tape"].calls


def check_alike(ours: Mixtral, cpu: Mixtral, prompts: list, max_gen_len: int | None) -> list:
    """Greedy tokens and all log-probabilities; returns the tokens."""
    right, right_values = cpu.generate(prompts, max_gen_len, 0, logprobs=True, echo=True)
    tokens, values = ours.generate(prompts, max_gen_len, 0, logprobs=True, echo=True)
    assert tokens == right
    assert [*itertools.chain(*values)] == NEAR([*itertools.chain(*right_values)])
    return tokens


def check_ends(monkeypatch, gpu: Mixtral, max_gen_len: int | None) -> list[int]:
    """Rows end at eos, max_seq_len or max_gen_len. Returns the number of new tokens in each."""
    monkeypatch.setattr(generation, "prefill_tokens", lambda device: 7)
    prompts = random_prompts([2, 31, 9, 1, 40])
    cpu = generator_of(random_transformer(ARGS))
    eos = cpu.generate(prompts[2:3], 9, 0)[0][0][5]
    cpu.stop_ids = {eos}
    gpu.stop_ids = {eos}
    tokens = check_alike(gpu, cpu, prompts, max_gen_len)
    return [len(row) - len(prompt) for row, prompt in zip(tokens, prompts)]
