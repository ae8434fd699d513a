"""Decoding and prefill on several GPUs: tokens, copies, waits, memory and order.

The GPUs are simulated, so the values are real. The kernels, which need a card, are plain
PyTorch here. What runs on a card, too, is at the end.
"""

import dataclasses
import functools
import inspect
import itertools
import random
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from simulated.cuda import kernel, simulated_cuda
from torch import Tensor

from mixtral import Mixtral, ModelArgs, Tokenizer, Transformer, decode
from mixtral.checkpoint import load_checkpoint, memory_needed, read_params
from mixtral.generation import find_devices, sample_top_p
from mixtral.model import Span, apply_rotary_emb

SIZES = {"dim": 24, "head_dim": 8, "hidden_dim": 40, "n_heads": 4, "n_kv_heads": 2}
ARGS = ModelArgs(n_layers=2, vocab_size=61, max_batch_size=5, max_seq_len=40, **SIZES)
PROMPTS = ["In the beginning God", "And", "The LORD is my shepherd; I shall not"]
PROMPTS += ["Thou shalt", "For unto us a child is born, unto us a son is given: and"]
NEAR = functools.partial(pytest.approx, rel=0, abs=1e-4)  # for log-probabilities
GPUS = pytest.mark.parametrize("n_gpus", [1, 2, 4, 8])


def model_of(args=ARGS, devices=("cpu",), cpu_layers=0, dtype=torch.float32):
    """Random weights, whose logits are of about unit size."""
    model = Transformer(args, devices, dtype, cpu_layers)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            values = 1 + 0.1 * values
        elif not name.startswith("tok"):
            values = values * parameter.shape[1] ** -0.5
        parameter.copy_(values)
    return model


def prepare(model: Transformer) -> Transformer:
    lines: list[str] = []
    model.prepare(lines.append)
    assert model.decoder and "warning" not in " ".join(lines)
    return model


def simulated_model(n_gpus: int, **options) -> Transformer:
    return model_of(devices=find_devices(n_gpus), **options)


def prompts_of(lengths) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(ARGS.vocab_size) for _ in range(n)] for n in lengths]


def generator_of(model: Transformer, eos: int = -1) -> Mixtral:
    return Mixtral(model, SimpleNamespace(eos_id=eos))


def decode_steps(model: Transformer, n_rows: int, n_steps: int) -> Tensor:
    """Logits after the same tokens every time, from position 0 on."""
    logits = []
    for step in range(n_steps):
        tokens = torch.arange(n_rows) * 7 + step + 1
        spans = [Span(row, step, 1) for row in range(n_rows)]
        logits.append(model.forward_packed(tokens, spans))
    return torch.stack([part.cpu() for part in logits])


# The kernels, as plain PyTorch.


@kernel(launches=1)
def linear(x, weight, residual=None):
    out = F.linear(x.float(), weight.float())
    return (out if residual is None else out + residual).to(x.dtype)


@kernel(launches=2)
def experts(x, logits, w1, w2, w3, first, top_k, residual=None, scales=None):
    values, chosen = logits.float().topk(top_k)
    weights = torch.zeros(logits.shape).scatter(1, chosen, values.softmax(-1))
    w1, w2, w3 = w1.float(), w2.float(), w3.float()
    if scales:
        w1, w2, w3 = (w * s[..., None] for w, s in zip((w1, w2, w3), scales))
    gate, up = (torch.einsum("td,ehd->teh", x.float(), w) for w in (w1, w3))
    sums = torch.einsum("teh,edh->ted", F.silu(gate) * up, w2)
    out = (sums * weights[:, first : first + len(w1), None]).sum(1)
    return out if residual is None else (out + residual).to(x.dtype)


@kernel(launches=1)
def rope_and_cache(qkv, freqs_cis, cache_k, cache_v, rows, positions):
    n, head_dim = cache_k.shape[2:]
    heads, freqs_cis = qkv.view(len(qkv), -1, head_dim), freqs_cis[positions, None]
    cache_k[rows, positions] = apply_rotary_emb(heads[:, -2 * n : -n], freqs_cis)
    cache_v[rows, positions] = heads[:, -n:]
    return apply_rotary_emb(heads[:, : -2 * n], freqs_cis)


