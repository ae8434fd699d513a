"""Experts in 8 bits: how they are rounded, and how little that changes."""

import math
import re
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoints import ARGS, TOKENS, W1, load, refusal, tensors
from helpers.layouts import LAYOUTS, write
from simulated.cuda import simulated_cuda

from mixtral import ModelArgs, Tokenizer, Transformer
from mixtral.checkpoint import load_checkpoint, quantize, read_params
from mixtral.model import Linear, Span


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, text: str) -> float:
    """Of chapters with an empty line between them, as tests/demo/README.md counts.

    A window has at most 512 tokens; all of a chapter but the first score their second
    half only.
    """
    bits = 0.0
    for chapter in text.split("\n\n"):
        chapter = chapter.removesuffix("\n") + "\n"
        ids = [*tokenizer.encode(chapter, bos=False, eos=True)]
        for start in range(0, len(ids), 256):
            scored = len(ids[start : start + 256])
            context = ids[max(0, start - 255) : start + 256]
            window = torch.tensor([tokenizer.bos_id, *context])
            span = Span(0, 0, len(window) - 1)
            logits = model.forward_packed(window[:-1], [span])[-scored:]
            loss = F.cross_entropy(logits, window[-scored:], reduction="sum")
            bits += loss.item() / math.log(2)
    return bits / len(text.encode())


def test_bits_per_byte(demo):
    """8 bits cost at most 0.1 %."""
    tokenizer = Tokenizer(demo / "tokenizer.model")
    text = (demo / "heldout.txt").read_text(encoding="utf-8")
    figures = {}
    for int8 in (False, True):
        model = Transformer(read_params(demo, 512, 1), int8=int8)
        load_checkpoint(model, demo)
        figures[int8] = bits_per_byte(model, tokenizer, text)
    print(figures)
    assert figures[False] == pytest.approx(1.178, abs=2e-3)
    assert figures[True] <= 1.001 * figures[False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_experts(source, folders, layout):
    """They are alike in all layouts, and the logits are those of their values."""
    kinds = torch.bfloat16, torch.float32
    loaded = [load(folders[layout], dtype, int8=True) for dtype in kinds]
    floats = Transformer(ARGS, dtype=torch.float32)
    for name, tensor in source.state_dict().items():
        want = tensor.float()
        for model in loaded:
            layer = model.get_submodule(name.removesuffix(".weight"))
            if ".experts." not in name:
                assert torch.equal(layer.weight.float(), tensor.float())
                continue
            largest = tensor.float().abs().max(dim=1, keepdim=True).values
            scale = (largest / 127).to(layer.scale.dtype).float()
            assert torch.equal(layer.scale[:, None].float(), scale)
            want = layer.weight * scale
            assert layer.weight.dtype == torch.int8
            assert ((want - tensor).abs() <= scale * 0.5001).all()
        floats.get_parameter(name).copy_(want)
    want = floats(TOKENS)
    torch.testing.assert_close(loaded[1](TOKENS), want, rtol=0, atol=1e-5)
    assert (loaded[0](TOKENS) - want).norm() < 0.05 * want.norm()


def test_quantize():
    """Any number of rows, zeros among them, and 127 as well as -127 are reached."""
    tensor = torch.randn(48, 515, generator=torch.Generator().manual_seed(0)).T
    tensor[256:258] = 0
    before = tensor.clone()
    layer = Linear(torch.empty(515, 48, dtype=torch.int8), torch.empty(515))
    quantize(layer, tensor)
    want = (tensor / (tensor.abs().amax(1, keepdim=True) / 127).clamp_min(1e-9)).round()
    assert torch.equal(layer.weight, want.char())
    assert not layer.scale[256:258].any() and layer.scale[:256].all()
    assert layer.weight.min() == -127 and layer.weight.max() == 127
    assert torch.equal(tensor, before)  # it may be a mapped file


@pytest.mark.parametrize("layout", ["B", "C", "D2"])
def test_weights_are_sent_as_they_are_stored(folders, layout):
    """bfloat16, to be rounded by the card: float32 would be twice as many bytes."""
    with simulated_cuda(2) as sim:
        model = Transformer(read_params(folders[layout], 16, 1), ["cuda:0", "cuda:1"], int8=True)
        sim.reset()
        load_checkpoint(model, folders[layout])
        sent = Counter()
        for start, to, size in sim.copies:
            sent[start, to] += size
        held = Counter()
        for parameter in model.parameters():
            held[str(parameter.device)] += 2 * parameter.numel()
    assert sent == {("cpu", device): size for device, size in held.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 47])
def test_int8_of_damaged_weights(copy_of, row, value):
    folder = copy_of("C")
    damage = torch.zeros(48, 32)
    damage[row, 5] = value
    tensors(W1, damage.add)(folder)
    assert re.match(rf"{W1} in .* not finite: download", refusal(folder, int8=True))


def anonymous() -> int:
    """Bytes of this process's memory that are not mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.parametrize("layout", ["A", "B"])
def test_little_memory_while_quantizing(tmp_path, layout):
    """No bfloat16 or float32 copy of a matrix, let alone of the model of 200 MB."""
    args = ModelArgs(4096, 1, 64, 4096, 2, 1, 1e-5, 64, 2, max_seq_len=16)
    state = {}
    for name, p in Transformer(args, ["meta"]).named_parameters():
        state[name] = torch.full(p.shape, 0.5, dtype=p.dtype, device="cpu")
    model = Transformer(args, int8=True)
    folder = write(tmp_path, layout, args, state)
    state.clear()
    before, samples, end = anonymous(), [0], threading.Event()

    def watch():
        while not end.wait(0.001):
            samples.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    load_checkpoint(model, folder)
    end.set()
    thread.join()
    shutil.rmtree(folder)
    stays = sum(p.nbytes for p in model.parameters())
    assert max(samples) - before < stays + 150e6
