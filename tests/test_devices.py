"""Decoding and prefill on several GPUs: the same text, each device's tokens, and memory.

The GPUs are simulated, so the values are real. The kernels, which need a GPU, are plain PyTorch
here.
"""

import functools
import gc
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
from helpers.gpus import (
    ARGS,
    GPUS,
    check_ends,
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

from mixtral import Mixtral, ModelArgs, Tokenizer, Transformer
from mixtral.checkpoint import load_checkpoint, read_params
from mixtral.devices import ACTIVATIONS, find_devices, memory_needed
from mixtral.model import Span

# The device of each expert.
DEALT = {
    1: [0, 0, 0, 0, 0, 0, 0, 0],
    2: [0, 0, 0, 0, 1, 1, 1, 1],
    3: [0, 0, 0, 1, 1, 1, 2, 2],
    4: [0, 0, 1, 1, 2, 2, 3, 3],
    8: [0, 1, 2, 3, 4, 5, 6, 7],
}
PROMPTS = ["In the beginning God", "And", "The LORD is my shepherd; I shall not"]
PROMPTS += ["Thou shalt", "For unto us a child is born, unto us a son is given: and"]

# The same text.


def load_demo(demo, devices, cpu_layers=0) -> Mixtral:
    params = read_params(demo, 64, 5)
    model = Transformer(params, devices, torch.float32, cpu_layers)
    load_checkpoint(model, demo)
    return Mixtral(model, Tokenizer(demo / "tokenizer.model"))


def texts(mixtral: Mixtral) -> list:
    """Five rows, greedy, and three, drawn: numbers for which nothing is recorded."""
    complete = functools.partial(mixtral.text_completion, max_gen_len=6)
    return [complete(PROMPTS, 0), complete(PROMPTS[:3], 0.9, 0.9)]


@pytest.fixture(scope="module")
def cpu_texts(demo) -> list:
    return texts(load_demo(demo, ["cpu"]))


@simulated
@GPUS
@pytest.mark.parametrize("cpu_layers", [0, 1, 4])
def test_same_text_as_on_the_cpu(demo, cpu_texts, n_gpus, cpu_layers):
    with simulated_cuda(n_gpus) as sim:
        mixtral = load_demo(demo, find_devices(n_gpus), cpu_layers)
        prepare(mixtral.model)
        sim.reset()
        assert texts(mixtral) == cpu_texts
        assert sim.replays


@simulated
@pytest.mark.parametrize("n_gpus", [1, 4])
@pytest.mark.parametrize("most", [0, 4, None])
def test_rows_end_as_on_the_cpu(monkeypatch, n_gpus, most):
    """A row leaves the batch at the latest a step after its end."""
    with simulated_cuda(n_gpus):
        gpu = generator_of(prepare(model_on(n_gpus)))
        gpu.model.decoder = mock.Mock(wraps=gpu.model.decoder, max_rows=8)
        new = check_ends(monkeypatch, gpu, most)
        steps = [len(call.args[0]) for call in gpu.model.decoder.call_args_list]
    assert len(steps) <= max(new) + 1
    for step, rows in enumerate(steps, 1):
        assert sum(n > step for n in new) <= rows <= sum(n >= step - 1 for n in new)


@simulated
@pytest.mark.parametrize("n_gpus", [2, 4, 8])
def test_the_number_of_gpus_hardly_changes_bfloat16(n_gpus):
    """Nothing is rounded on the way between devices: only float32 sums differ."""
    logits = []
    for n in (1, n_gpus):
        with simulated_cuda(n):
            model = prepare(model_on(n, dtype=torch.bfloat16))
            logits.append(decode_steps(model, 3, 4))
    assert (logits[0] != logits[1]).float().mean() < 0.1


# Prefill and memory.


@GPUS
def test_prefill_sends_a_device_its_own_tokens(n_gpus):
    spans, logits = [Span(0, 0, 30), Span(1, 0, 5)], []
    with simulated_cuda(n_gpus) as sim:
        model = model_on(n_gpus)
        for layer in model.layers:
            layer.feed_forward.gate.register_forward_hook(
                lambda module, args, out: logits.append(out)
            )
        sim.reset()
        model.forward_packed(torch.arange(35), spans, last_only=True)
        assert len(sim.syncs) == ARGS.n_layers
        sent = Counter()
        for source, to, size in sim.copies:
            sent[source, to] += size
        chosen = torch.stack([part.topk(2).indices.cpu() for part in logits])
    for i in range(1, n_gpus):
        tokens = sum(DEALT[n_gpus][expert] == i for expert in chosen.flatten().tolist())
        size = tokens * ARGS.dim * 4
        assert sent["cuda:0", f"cuda:{i}"] == sent[f"cuda:{i}", "cuda:0"] == size


@GPUS
@pytest.mark.parametrize("cpu_layers", [0, 1, 4])
def test_each_device_holds_its_experts(demo, n_gpus, cpu_layers):
    with simulated_cuda(n_gpus) as sim:
        model = load_demo(demo, find_devices(n_gpus), cpu_layers).model
        held = Counter()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            device, part = "cuda:0", name.split(".")
            if "experts" in part:
                device = f"cuda:{DEALT[n_gpus][int(part[4])]}"
                device = "cpu" if int(part[1]) >= 4 - cpu_layers else device
            assert str(tensor.device) == device, name
            held[device] += tensor.nbytes
        names = [f"cuda:{i}" for i in range(n_gpus)]
        assert [sim.bytes(name) for name in names] == [held[name] for name in names]
        want = memory_needed(model.params, n_gpus, torch.float32, cpu_layers)
        assert want == [held[name] for name in [*names, "cpu"]]


@simulated
@pytest.mark.parametrize("n_gpus", [3, 5, 6, 7])
def test_experts_that_cannot_be_dealt_out_equally(n_gpus):
    """Prompts and steps give the logits of one device."""
    span = [Span(0, 0, 30)]
    cpu = random_transformer(ARGS)
    prompt_logits = cpu.forward_packed(torch.arange(30), span)
    step_logits = decode_steps(cpu, 3, 4)
    with simulated_cuda(n_gpus) as sim:
        model = prepare(model_on(n_gpus))
        ours = model.forward_packed(torch.arange(30), span).cpu()
        assert torch.allclose(ours, prompt_logits, rtol=0, atol=1e-4)
        sim.reset()
        assert torch.allclose(decode_steps(model, 3, 4), step_logits, rtol=0, atol=1e-4)
        assert {f"cuda:{i}" for i in range(n_gpus)} == set(sim.replays)


def fail(*args, **kwargs):
    raise RuntimeError("this cannot be recorded")


@simulated
@pytest.mark.parametrize("recorded", [True, False])
def test_a_deleted_model_leaves_at_once(monkeypatch, recorded):
    """A second model fits where the first one was."""
    if not recorded:
        monkeypatch.setattr(Graph, "capture_begin", fail)
    gc.collect()
    gc.disable()
    try:
        with simulated_cuda(2) as sim:
            before = sim.bytes("cuda:0")
            generator = generator_of(prepare(model_on(2)))
            model = weakref.ref(generator.model)
            decode_steps(generator.model, 3, 2)
            generator.generate([[1, 2], [3]], 4)
            del generator
            assert model() is None
            assert sim.bytes("cuda:0") == before
    finally:
        gc.enable()


def test_the_host_waits_for_tokens_from_a_gpu():
    """A CPU model may not read tokens before they have arrived."""
    cpu = random_transformer(ARGS)
    spans = [Span(0, 0, 3), Span(1, 0, 2)]
    want = cpu.forward_packed(torch.arange(5), spans, last_only=True)
    with simulated_cuda(1) as sim:
        tokens = torch.arange(5, device="cuda:0")
        sim.reset()
        with torch.device("cuda:0"):
            assert torch.equal(cpu.forward_packed(tokens, spans, last_only=True), want)
        assert sim.syncs == ["copy_"]


@simulated
@pytest.mark.parametrize("rows", [4, 16])
def test_memory_beyond_weights_and_cache(rows):
    """Log-probabilities with echo need the most, in which a pass has logits for each token."""
    args = ModelArgs(64, 1, 16, 96, 4, 2, max_batch_size=rows, max_seq_len=600)
    prompts = random_prompts([590] * rows, args.vocab_size)
    with simulated_cuda(1) as sim:
        generator = generator_of(model_on(1, args, dtype=torch.bfloat16))
        before = sim.bytes("cuda:0")
        sim.peak.clear()
        generator.generate(prompts, 3, 0, logprobs=True, echo=True)
        assert before < sim.peak["cuda:0"] < before + ACTIVATIONS


def test_too_few_gpus_are_counted():
    with simulated_cuda(2), pytest.raises(ValueError, match="2 GPUs are visible"):
        find_devices(4)
