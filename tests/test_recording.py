"""The recorded step: what the host does in it, in which order devices work, what can fail."""

import dataclasses
import itertools
import sys
from collections import Counter

import pytest
import torch
from helpers.gpus import (
    ARGS,
    GPUS,
    calls_of,
    decode_steps,
    generator_of,
    model_on,
    prepare,
    simulated,
)
from helpers.reference import random_transformer
from helpers.tiny import random_prompts
from simulated.cuda import simulated_cuda
from simulated.queues import Graph

from mixtral.generation import attach_decoder
from mixtral.model import Span

# The host's part of a step.


@simulated
@GPUS
@pytest.mark.parametrize("cpu_layers", [0, 1, 3])
def test_replays_copies_and_waits_of_a_step(n_gpus, cpu_layers):
    args = dataclasses.replace(ARGS, n_layers=3)
    out, back = 4 * (args.dim + 8) * 2, 4 * args.dim * 4  # bytes of 4 rows, for 3
    others, on_gpus = [f"cuda:{i}" for i in range(1, n_gpus)], 3 - cpu_layers
    with simulated_cuda(n_gpus) as sim:
        options = {"cpu_layers": cpu_layers, "dtype": torch.bfloat16}
        model = prepare(model_on(n_gpus, args=args, **options))
        sim.reset()
        model.forward_packed(torch.arange(3), [Span(i, 0, 1) for i in range(3)])
    pieces = 1 + cpu_layers + (2 * on_gpus if others else 0)
    replays = {"cuda:0": pieces, **dict.fromkeys(others, on_gpus)}
    assert Counter(sim.replays) == +Counter(replays)
    copies = {("cuda:0", other, out): on_gpus for other in others}
    copies |= {(other, "cuda:0", back): on_gpus for other in others}
    copies |= {("cuda:0", "cpu", out): cpu_layers, ("cpu", "cuda:0", back): cpu_layers}
    copies |= {("cpu", "cuda:0", 3 * 8): 1, ("cpu", "cuda:0", 2 * 3 * 8): 1}  # inputs
    assert Counter(sim.copies) == +Counter(copies)
    assert len(sim.syncs) == cpu_layers
    assert sim.launches == {"cuda:0": 4}  # inputs to their place, logits from theirs


@simulated
@GPUS
def test_launches_of_a_layer(n_gpus):
    launches = []
    for n_layers in (1, 2):
        with simulated_cuda(n_gpus) as sim:
            args = dataclasses.replace(ARGS, n_layers=n_layers)
            model = model_on(n_gpus, args=args)
            sim.reset()
            prepare(model)
        launches.append(sim.launches)
    # The steps for 1, 2, 4 and 8 rows are run once and recorded once.
    want = dict.fromkeys((f"cuda:{i}" for i in range(n_gpus)), 2 * 8)
    want["cuda:0"] = (13 if n_gpus > 1 else 10) * 8
    assert launches[1] - launches[0] == want


@simulated
@pytest.mark.parametrize("n_gpus", [2, 4, 8])
def test_python_calls_of_a_layer(n_gpus):
    """A step is its replays and copies, for which these are stand-ins, and no more."""
    counts = []
    for n_layers in (1, 2):
        with simulated_cuda(n_gpus):
            args = dataclasses.replace(ARGS, n_layers=n_layers, max_batch_size=1)
            model, seen = prepare(model_on(n_gpus, args=args)), []
            calls = calls_of(model, 1)
            calls[:] = [lambda: None for _ in calls]
            sys.setprofile(lambda frame, event, value, seen=seen: seen.append(event))
            try:
                model.decoder.steps[1]()
            finally:
                sys.setprofile(None)
        counts.append(seen.count("call") + seen.count("c_call"))
    assert counts[1] - counts[0] == (n_gpus + 1) + 2 * (n_gpus - 1)


@simulated
def test_one_wait_a_token():
    with simulated_cuda(2) as sim:
        mixtral = generator_of(prepare(model_on(2)))
        sim.reset()
        mixtral.generate(random_prompts([3, 2]), 12, 0.8, 0.9)
    assert len(sim.syncs) == ARGS.n_layers + 1 + 12  # the prompts' logits are checked


# The order of the devices' work.


