"""Every published layout loads, and everything else is refused in one clear line."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from layouts import LAYOUTS, PICKLE, write
from reference import random_transformer
from safetensors.torch import load_file, save_file

from mixtral import Mixtral, ModelArgs, Transformer, checkpoint
from mixtral.checkpoint import (
    check_memory,
    has_zero_page,
    load_checkpoint,
    memory_needed,
    read_params,
    report,
)

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
ARCHIVE, INDEX = "consolidated.safetensors", "model.safetensors.index.json"
W1 = "layers.0.feed_forward.experts.1.w1.weight"
REFUSED = (ValueError, FileNotFoundError, RuntimeError)


def load(folder: Path, dtype=torch.bfloat16, devices=("cpu",)) -> Transformer:
    params = read_params(folder, ARGS.max_seq_len, ARGS.max_batch_size)
    check_memory(params, devices, dtype)
    model = Transformer(params, devices, dtype)
    load_checkpoint(model, folder)
    return model


def assert_loads(folder: Path, source: Transformer, **options) -> None:
    loaded = load(folder, **options).state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def refusal(folder: Path, before_loading: bool = False) -> str:
    """What loading a folder is refused with, perhaps before anything is allocated."""
    with pytest.raises(REFUSED) as caught:
        read_params(folder, 16, 1) if before_loading else load(folder)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1 and len(message) < 1000
    return message


@pytest.fixture(scope="module")
def source() -> Transformer:
    return random_transformer(ARGS, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("layouts")
    state = source.state_dict()
    return {layout: write(top / layout, layout, ARGS, state) for layout in LAYOUTS}


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda layout: shutil.copytree(folders[layout], tmp_path / "model")


@pytest.mark.parametrize("devices", [("cpu",), ("cpu",) * 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_alike(source, folders, layout, devices):
    assert load(folders[layout], devices=devices).params == ARGS
    assert len(list(folders[layout].glob("model*safetensors"))) in (0, 1, 3, 4)
    assert_loads(folders[layout], source, devices=devices)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_demo_in_every_layout(demo, tmp_path, layout):
    model = Transformer(read_params(demo, 64, 4))
    load_checkpoint(model, demo)
    folder = write(tmp_path, layout, model.params, model.state_dict())
    want, got = (
        Mixtral.build(
            path, demo / "tokenizer.model", 64, 4, num_gpus=0
        ).text_completion(
            ["And it came to pass", "The LORD is my"], temperature=0, max_gen_len=24
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


@pytest.mark.parametrize("layout", ["A", "C"])
def test_mapped_weights_are_not_copied(folders, layout):
    weight = load(folders[layout]).layers[0].feed_forward.experts[0].w1.weight
    name = f"{folders[layout].parent.name}/{layout}/"
    ours = re.compile(rf"([0-9a-f]+)-([0-9a-f]+) .*{name}")
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [(int(m[1], 16), int(m[2], 16)) for m in map(ours.match, maps) if m]
    assert any(begin <= weight.data_ptr() < end for begin, end in ranges)


# Changes to a folder. Each function returns one, to be called with the folder.


def drop(name):
    return lambda folder: (folder / name).unlink()


def put(name, content=b"x"):
    return lambda folder: (folder / name).write_bytes(content)


def edit(name, **changes):
    """Change keys of a JSON file, and drop those that are to be None."""

    def change(folder):
        value = json.loads((folder / name).read_text()) | changes
        kept = {k: v for k, v in value.items() if v is not None}
        (folder / name).write_text(json.dumps(kept))

    return change


def insert(name, text):
    """Add text to a JSON object as its last member."""

    def change(folder):
        value = (folder / name).read_text().rstrip().removesuffix("}")
        (folder / name).write_text(f"{value}, {text}}}")

    return change


def split(last, missing=()):
    def change(folder):
        (folder / PICKLE).unlink()
        for i in set(range(last + 1)) - set(missing):
            (folder / f"{PICKLE}-split{i}").write_bytes(b"x")

    return change


def cut(name, begin, end=None):
    """Take bytes out of a file."""

    def change(folder):
        data = (folder / name).read_bytes()
        tail = b"" if end is None else data[end:]
        (folder / name).write_bytes(data[:begin] + tail)

    return change


def tensors(change_tensors):
    def change(folder):
        state = load_file(folder / ARCHIVE)
        change_tensors(state)
        save_file(state, folder / ARCHIVE)

    return change


def pickled(change_tensors):
    def change(folder):
        state = torch.load(folder / PICKLE)
        change_tensors(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are deprecated
            torch.save(state, folder / PICKLE)

    return change


def header(change_header):
    def change(folder):
        data = (folder / ARCHIVE).read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        value = json.loads(data[8:size])
        text = json.dumps(change_header(value) or value).encode()
        start = struct.pack("<Q", len(text)) + text
        (folder / ARCHIVE).write_bytes(start + data[size:])

    return change


def compress(folder):
    """Write a pickle's archive once more, with its weights compressed."""
    with zipfile.ZipFile(folder / PICKLE) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("bomb", "w")