@kernel(launches=2)
def attention(q, cache_k, cache_v, rows, positions):
    out = torch.empty_like(q)
    for q_row, out_row, row, last in zip(q, out, rows.tolist(), positions.tolist()):
        k, v = (c[row, : last + 1].transpose(0, 1) for c in (cache_k, cache_v))
        rows_of_q = F.scaled_dot_product_attention(q_row[:, None], k, v, enable_gqa=True)
        out_row.copy_(rows_of_q[:, 0])
    return out.flatten(1)


@pytest.fixture
def plain_kernels(monkeypatch):
    for function in (linear, experts, rope_and_cache, attention):
        monkeypatch.setattr(f"mixtral.kernels.{function.__name__}", function)


def calls_of(model: Transformer, n_rows: int) -> list:
    """What the host does in a step."""
    return inspect.getclosurevars(model.decoder.steps[n_rows]).nonlocals["tape"].calls


simulated = pytest.mark.usefixtures("plain_kernels")


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


def check_alike(ours: Mixtral, cpu: Mixtral, prompts: list, most: int | None) -> list:
    """Greedy tokens and all log-probabilities; returns the tokens."""
    right, right_values = cpu.generate(prompts, most, 0, logprobs=True, echo=True)
    tokens, values = ours.generate(prompts, most, 0, logprobs=True, echo=True)
    assert tokens == right
    assert [*itertools.chain(*values)] == NEAR([*itertools.chain(*right_values)])
    return tokens


def check_ends(monkeypatch, gpu: Mixtral, most: int | None) -> list[int]:
    """At eos, at max_seq_len or after so many tokens; returns the numbers of tokens."""
    monkeypatch.setattr("mixtral.generation.prefill_tokens", lambda device: 7)
    prompts, cpu = prompts_of((2, 31, 9, 1, 40)), generator_of(model_of())
    eos = cpu.generate(prompts[2:3], 9, 0)[0][0][5]
    cpu.stop_ids = gpu.stop_ids = {eos}
    tokens = check_alike(gpu, cpu, prompts, most)
    return [len(row) - len(prompt) for row, prompt in zip(tokens, prompts)]


@simulated
@pytest.mark.parametrize("n_gpus", [1, 4])
@pytest.mark.parametrize("most", [0, 4, None])
def test_rows_end_as_on_the_cpu(monkeypatch, n_gpus, most):
    """A row leaves the batch at the latest a step after its end."""
    with simulated_cuda(n_gpus):
        gpu = generator_of(prepare(simulated_model(n_gpus)))
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
            model = prepare(simulated_model(n, dtype=torch.bfloat16))
            logits.append(decode_steps(model, 3, 4))
    assert (logits[0] != logits[1]).float().mean() < 0.1


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
        model = prepare(simulated_model(n_gpus, args=args, **options))
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
            model = simulated_model(n_gpus, args=args)
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
            model, seen = prepare(simulated_model(n_gpus, args=args)), []
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
        mixtral = generator_of(prepare(simulated_model(2)))
        sim.reset()
        mixtral.generate(prompts_of((3, 2)), 12, 0.8, 0.9)
    assert len(sim.syncs) == ARGS.n_layers + 1 + 12  # the prompts' logits are checked


# Prefill and memory.


