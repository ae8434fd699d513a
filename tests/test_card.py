"""What runs on one real GPU: recorded, on streams, launched, and in plain PyTorch.

The same is run on simulated GPUs, as far as that goes.
"""

import dataclasses
import functools
import itertools
import random

import pytest
import torch
from helpers.gpus import ARGS, check_alike, check_ends, generator_of, prepare, simulated
from helpers.reference import random_transformer
from helpers.tiny import random_prompts
from simulated.cuda import simulated_cuda

from mixtral import decode, generation
from mixtral.generation import sample_top_p
from mixtral.model import Span


def fail(*args, **kwargs):
    raise RuntimeError("it is not\nto be")


class StreamTape(decode.Tape):
    """One GPU in place of several: a stream for each entry of the list, and random delays.

    A copy between two entries waits, and is waited for, as one between two GPUs.
    """

    def __init__(self, recorder):
        super().__init__(recorder)
        self.streams = [torch.cuda.current_stream()]
        self.streams += [torch.cuda.Stream() for _ in recorder.devices[1:]]
        self.packed = None
        self.turns = itertools.cycle(range(1, len(recorder.devices)))

    def on(self, i):
        super().on(i)
        self.calls[-1] = functools.partial(self.run, i, self.calls[-1])

    def host(self, function, *args):
        super().host(function, *args)
        if function.__name__ == "copy_":
            i = next(self.turns)  # packed goes to 1, 2, ..., then the sums come back
            self.packed = args[0] if self.packed is None else self.packed
            ends = (0, i) if args[0] is self.packed else (i, 0)
            self.calls[-1] = functools.partial(self.copy, *ends, self.calls[-1])

    def run(self, i, call):
        with torch.cuda.stream(self.streams[i]):
            torch.cuda._sleep(random.choice((0, 0, 100_000, 1_000_000)))
            call()

    def copy(self, source, to, call):
        self.streams[source].wait_stream(self.streams[to])
        self.run(source, call)
        self.streams[to].wait_stream(self.streams[source])


def check_card(monkeypatch, capsys, way: str, n: int, cpu_layers: int, max_gen_len=12) -> None:
    """Recorded, on streams, launched one by one or plain: as on the CPU, in float32."""
    args = dataclasses.replace(ARGS, max_batch_size=20)
    cpu = generator_of(random_transformer(args))
    model = random_transformer(args, ["cuda:0"] * n, cpu_layers=cpu_layers)
    if way == "streams":
        monkeypatch.setattr(decode, "Tape", StreamTape)
    if way == "launch":
        monkeypatch.setattr(decode.Tape, "on", fail)
    if way == "plain":
        monkeypatch.setattr(generation, "attach_decoder", lambda model: None)
    capsys.readouterr()
    gpu = generator_of(model)
    assert (model.decoder is None) == (way == "plain")
    assert capsys.readouterr().err.count("warning: ") == (5 if way == "launch" else 0)
    # Twenty rows are too many for the kernels, until some of them have ended.
    prompts = random_prompts([*range(2, 41, 2)])
    for batch in (prompts[:5], prompts, prompts[3:4]):
        check_alike(gpu, cpu, batch, max_gen_len)


WAYS = ["tape", "streams", "launch", "plain"]


@pytest.mark.cuda
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n, cpu_layers", [(1, 0), (1, 1), (2, 0), (4, 1)])
def test_card(monkeypatch, capsys, way, n, cpu_layers):
    check_card(monkeypatch, capsys, way, n, cpu_layers)


@simulated
@pytest.mark.parametrize("way", WAYS)
def test_simulated_card(monkeypatch, capsys, way):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    with simulated_cuda(1) as sim:
        sim.schedule(0)
        check_card(monkeypatch, capsys, way, 4, 1, max_gen_len=3)
        assert bool(sim.replays) == (way in ("tape", "streams"))


def error_of_a_bfloat16_prompt() -> float:
    """Of logits after each of 300 tokens, read in two pieces, relative to float32 on the CPU.

    The path is the one of an H100: grouped products, and attention with a mask of its own.
    """
    args = dataclasses.replace(ARGS, max_seq_len=320)
    gpu = random_transformer(args, ["cuda:0"], torch.bfloat16)
    cpu = random_transformer(args)
    for ours, exact in zip(gpu.parameters(), cpu.parameters()):
        exact.copy_(ours.cpu())  # the rounded weights
    (prompt,) = random_prompts([300])
    tokens = torch.tensor(prompt)
    want = cpu.forward_packed(tokens, [Span(0, 0, 300)])
    first = gpu.forward_packed(tokens[:170], [Span(0, 0, 170)])
    second = gpu.forward_packed(tokens[170:], [Span(0, 170, 130)])
    got = torch.cat((first, second)).cpu()
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.cuda
def test_bfloat16_prompt():
    assert error_of_a_bfloat16_prompt() < 0.1


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_simulated_bfloat16_prompt(capability):
    """From capability 9.0 on, the host waits for no counts of tokens."""
    with simulated_cuda(1, capability=capability) as sim:
        waits_before = len(sim.syncs)
        assert error_of_a_bfloat16_prompt() < 0.1
        copies_to_host = 1 + sum(1 for _ in random_transformer(ARGS).parameters())
        waits = len(sim.syncs) - waits_before - copies_to_host
    assert waits == (0 if capability >= (9, 0) else 2 * ARGS.n_layers)


@pytest.mark.cuda
def test_card_ends_rows(monkeypatch):
    model = prepare(random_transformer(ARGS, ["cuda:0"] * 2))
    for most in (0, 10, None):
        check_ends(monkeypatch, generator_of(model), most)


@pytest.mark.cuda
@pytest.mark.parametrize("p, kept", [(0.3, 1), (0.9, 3), (1.0, 4)])
def test_card_draws_as_it_should(p, kept):
    probs = torch.tensor([0.1, 0.5, 0.05, 0.35])
    rows = probs.cuda().expand(20000, -1)
    drawn = sample_top_p(rows, p, torch.Generator("cuda").manual_seed(0))
    counts = drawn.flatten().cpu().bincount(minlength=4)
    nucleus = probs * (probs >= probs.sort(descending=True).values[kept - 1])
    assert torch.allclose(counts / 20000, nucleus / nucleus.sum(), rtol=0, atol=0.02)
