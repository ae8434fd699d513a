"""Every published layout loads, and everything else is refused in a clear line."""

import json
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from layouts import LAYOUTS, PICKLE, write
from reference import random_transformer
from safetensors.torch import load_file, save_file

from mixtral import Mixtral, ModelArgs, Transformer, checkpoint
from mixtral.checkpoint import check_memory, load_checkpoint, memory_needed, read_params

ARGS = ModelArgs(
    dim=32,
    n_layers=2,
    head_dim=8,
    hidden_dim=48,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=40,
    num_experts=4,
    rope_theta=5e5,
    max_seq_len=16,
)
TOKENS = torch.arange(12).view(1, 12)


def load(folder: Path, dtype=torch.bfloat16, devices=("cpu",)) -> Transformer:
    params = read_params(folder, ARGS.max_seq_len, ARGS.max_batch_size)
    model = Transformer(params, devices, dtype)
    load_checkpoint(model, folder)
    return model


@pytest.fixture(scope="module")
def source() -> Transformer:
    return random_transformer(ARGS, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("layouts")
    state = source.state_dict()
    return {layout: write(top / layout, layout, ARGS, state) for layout in LAYOUTS}


@pytest.mark.parametrize("devices", [("cpu",), ("cpu",) * 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_alike(source, folders, layout, devices):
    model = load(folders[layout], devices=devices)
    assert model.params == ARGS
    assert len(list(folders[layout].glob("model*safetensors"))) in (0, 1, 3, 4)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model(TOKENS), load(folders["A"], devices=devices)(TOKENS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_demo_in_every_layout(demo, tmp_path, layout):
    tokenizer = demo / "tokenizer.model"
    args = read_params(demo, 64, 4)
    model = Transformer(args)
    load_checkpoint(model, demo)
    folder = write(tmp_path, layout, args, model.state_dict())
    prompts = ["And it came to pass", "The LORD is my"]
    want, got = (
        Mixtral.build(path, tokenizer, 64, 4, num_gpus=0).text_completion(
            prompts, temperature=0, max_gen_len=24
        )
        for path in (demo, folder)
    )
    assert want == got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_other_dtypes_are_converted(source, tmp_path, layout, stored):
    state = {name: t.to(stored) for name, t in source.state_dict().items()}
    folder = write(tmp_path, layout, ARGS, state)
    for wanted in (torch.bfloat16, torch.float32):
        loaded = load(folder, wanted).state_dict()
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor.to(wanted)), name


def test_mapped_weights_are_not_copied(folders):
    weight = load(folders["A"]).layers[0].feed_forward.experts[0].w1.weight
    ours = re.compile(rf"([0-9a-f]+)-([0-9a-f]+) .*{folders['A'].parent.name}/A/")
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = (ours.match(line) for line in maps)
    ranges = [(int(m[1], 16), int(m[2], 16)) for m in ranges if m]
    assert any(begin <= weight.data_ptr() < end for begin, end in ranges)


def edit_json(path: Path, **changes) -> None:
    value = json.loads(path.read_text()) | changes
    kept = {k: v for k, v in value.items() if v is not None}
    path.write_text(json.dumps(kept))


def drop(name):
    def change(folder):
        (folder / name).unlink()

    return change


def put(name, content=b"x"):
    return lambda folder: (folder / name).write_bytes(content)


def edit(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def split(last, missing=()):
    def change(folder):
        (folder / PICKLE).unlink()
        for i in range(last + 1):
            if i not in missing:
                (folder / f"{PICKLE}-split{i}").write_bytes(b"x")

    return change


def cut(name, size):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return change


def tensors(change_tensors):
    def change(folder):
        path = folder / "consolidated.safetensors"
        state = load_file(path)
        change_tensors(state)
        save_file(state, path)

    return change


def overlap(folder):
    """Let two tensors of a safetensors file lie on the same bytes."""
    path = folder / "consolidated.safetensors"
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header[W1]["data_offsets"] = header[W1.replace("w1", "w3")]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[size:])


HOLES = struct.pack("<Q", 2**62)
W1 = "layers.0.feed_forward.experts.1.w1.weight"


@pytest.mark.parametrize(
    "layout, change, message",
    [
        ("A", shutil.rmtree, "no folder at"),
        ("A", drop(PICKLE), "no weights in"),
        ("A", drop("params.json"), "no params.json"),
        ("A", put("params.json", b"{"), "no JSON"),
        ("A", put("params.json", b"[]"), "no JSON object"),
        ("A", put("params.json", b"\xff\xfe"), "no JSON"),
        ("A", edit("params.json", moe=None), "dense model"),
        ("A", edit("params.json", dim="32"), "no usable dim"),
        ("A", edit("params.json", n_heads=None), "no usable n.*heads"),
        ("A", edit("params.json", n_kv_heads=3), "no Mixtral can have"),
        ("A", edit("params.json", head_dim=4), r"is \(32, 32\).*says \(16, 32\)"),
        ("A", split(10), r"cat consolidated.00.pth-split\{0..10\} > consolidated"),
        ("A", split(10, {3}), "split3 is missing"),
        ("A", put("model.safetensors"), "move one kind"),
        ("A", put(PICKLE, b""), "consolidated.00.pth is damaged"),
        ("A", cut(PICKLE, 9000), "consolidated.00.pth is damaged"),
        ("B", drop("consolidated.03.pt"), "consolidated.03.pt is missing"),
        ("B", drop("consolidated.07.pt"), "consolidated.07.pt is missing"),
        ("C", cut("consolidated.safetensors", -7), "7 of .* bytes are missing"),
        ("C", put("consolidated.safetensors", HOLES), "is damaged"),
        ("C", overlap, "is damaged"),
        ("C", tensors(lambda s: s.pop(W1)), f"lacks {W1}"),
        ("C", tensors(lambda s: s.update(extra=s[W1] + 1)), "no place for extra"),
        ("C", tensors(lambda s: s.update({W1: s[W1][1:]})), r"is \(47, 32\)"),
        ("C", tensors(lambda s: s.update({W1: s[W1].char()})), "torch.int8"),
        ("D", edit("config.json", num_local_experts=None), "dense model"),
        ("D", edit("config.json", quantization_config={"quant_method": "awq"}), "awq"),
        ("D", drop("model.safetensors"), "no weights"),
        ("D", drop("config.json"), "no config.json"),
        ("D-sharded", put("model.safetensors.index.json", b"{}"), "no weight_map"),
        ("D-sharded", drop("model-00002-of-00004.safetensors"), "00002-of.* missing"),
        ("D-sharded", drop("model-00004-of-00004.safetensors"), "00004-of.* missing"),
    ],
)
def test_what_cannot_be_loaded_is_named(folders, tmp_path, layout, change, message):
    folder = tmp_path / "model"
    shutil.copytree(folders[layout], folder)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_folders_of_other_programs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_params(tmp_path, 16, 1)
    (tmp_path / "mixtral.Q4_K.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="GGUF"):
        read_params(tmp_path, 16, 1)


def test_shards_without_their_index(source, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["D-sharded"], folder)
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(load(folder)(TOKENS), source(TOKENS))


def test_without_safetensors(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(RuntimeError, match="pip install safetensors"):
        load(folders["C"])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_cannot_run_code(source, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["A"], folder)
    mark = tmp_path / "ran"
    state = {name: t.clone() for name, t in source.state_dict().items()}
    torch.save(state | {"norm.weight": Bomb(mark)}, folder / PICKLE)
    with pytest.raises(ValueError, match="damaged"):
        load(folder)
    assert not mark.exists()


def headers(path: Path) -> list[int]:
    """The offsets of a file's bytes that are not weights."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return list(range(8 + int.from_bytes(data[:8], "little")))
    import zipfile

    weights = set()
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                name, extra = struct.unpack_from("<2H", data, record.header_offset + 26)
                begin = record.header_offset + 30 + name + extra
                weights.update(range(begin, begin + record.file_size))
    return [i for i in range(len(data)) if i not in weights]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_found_or_harmless(source, folders, tmp_path, layout):
    """Truncations, flipped bits in headers, lost and exchanged files."""
    rng = random.Random(layout)
    want, outcomes = source(TOKENS), {"loaded": 0, "refused": 0}
    suffixes = (".pt", ".pth", ".safetensors")
    files = [f for f in sorted(folders[layout].iterdir()) if f.suffix in suffixes]
    places = {file: headers(file) for file in files}
    for turn in range(120):
        folder = tmp_path / str(turn)
        shutil.copytree(folders[layout], folder)
        victim = rng.choice(files)
        data = bytearray(victim.read_bytes())
        damage = rng.choice(["cut", "flip", "flip", "flip", "flip", "grow", "swap"])
        if damage == "cut":
            del data[rng.randrange(len(data)) :]
        elif damage == "flip":
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                data[rng.choice(places[victim])] ^= 1 << rng.randrange(8)
        elif damage == "grow":
            data += bytes(rng.randrange(1, 100))
        else:
            data = bytearray(rng.choice(files).read_bytes())
        (folder / victim.name).write_bytes(data)
        try:
            model = load(folder)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            assert str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert torch.equal(model(TOKENS), want), (damage, victim.name)
            outcomes["loaded"] += 1
        shutil.rmtree(folder)
    assert min(outcomes.values()) > 0, outcomes


def test_memory_is_compared_before_loading(monkeypatch):
    args = ModelArgs(max_seq_len=4096, max_batch_size=4)
    free = dict.fromkeys(("cuda:0", "cuda:1", "cuda:2", "cuda:3", "cpu"), 40 * 10**9)
    monkeypatch.setattr(checkpoint, "free_memory", free.get)
    check_memory(args, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"])
    with pytest.raises(RuntimeError, match="--num-gpus 4") as caught:
        check_memory(args, ["cuda:0", "cuda:1"])
    for word in (
        "cuda:0",
        "cuda:1",
        f"{memory_needed(args, 2)[0] / 1e9 + 1.07:.1f}",
        "40.0",
    ):
        assert word in str(caught.value)
    with pytest.raises(RuntimeError, match="cpu .*needs .* 40.0 GB"):
        check_memory(args, ["cpu"])