def overlap(value):
    value[W1]["data_offsets"] = value[W1.replace("w1", "w3")]["data_offsets"]


def one_offset(value):
    value[W1]["data_offsets"].pop()


def weight(convert):
    return pickled(lambda s: s.update({"norm.weight": convert(s["norm.weight"])}))


DEEP = b'{"a":' * 100_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 96803\n"
PAGE_OF_HTML = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"
SHARD_2, SHARD_4 = (f"model-0000{i}-of-00004.safetensors" for i in (2, 4))

BEFORE_LOADING = [
    ("A", shutil.rmtree, "no folder at"),
    ("A", drop(PICKLE), "no weights in"),
    ("A", drop("params.json"), "no params.json"),
    ("A", put("params.json", b"{"), "no JSON object"),
    ("A", put("params.json", b"[]"), "no JSON object"),
    ("A", put("params.json", b"\xff\xfe"), "no JSON object"),
    ("A", put("params.json", DEEP), "no JSON object"),
    ("A", lambda f: os.truncate(f / "params.json", 3 * 10**9), "no JSON object"),
    ("A", edit("params.json", moe=None), "dense model"),
    ("A", edit("params.json", dim="32"), "no usable dim"),
    ("A", edit("params.json", dim=True), "no usable dim"),
    ("A", edit("params.json", dim=10**400), "no usable dim"),
    ("A", edit("params.json", dim=-32), "no usable dim"),
    ("A", edit("params.json", n_heads=None), "no usable n.*heads"),
    ("A", edit("params.json", n_layers=600), "more layers and experts"),
    ("A", edit("params.json", n_kv_heads=3), "params.json: .*n_heads a multiple"),
    ("A", edit("params.json", head_dim=7), "params.json: head_dim"),
    ("A", insert("params.json", '"norm_eps": NaN'), "no usable .*norm_eps"),
    ("A", insert("params.json", '"norm_eps": 1e400'), "no usable .*norm_eps"),
    ("A", insert("params.json", '"rope_theta": Infinity'), "no usable rope_theta"),
    ("A", edit("params.json", rope_theta=10**400), "no usable rope_theta"),
    ("A", edit("params.json", rope_theta=False), "no usable rope_theta"),
    ("D", edit("config.json", rope_parameters={"rope_theta": 0}), "no .* rope_theta"),
    ("A", split(10), r"cat consolidated.00.pth-split\{0..10\} > consolidated"),
    ("A", split(10, {3}), r"split3 is missing in .*: 1 of 11"),
    ("A", put("model.safetensors"), "move one kind"),
    ("A", pipe(PICKLE), r"consolidated.00.pth' in .* not a regular file"),
    ("A", lambda f: (drop(PICKLE)(f), put("a.gguf")(f)), "a.gguf.*GGUF"),
    ("B", drop("consolidated.03.pt"), "consolidated.03.pt is missing"),
    ("B", drop("consolidated.07.pt"), "consolidated.07.pt is missing"),
    ("D", edit("config.json", num_local_experts=None), "dense model"),
    ("D", edit("config.json", hidden_size=[32]), "no usable dim or hidden_size"),
    ("D", drop("model.safetensors"), "no weights"),
    ("D", drop("config.json"), "no config.json"),
    ("D-sharded", drop(SHARD_2), f"{SHARD_2} is missing"),
    ("D-sharded", drop(SHARD_4), f"{SHARD_4} is missing"),
    ("D-sharded", pipe(SHARD_2), f"{SHARD_2}' in .* not a regular file"),
]

