"""Damage to files is found or harmless, and a file is never read to find that out."""

import random
import re
import resource
import shutil
import struct
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ARGS, PAGE_OF_HTML, REFUSED, TOKENS, load, refusal
from helpers.layouts import ARCHIVE, LAYOUTS, PICKLE, write
from helpers.reference import random_transformer

from mixtral import ModelArgs, Transformer
from mixtral.checkpoint import has_zero_run, load_checkpoint


@pytest.mark.parametrize(
    "layout, name, start",
    [
        ("A", PICKLE, b""),
        ("B", "consolidated.00.pt", b""),
        ("C", ARCHIVE, b""),
        ("C", ARCHIVE, PAGE_OF_HTML),
        ("A", "params.json", b" "),
    ],
)
def test_a_large_damaged_file_is_not_read(copy_of, layout, name, start):
    """3 GB, all of it zero but for its first bytes."""
    folder = copy_of(layout)
    with (folder / name).open("wb") as file:
        file.write(start)
        file.truncate(3 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    assert re.search("cannot read|not a JSON object", refusal(folder))
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert allocated < 40e6 and grown < 200e3  # bytes, kB


WIDE = ModelArgs(256, 1, 32, 512, 8, 2, 1e-5, 64, 4, max_seq_len=16)
LAYER = [f"layers.0.{name}.weight" for name in ("attention.wk", "attention.wo", "ffn_norm")]
LAYER += [f"layers.0.feed_forward.experts.{i}.w{i}.weight" for i in (1, 2, 3)]


def wide_state(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state in which every other number is zero, all that are looked at among them."""
    state = random_transformer(WIDE, dtype=dtype).state_dict()
    for name, tensor in state.items():
        tensor.flatten()[::2] = 0
        if name in ("tok_embeddings.weight", "output.weight"):
            tensor[32:] = 0  # tokens that are not used
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scattered_zeros_are_harmless(tmp_path, layout, dtype):
    folder = write(tmp_path, layout, WIDE, wide_state(torch.bfloat16))
    load(folder, dtype)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYER)
def test_runs_of_zeros(tmp_path, layout, stored, name):
    """16 KiB are found in any matrix."""
    state = wide_state(stored)
    tensor = state[name]
    if layout == "B" and ".w2." in name:  # where w2 lies transposed
        tensor = tensor.T
    # In wk it is a head, which the hub keeps together.
    tensor[: 16384 // tensor[0].nbytes if tensor.dim() > 1 else None] = 0
    folder = write(tmp_path, layout, WIDE, state)
    for dtype in (torch.bfloat16, torch.float32):
        message = refusal(folder, dtype=dtype)
        assert name in message and "holds a run of zero bytes" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_run_of_zeros_anywhere(dtype):
    """8 KiB are found at any place, less than 4 KiB nowhere."""
    memory = torch.ones(5 * 4096, dtype=torch.uint8).view(dtype)
    for start in range(0, len(memory) // 2, 128):
        tensor = memory.clone()
        tensor[start:][: 4094 // dtype.itemsize] = 0
        assert not has_zero_run(tensor)
        tensor[start:][: 8192 // dtype.itemsize] = 0
        assert has_zero_run(tensor)
        assert has_zero_run(tensor[:, None].T)


# Pruned experts


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_of_zeros_is_a_pruned_one(tmp_path, logged, layout, int8):
    state = wide_state(torch.bfloat16)
    experts = "layers.0.feed_forward.experts"
    for w in ("w1", "w2", "w3"):
        state[f"{experts}.2.{w}.weight"].zero_()
    state[f"{experts}.0.w2.weight"].zero_()
    folder = write(tmp_path, layout, WIDE, state)
    model = load(folder, int8=int8)
    first = f"{experts}.0.w2.weight"
    want = (
        f"{folder}: 4 matrices of experts are all zeros, as in a pruned model: {first} is the first"
    )
    assert logged == [want]
    assert not model.get_parameter(f"{experts}.2.w3.weight").any()
    assert model.get_parameter(f"{experts}.1.w3.weight").any()
    assert model(TOKENS).isfinite().all()


def test_the_first_pruned_matrix_is_the_models(tmp_path, logged):
    """Not that whose name is first in the alphabet: layers.10 is after layers.2."""
    args = replace(WIDE, dim=32, n_layers=11, hidden_dim=64)
    state = random_transformer(args, dtype=torch.bfloat16).state_dict()
    for layer in (2, 10):
        state[f"layers.{layer}.feed_forward.experts.0.w1.weight"].zero_()
    load_checkpoint(Transformer(args), write(tmp_path, "C", args, state))
    assert len(logged) == 1 and "2 matrices" in logged[0]
    assert logged[0].endswith("layers.2.feed_forward.experts.0.w1.weight is the first")


@pytest.mark.parametrize("name", ["attention.wo", "feed_forward.gate", "attention_norm"])
def test_what_is_not_an_experts_must_not_be_zero(tmp_path, name):
    state = wide_state(torch.bfloat16)
    state[f"layers.0.{name}.weight"].zero_()
    assert "run of zero bytes" in refusal(write(tmp_path, "C", WIDE, state))


@pytest.mark.parametrize("size", [2**17, 2**20])
def test_a_hole_of_several_experts_is_not_a_pruned_model(tmp_path, size):
    """It begins and ends within matrices, of 256 KiB each."""
    folder = write(tmp_path, "C", WIDE, wide_state(torch.bfloat16))
    data = bytearray((folder / ARCHIVE).read_bytes())
    begin = 2**19 + 2**16  # 64 KiB after a multiple of a matrix, as all holes of downloads are
    data[begin : begin + size] = bytes(size)
    (folder / ARCHIVE).write_bytes(data)
    assert "run of zero bytes: the download is incomplete" in refusal(folder)


# Files that are cut, changed, lost or exchanged


def headers(path: Path) -> list[int]:
    """The offsets of a file's bytes that are not weights."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return list(range(8 + int.from_bytes(data[:8], "little")))
    weights = set()
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                name, extra = struct.unpack_from("<2H", data, record.header_offset + 26)
                begin = record.header_offset + 30 + name + extra
                weights.update(range(begin, begin + record.file_size))
    return [i for i in range(len(data)) if i not in weights]


def damaged(rng: random.Random, victim: Path, files: list[Path], places: list[int]) -> tuple:
    """The kind of the damage, and the file's bytes after it."""
    data = bytearray(victim.read_bytes())
    kind = rng.choice(["cut", "flip", "flip", "flip", "flip", "grow", "swap"])
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            data[rng.choice(places)] ^= 1 << rng.randrange(8)
    elif kind == "grow":
        data += bytes(rng.randrange(1, 100))
    else:
        data = bytearray(rng.choice(files).read_bytes())
    return kind, data


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_found_or_harmless(source, folders, tmp_path, layout):
    """Truncations, flipped bits in headers, lost and exchanged files."""
    rng = random.Random(layout)
    want = source(TOKENS)
    outcomes = {"loaded": 0, "refused": 0}
    suffixes = (".pt", ".pth", ".bin", ".safetensors")
    files = [f for f in sorted(folders[layout].iterdir()) if f.suffix in suffixes]
    places = {file: headers(file) for file in files}
    for turn in range(120):
        folder = shutil.copytree(folders[layout], tmp_path / str(turn))
        victim = rng.choice(files)
        kind, data = damaged(rng, victim, files, places[victim])
        (folder / victim.name).write_bytes(data)
        try:
            model = load(folder)
        except REFUSED as error:
            assert len(str(error).splitlines()) == 1
            outcomes["refused"] += 1
        else:
            assert torch.equal(model(TOKENS), want), (kind, victim.name)
            outcomes["loaded"] += 1
        shutil.rmtree(folder)
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize("layout", ["A", "B", "D", "D2", "bin-sharded"])
@pytest.mark.parametrize("w", ["wq", "wk", "wv"])
def test_not_finite_where_attention_may_hide_it(source, tmp_path, layout, w):
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    state[f"layers.1.attention.{w}.weight"][0, 5] = float("nan")
    folder = write(tmp_path, layout, ARGS, state)
    assert re.search(rf"attention.{w}.* not finite: download", refusal(folder))