@simulated
@GPUS
@pytest.mark.parametrize("cpu_layers", [0, 1])
def test_any_order_gives_the_same_logits(n_gpus, cpu_layers):
    want = decode_steps(random_transformer(ARGS), 3, 2)
    with simulated_cuda(n_gpus) as sim:
        model = prepare(model_on(n_gpus, cpu_layers=cpu_layers))
        right = decode_steps(model, 3, 2)
        assert torch.allclose(right, want, rtol=0, atol=1e-4)
        for seed in range(30):
            sim.schedule(seed)
            assert torch.equal(decode_steps(model, 3, 2), right), seed


@simulated
@pytest.mark.parametrize("n_gpus", [2, 4])
def test_a_wait_or_a_call_left_out_shows(n_gpus):
    with simulated_cuda(n_gpus) as sim:
        model = prepare(model_on(n_gpus))
        right, copies = decode_steps(model, 3, 1), 2 * (n_gpus - 1) * ARGS.n_layers

        def differs(seed: int, left_out=None) -> bool:
            sim.schedule(seed, left_out)
            return not torch.equal(decode_steps(model, 3, 1), right)

        for copy in range(copies):
            # What makes the destination wait is needed in every copy. The source need
            # not, since what it might overwrite has been read by what came before.
            assert any(differs(seed, ("destination", copy)) for seed in range(40)), copy
            assert not any(differs(seed, ("source", copy)) for seed in range(3))
        calls = calls_of(model, 4)
        for i in range(len(calls)):
            call, calls[i] = calls[i], lambda: None
            assert differs(i), i
            calls[i] = call
        assert not differs(0)


# What cannot be recorded or compiled.


def fail(*args, **kwargs):
    raise RuntimeError("it is not\nto be")


FAILURES = [  # what, how, the number of warnings and their end
    ("simulated.queues.Graph.capture_begin", fail, 4, "without CUDA graphs, slower: it is not"),
    ("mixtral.kernels.attention", fail, 1, "fast kernels, slower: it is not"),
    ("torch.cuda.get_device_capability", lambda _: (7, 5), 1, "compute capability 8.0"),
]


@simulated
@pytest.mark.parametrize("n_gpus", [1, 2])
@pytest.mark.parametrize("what, how, count, end", FAILURES)
def test_a_failure_costs_a_line_and_speed(monkeypatch, capsys, n_gpus, what, how, count, end):
    want = decode_steps(random_transformer(ARGS), 3, 3)
    capsys.readouterr()
    with simulated_cuda(n_gpus) as sim:
        model = model_on(n_gpus)
        with monkeypatch.context() as patch:
            patch.setattr(what, how)
            attach_decoder(model)
        assert torch.allclose(decode_steps(model, 3, 3), want, rtol=0, atol=1e-4)
        assert not sim.replays and bool(model.decoder) == (count > 1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == count
    assert lines[0].endswith(end)


@simulated
@pytest.mark.parametrize("broken", [0, 1, 3])
def test_a_failed_recording_does_not_stop_the_others(monkeypatch, capsys, broken):
    """CUDA leaves the memory pool of a failed recording in a state that nothing can be added to."""
    recordings = itertools.count()
    spoilt_pools = []
    begin = Graph.capture_begin
    end = Graph.capture_end

    def capture_begin(graph, pool, **options):
        if pool in spoilt_pools:
            raise RuntimeError("this pool is recording already")
        # In any other mode a CUDA call of another thread would break the recording.
        assert options == {"capture_error_mode": "thread_local"}
        begin(graph, pool, **options)
        graph.pool_handle = pool

    def capture_end(graph):
        end(graph)
        if next(recordings) == broken:
            spoilt_pools.append(graph.pool_handle)
            raise RuntimeError("the recording failed")

    monkeypatch.setattr(Graph, "capture_begin", capture_begin)
    monkeypatch.setattr(Graph, "capture_end", capture_end)
    want = decode_steps(random_transformer(ARGS), 3, 3)
    capsys.readouterr()
    with simulated_cuda(1) as sim:
        model = prepare(model_on(1))
        assert capsys.readouterr().err.count("warning: ") == 1
        assert torch.allclose(decode_steps(model, 3, 3), want, rtol=0, atol=1e-4)
        sim.reset()
        for rows in model.decoder.steps:
            model.decoder.steps[rows]()
        assert len(sim.replays) == len(model.decoder.steps) - 1