IN_HEADERS = [
    ("A", edit("params.json", head_dim=4), r"is \(32, 32\).*says \(16, 32\)"),
    ("A", edit("params.json", dim=2**30), "does not fit"),
    ("A", put(PICKLE, b""), "consolidated.00.pth is damaged.* md5 .*1faa9bc9b2"),
    ("A", put(PICKLE, POINTER), "git lfs pull"),
    ("A", cut(PICKLE, 9000), "consolidated.00.pth is damaged.* md5 .*1faa9bc9b2"),
    ("A", cut(PICKLE, 8192, 16384), "damaged .8192 bytes are missing.* md5 .*1faa9"),
    ("A", compress, "is damaged .*compressed"),
    ("A", pickled(lambda s: s.update({"norm.weight": Bomb()})), "run code, 'io.open'"),
    ("A", pickled(lambda s: s.update({7: s["norm.weight"]})), "no place for '7'"),
    ("A", pickled(lambda s: s.update({"a\nb": s[W1]})), r"no place for 'a\\nb'"),
    ("A", weight(lambda t: [t]), "no plain tensor"),
    ("A", weight(lambda t: torch.nested.nested_tensor([t, t])), "no plain tensor"),
    ("A", weight(torch.Tensor.to_sparse), "no plain tensor"),
    ("A", weight(lambda t: t.to("meta")), "no plain tensor"),
    (
        "A",
        weight(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
        "qint8",
    ),
    ("C", cut(ARCHIVE, -7), "7 of .* bytes are missing"),
    ("C", put(ARCHIVE, struct.pack("<Q", 2**62)), "is damaged"),
    ("C", put(ARCHIVE, PAGE_OF_HTML), "is damaged"),
    ("C", header(overlap), "is damaged"),
    ("C", header(one_offset), "is damaged"),
    ("C", header(lambda h: h[W1].pop("data_offsets")), "is damaged"),
    ("C", header(lambda h: {"a": 1}), "is damaged"),
    ("C", tensors(lambda s: s.pop(W1)), f"lacks {W1}"),
    ("C", tensors(lambda s: s.update(extra=s[W1] + 1)), "no place for 'extra'"),
    ("C", tensors(lambda s: s.update({W1: s[W1][1:]})), r"is \(47, 32\)"),
    ("C", tensors(lambda s: s.update({W1: s[W1].char()})), "torch.int8"),
]


@pytest.mark.parametrize("layout, change, message", BEFORE_LOADING)
def test_refused_before_loading(copy_of, layout, change, message):
    folder = copy_of(layout)
    change(folder)
    assert re.search(message, refusal(folder, before_loading=True))


@pytest.mark.parametrize("layout, change, message", IN_HEADERS)
def test_refused_before_a_weight_is_read(
    copy_of, monkeypatch, layout, change, message, recwarn
):
    folder = copy_of(layout)
    change(folder)
    recwarn.clear()
    monkeypatch.setattr(checkpoint, "fill", None)
    monkeypatch.chdir(folder)
    assert re.search(message, refusal(folder))
    assert not recwarn and not (folder / "bomb").exists()


ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
HARMFUL = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": "dynamic"},
    {"rope_parameters": ROPE},
    {"hidden_act": "gelu"},
    {"model_type": "mistral"},
    {"tie_word_embeddings": True},
    {"is_causal": False},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"attention_chunk_size": 8},
    {"per_layer_config": {"1": {"head_dim": 16}}},
    {"sliding_window": 8},
    {"sliding_window": [None, 8]},
    {"yarn": {"factor": 4}},
    {"lora": {"rank": 64}},
    {"quantization": {"qformat_weight": "fp8_e4m3"}},
    {"quantization_config": {"quant_method": "awq"}},
]
HARMLESS = [
    {"rope_scaling": {}, "sliding_window": False, "yarn": {}, "lora": None},
    {"rope_scaling": {"type": "default", "rope_theta": 5e5}},
    {"layer_types": ["full_attention"] * 2, "is_causal": True, "hidden_act": "swish"},
    {"partial_rotary_factor": 0.5, "attention_bias": True, "rope_type": "yarn"},
    {"max_position_embeddings": 8, "router_jitter_noise": 0.5, "type": "linear"},
]


@pytest.mark.parametrize("layout, name", [("A", "params.json"), ("D", "config.json")])
@pytest.mark.parametrize("keys", HARMFUL, ids=str)
def test_configs_of_other_models(copy_of, layout, name, keys):
    folder = copy_of(layout)
    edit(name, **keys)(folder)
    message = refusal(folder, before_loading=True)
    key = "rope_type" if "rope" in str(keys) else min(keys)
    assert str(folder / name) in message and key in message


@pytest.mark.parametrize("layout, name", [("A", "params.json"), ("D", "config.json")])
@pytest.mark.parametrize("keys", HARMLESS, ids=str)
def test_keys_that_change_nothing(copy_of, source, capsys, layout, name, keys):
    folder = copy_of(layout)
    edit(name, **keys)(folder)
    assert_loads(folder, source)
    assert load(folder).params == ARGS and capsys.readouterr().err == ""