@GPUS
def test_prefill_sends_a_device_its_own_tokens(n_gpus):
    spans, logits = [Span(0, 0, 30), Span(1, 0, 5)], []
    with simulated_cuda(n_gpus) as sim:
        model = simulated_model(n_gpus)
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
        tokens = (chosen // (8 // n_gpus) == i).sum().item()
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
                device = f"cuda:{int(part[4]) // (8 // n_gpus)}"
                device = "cpu" if int(part[1]) >= 4 - cpu_layers else device
            assert str(tensor.device) == device, name
            held[device] += tensor.nbytes
        names = [f"cuda:{i}" for i in range(n_gpus)]
        assert [sim.bytes(name) for name in names] == [held[name] for name in names]
        want = memory_needed(model.params, n_gpus, torch.float32, cpu_layers)
        assert want == [held[name] for name in [*names, "cpu"]]


def test_too_few_gpus_are_counted():
    with simulated_cuda(2), pytest.raises(ValueError, match="2 GPUs are visible"):
        find_devices(4)


# The order of the devices' work.


@simulated
@GPUS
@pytest.mark.parametrize("cpu_layers", [0, 1])
def test_any_order_gives_the_same_logits(n_gpus, cpu_layers):
    want = decode_steps(model_of(), 3, 2)
    with simulated_cuda(n_gpus) as sim:
        model = prepare(simulated_model(n_gpus, cpu_layers=cpu_layers))
        right = decode_steps(model, 3, 2)
        assert torch.allclose(right, want, rtol=0, atol=1e-4)
        for seed in range(30):
            sim.schedule(seed)
            assert torch.equal(decode_steps(model, 3, 2), right), seed


@simulated
@pytest.mark.parametrize("n_gpus", [2, 4])
def test_a_wait_or_a_call_left_out_shows(n_gpus):
    with simulated_cuda(n_gpus) as sim:
        model = prepare(simulated_model(n_gpus))
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
def test_a_failure_costs_a_line_and_speed(monkeypatch, n_gpus, what, how, count, end):
    want, lines = decode_steps(model_of(), 3, 3), []
    with simulated_cuda(n_gpus) as sim:
        model = simulated_model(n_gpus)
        with monkeypatch.context() as patch:
            patch.setattr(what, how)
            model.prepare(lines.append)
        assert torch.allclose(decode_steps(model, 3, 3), want, rtol=0, atol=1e-4)
        assert not sim.replays and bool(model.decoder) == (count > 1)
    lines = [line for line in lines if "warning" in line]
    assert len(lines) == count and lines[0].endswith(end)


# On a card. The same is run on simulated ones, as far as that goes.


class StreamTape(decode.Tape):
    """A card for several: a stream for each entry of the list, and random delays.

    A copy between two entries waits, and is waited for, as one between two cards.
    """

    def __init__(self, places):
        super().__init__(places)
        self.streams = [torch.cuda.current_stream()]
        self.streams += [torch.cuda.Stream() for _ in places[1:]]
        self.packed, self.turns = None, itertools.cycle(range(1, len(places)))

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


def check_card(monkeypatch, way: str, n: int, cpu_layers: int, most=12) -> None:
    """Recorded, on streams, launched one by one or plain: as on the CPU, in float32."""
    args = dataclasses.replace(ARGS, max_batch_size=20)
    cpu = generator_of(model_of(args))
    model = model_of(args, ["cuda:0"] * n, cpu_layers)
    if way == "streams":
        monkeypatch.setattr(decode, "Tape", StreamTape)
    if way == "launch":
        monkeypatch.setattr(decode.Tape, "on", fail)
    if way != "plain":
        lines: list[str] = []
        model.prepare(lines.append)
        assert model.decoder
        assert sum("warning" in line for line in lines) == (5 if way == "launch" else 0)
    # Twenty rows are too many for the kernels, until some of them have ended.
    gpu, prompts = generator_of(model), prompts_of(range(2, 41, 2))
    for batch in (prompts[:5], prompts, prompts[3:4]):
        check_alike(gpu, cpu, batch, most)


WAYS = ["tape", "streams", "launch", "plain"]


@pytest.mark.cuda
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n, cpu_layers", [(1, 0), (1, 1), (2, 0), (4, 1)])
def test_card(monkeypatch, way, n, cpu_layers):
    check_card(monkeypatch, way, n, cpu_layers)


@simulated
@pytest.mark.parametrize("way", WAYS)
def test_simulated_card(monkeypatch, way):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    with simulated_cuda(1) as sim:
        sim.schedule(0)
        check_card(monkeypatch, way, 4, 1, most=3)


@pytest.mark.cuda
def test_card_ends_rows(monkeypatch):
    model = prepare(model_of(devices=["cuda:0"] * 2))
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
