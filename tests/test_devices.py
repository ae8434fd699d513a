"""The demo on 1, 2, 4 and 8 GPUs, simulated: real values, on labels instead of cards."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from simulated import simulated_cuda

from mixtral import Mixtral, Tokenizer, Transformer
from mixtral import model as model_module
from mixtral.checkpoint import load_checkpoint, memory_needed, read_params
from mixtral.generation import find_devices
from mixtral.model import Batch, Span

PROMPTS = ["In the beginning God", "And", "The LORD is my shepherd; I shall not"]


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """Triton's kernels need a real card."""
    monkeypatch.setattr(model_module, "kernels", lambda: None)


def build(demo, num_gpus: int) -> Mixtral:
    """Mixtral.build, without its line about the time."""
    model = Transformer(read_params(demo, 64, 4), find_devices(num_gpus))
    load_checkpoint(model, demo)
    return Mixtral(model, Tokenizer(demo / "tokenizer.model"))


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_same_text_as_on_the_cpu(demo, num_gpus):
    want = build(demo, 0).text_completion(PROMPTS, 0, max_gen_len=16, logprobs=True)
    with simulated_cuda(num_gpus):
        mixtral = build(demo, num_gpus)
        got = mixtral.text_completion(PROMPTS, 0, max_gen_len=16, logprobs=True)
    for a, b in zip(want, got):
        assert a["tokens"] == b["tokens"] and a["generation"] == b["generation"]
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=0.05)


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_each_device_holds_its_experts(demo, num_gpus):
    with simulated_cuda(num_gpus) as sim:
        model = build(demo, num_gpus).model
        for name, parameter in model.named_parameters():
            device = 0
            if ".experts." in name:
                expert = int(name.split(".experts.")[1].split(".")[0])
                device = expert // (8 // num_gpus)
            assert str(parameter.device) == f"cuda:{device}", name
        held = [sim.bytes()[f"cuda:{i}"] for i in range(num_gpus)]
    assert held == memory_needed(model.params, num_gpus)


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("prefill", [False, True])
def test_copies_and_waits(demo, num_gpus, prefill):
    """A layer copies one tensor to each other device and one back, and never waits in
    decode, once in prefill."""
    spans = (
        [Span(0, 0, 40), Span(1, 0, 5)] if prefill else [Span(0, 9, 1), Span(1, 4, 1)]
    )
    tokens = torch.arange(sum(span.length for span in spans)) + 300
    with simulated_cuda(num_gpus) as sim, torch.inference_mode():
        model = build(demo, num_gpus).model
        layers, dim = model.params.n_layers, model.params.dim
        warm = [Span(0, 0, 9), Span(1, 0, 4)]
        model.forward_packed(torch.arange(13), warm)
        sim.reset()
        model.forward_packed(tokens, spans, last_only=True)
        assert len(sim.syncs) == (layers if prefill else 0), sim.syncs
        between = Counter(c for c in sim.copies if "cpu" not in c[:2])
        want = Counter()
        for i in range(1, num_gpus):
            want["cuda:0", f"cuda:{i}", len(tokens) * (dim + 8) * 2] = layers
            want[f"cuda:{i}", "cuda:0", len(tokens) * dim * 2] = layers
        assert between == want


def test_too_few_gpus_are_counted(demo):
    with simulated_cuda(2), pytest.raises(ValueError, match="2 GPUs are visible"):
        find_devices(4)


def test_decode_loop_never_waits_for_the_step_it_starts(demo):
    """The host waits once a token, for a copy queued before the next step was."""
    with simulated_cuda(2) as sim:
        mixtral = build(demo, 2)
        prompts = [[1, 400, 401], [1, 402]]
        logits, _ = mixtral.prefill(prompts)
        sim.reset()
        steps = mixtral.decode(logits, [3, 2], 12, 0.8, 0.9)
        rows = [row for row, _, _ in steps]
        assert len(rows) == 24
        assert set(sim.syncs) <= {"Event.synchronize"} and len(sim.syncs) == 12


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_launches_of_a_decode_step(demo, monkeypatch, num_gpus):
    """Ten a layer on one device; two more on several, and three for each further one.

    The kernels are stand-ins that launch nothing, and count for what the real launch.
    """
    launches = Counter()

    def stand_in(name: str, count: int, shape):
        def run(x, *args):
            launches[name] += count
            return torch.empty(shape(x, *args), dtype=x.dtype, device=x.device)

        return run

    kernels = SimpleNamespace(
        linear_decode=stand_in("linear", 1, lambda x, w, r: (len(x), len(w))),
        rope_and_cache=stand_in("rope", 1, lambda x, *_: x.shape),
        decode_attention=stand_in("attention", 2, lambda x, *_: x.shape),
        moe_decode=stand_in("moe", 2, lambda x, *_: x.shape),
    )
    with simulated_cuda(num_gpus) as sim, torch.inference_mode():
        model = build(demo, num_gpus).model
        monkeypatch.setattr(model_module, "kernels", lambda: kernels)
        batch = Batch(None, *torch.zeros(2, 1, dtype=torch.long), model.freqs_cis)
        x = torch.zeros(1, model.params.dim, dtype=torch.bfloat16, device="cuda:0")
        sim.reset()
        model.layers[1](x, batch)
        total = sum(sim.launches.values()) + sum(launches.values())
    assert total == 10 + (num_gpus > 1) * 2 + 3 * (num_gpus - 1), launches