@pytest.mark.parametrize("keys", [*HARMFUL[:-2], *HARMLESS], ids=str)
def test_transformers_agrees_on_the_keys(copy_of, source, keys):
    """A key is refused if and only if transformers' logits change, or it fails too."""
    from transformers import MixtralForCausalLM

    if keys.keys() & {"yarn", "lora", "tie_word_embeddings", "model_type"}:
        pytest.skip("a key of params.json, or not one of MixtralForCausalLM's")
    folder, tokens = copy_of("D"), torch.arange(32)[None]
    change = edit("config.json", rope_parameters=None, rope_theta=5e5)

    def logits() -> torch.Tensor | None:
        try:
            model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
            cache = model(tokens[:, :16], use_cache=True).past_key_values
            return model(tokens[:, 16:], past_key_values=cache).logits
        except Exception:  # noqa: BLE001
            return None

    change(folder)
    want = logits()
    edit("config.json", **keys)(folder)
    got = logits()
    same = got is not None and torch.allclose(got, want, atol=1e-4)
    assert same == (keys in HARMLESS)


def test_the_early_sliding_window(copy_of, source, capsys):
    folder = copy_of("D")
    edit("config.json", sliding_window=4096, n_heads=2)(folder)  # n_heads is unknown
    read_params(folder, 16, 1)
    assert re.fullmatch(
        r".*sliding_window 4096 is ignored.*\n", capsys.readouterr().err
    )
    assert_loads(folder, source)
    folder = shutil.copytree(folder, folder.parent / "torrent's")
    edit("config.json", sliding_window=4095)(folder)
    assert "sliding_window" in refusal(folder, before_loading=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_complete_layout_beside_a_part_of_another(copy_of, source, layout):
    folder = copy_of(layout)
    beside = {"model-00001-of-00003.safetensors", INDEX, "consolidated.00.pt"}
    beside |= {"consolidated.00.pth-split0", "model-00001-of-00000.safetensors"}
    beside |= {"consolidated.99999999999.pth", "model-00001-of-99999999999.safetensors"}
    for name in beside - {path.name for path in folder.iterdir()}:
        put(name)(folder)
    assert_loads(folder, source)


def test_shards_without_their_index(copy_of, source):
    folder = copy_of("D-sharded")
    (folder / INDEX).unlink()
    assert_loads(folder, source)


def test_no_weights_at_all(tmp_path):
    assert "no weights" in refusal(tmp_path)
    os.mkfifo(tmp_path / ARCHIVE)
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize("name", [b"m\xff", b"a\nb"])
def test_folder_names_that_are_no_text(folders, tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    shutil.copytree(folders["A"], folder)
    assert refusal(folder, before_loading=True).isascii()


def test_without_safetensors(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refusal(folders["C"])


@pytest.mark.parametrize(
    "layout, name, start",
    [
        ("A", PICKLE, b""),
        ("A", PICKLE, None),
        ("B", "consolidated.00.pt", b""),
        ("C", ARCHIVE, b""),
        ("C", ARCHIVE, PAGE_OF_HTML),
        ("D", "model.safetensors", b""),
        ("A", "params.json", b" "),
    ],
)
def test_a_large_damaged_file_is_not_read(copy_of, layout, name, start):
    """3 GB, all of it zero but for its first bytes (and, with None, its directory)."""
    folder = copy_of(layout)
    data = (folder / name).read_bytes()
    directory = bytearray(data[-22:])
    directory[12:16] = struct.pack("<I", 3 * 10**9)  # its size
    with (folder / name).open("wb") as file:
        file.write(start or b"")
        file.truncate(3 * 2**30)
        if start is None:
            file.seek(-len(directory), 2)
            file.write(directory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    assert re.search("damaged|no JSON", refusal(folder))
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert allocated < 20e6 and grown < 200e3  # bytes, kB


WIDE = ModelArgs(256, 1, 32, 512, 8, 2, 1e-5, 64, 4, max_seq_len=16)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_pages(tmp_path, layout, stored):
    """A page of zeros is found in any matrix, but scattered zeros are harmless."""
    state = random_transformer(WIDE, dtype=stored).state_dict()
    for name, tensor in state.items():
        tensor.flatten()[::2] = 0  # all looked at
        if name in ("tok_embeddings.weight", "output.weight"):
            tensor[32:] = 0  # tokens that are not used
    for dtype in (torch.bfloat16, torch.float32):
        assert_loads_zeros(write(tmp_path / "whole", layout, WIDE, state), dtype)
    for name in ("attention.wk", "attention.wo", "ffn_norm", "feed_forward.gate"):
        check_zero_page(tmp_path, layout, state, f"layers.0.{name}.weight")
    for i, w in enumerate(("w1", "w2", "w3")):
        name = f"layers.0.feed_forward.experts.{i}.{w}.weight"
        check_zero_page(tmp_path, layout, state, name)


def assert_loads_zeros(folder: Path, dtype: torch.dtype) -> None:
    load_checkpoint(Transformer(read_params(folder, 16, 1), dtype=dtype), folder)


def check_zero_page(tmp_path, layout, state, name) -> None:
    """Zero 16 KiB, in wk a head, which the hub keeps together: that names the weight."""
    damaged = {key: tensor.clone() for key, tensor in state.items()}
    tensor = damaged[name]
    if layout == "B" and ".w2." in name:  # where w2 lies transposed
        tensor = tensor.T
    tensor[: max(1, 16384 // tensor[0].nbytes) if tensor.dim() > 1 else None] = 0
    folder = write(tmp_path / name, layout, WIDE, damaged)
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(ValueError, match="holds a run of zero bytes") as caught:
            assert_loads_zeros(folder, dtype)
        assert name in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_single_page_of_the_file(dtype):
    """Pages are the file's, not the tensor's; a negative zero is not zero bytes."""
    memory = torch.ones(5 * 4096, dtype=torch.uint8).view(dtype)
    first = -memory.data_ptr() % 4096 // dtype.itemsize
    page = memory[first:][: 4096 // dtype.itemsize]
    page[:] = 0
    assert has_zero_page(memory[1:-1])
    page[:] = -0.0
    assert not has_zero_page(memory[1:-1])
    page[:-1] = 0
    assert not has_zero_page(memory[1:-1])


@pytest.mark.parametrize("stderr", [None, "/dev/null", "/dev/full"])
def test_report_never_fails(monkeypatch, stderr):
    if stderr:
        stderr = Path(stderr).open("w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stderr)
    report("text")
    if stderr:
        with contextlib.suppress(OSError):  # what is left cannot be written either
            stderr.close()
    report("text")


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_found_or_harmless(source, folders, tmp_path, layout):
    """Truncations, flipped bits in headers, lost and exchanged files."""
    rng = random.Random(layout)
    want, outcomes = source(TOKENS), {"loaded": 0, "refused": 0}
    suffixes = (".pt", ".pth", ".safetensors")
    files = [f for f in sorted(folders[layout].iterdir()) if f.suffix in suffixes]
    places = {file: headers(file) for file in files}
    for turn in range(120):
        folder = shutil.copytree(folders[layout], tmp_path / str(turn))
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
        except REFUSED as error:
            assert len(str(error).splitlines()) == 1
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
    first = f"cuda:0 needs {memory_needed(args, 2)[0] / 1e9 + 1.07:.1f} GB, 40.0 GB"
    ways = "int8, or with num_gpus 4 of such cards, or with cpu_layers 9 "
    with pytest.raises(RuntimeError, match=f"{ways}.{first}.*cuda:1") as caught:
        check_memory(args, ["cuda:0", "cuda:1"])
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)
    with pytest.raises(RuntimeError, match="lower max_seq_len .*cpu needs .* 40.0 GB"):
        check_memory(args, ["cpu"])
    for cpu_layers, message in ((1, "needs GPUs"), (33, "0 to 32"), (1.5, "0 to 32")):
        with pytest.raises(ValueError, match=message):
            check_memory(args, ["cpu"], cpu_layers=cpu_layers)


def test_memory_needed_counts_every_tensor():
    """8x7B's parameters, a cache for 4 rows of 4096 tokens, and complex64 factors."""
    args = ModelArgs(max_seq_len=4096, max_batch_size=4)
    cache = 2 * 32 * 4 * 4096 * 8 * 128
    total = 2 * (46_702_792_704 + cache) + 8 * 4096 * 64
    assert memory_needed(args, 1) == [total, 0]
    experts = 32 * 8 * 3 * 4096 * 14336
    int8 = total - experts + 2 * 32 * 8 * (2 * 14336 + 4096)  # and a scale for each row
    for n in (1, 2, 4, 8):
        share = experts // n
        first = total - 2 * experts + 2 * share
        assert memory_needed(args, n) == [first] + [2 * share] * (n - 1) + [0]
        on_host = share * 26 // 32 * 2
        left = [first - on_host] + [2 * share - on_host] * (n - 1)
        assert memory_needed(args, n, cpu_layers=26) == [*left, n * on_host]
        assert sum(memory_needed(args, n, cpu_layers=26, int8=True)) == int8
    in_float32 = memory_needed(args, 1, torch.float32)
    assert in_float32 == [2 * total - 8 * 4096 * 64, 0]
