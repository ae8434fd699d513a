"""Every published layout loads, and everything else is refused in one clear line."""

import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import struct
import sys
import threading
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.layouts import LAYOUTS, PICKLE, write
from helpers.reference import random_transformer
from safetensors.torch import load_file, save_file

from mixtral import Mixtral, ModelArgs, Transformer, checkpoint
from mixtral.checkpoint import (
    check_memory,
    has_zero_run,
    load_checkpoint,
    memory_needed,
    quantize,
    read_params,
    report,
)
from mixtral.model import Linear

ARGS = ModelArgs(32, 2, 8, 48, 4, 2, 1e-5, 40, 4, rope_theta=5e5, max_seq_len=16)
TOKENS = torch.arange(12).view(1, 12)
ARCHIVE, INDEX = "consolidated.safetensors", "model.safetensors.index.json"
W1 = "layers.0.feed_forward.experts.1.w1.weight"
REFUSED = (ValueError, FileNotFoundError, RuntimeError)


def load(folder: Path, dtype=torch.bfloat16, devices=("cpu",), int8=False) -> Transformer:
    params = read_params(folder, 16, ARGS.max_batch_size)
    check_memory(params, devices, dtype, int8=int8)
    model = Transformer(params, devices, dtype, int8=int8)
    load_checkpoint(model, folder)
    return model


def assert_loads(folder: Path, source: Transformer, **options) -> None:
    loaded = load(folder, **options).state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def refusal(folder: Path, before_loading: bool = False, **options) -> str:
    """What loading a folder is refused with, perhaps before anything is allocated."""
    with pytest.raises(REFUSED) as caught:
        read_params(folder, 16, 1) if before_loading else load(folder, **options)
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
    mixtrals = (
        Mixtral.build(path, demo / "tokenizer.model", 64, 4, num_gpus=0) for path in (demo, folder)
    )
    want, got = (m.text_completion(["The LORD is my", "And"], 0) for m in mixtrals)
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


def change(function):
    """A change to a folder: function(folder, ...), written without the folder."""
    return lambda *args, **kwargs: lambda folder: function(folder, *args, **kwargs)


@change
def drop(folder, name):
    (folder / name).unlink()


@change
def put(folder, name, content=b"x"):
    (folder / name).write_bytes(content)


@change
def pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


@change
def edit(folder, name, **keys):
    """Change keys of a JSON file, and drop those that are to be None."""
    value = json.loads((folder / name).read_text()) | keys
    kept = {k: v for k, v in value.items() if v is not None}
    (folder / name).write_text(json.dumps(kept))


@change
def split(folder, last, missing=()):
    (folder / PICKLE).unlink()
    for i in set(range(last + 1)) - set(missing):
        (folder / f"{PICKLE}-split{i}").write_bytes(b"x")


@change
def cut(folder, name, begin, end):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:begin] + data[end:])


@change
def tensors(folder, name, value):
    """Replace a tensor by what value makes of W1, or remove it if that is None."""
    pickled = (folder / PICKLE).exists()
    path = folder / (PICKLE if pickled else ARCHIVE)
    state = torch.load(path) if pickled else load_file(path)
    state |= {name: value(state[W1])}
    state = {k: v for k, v in state.items() if v is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        torch.save(state, path) if pickled else save_file(state, path)


@change
def header(folder, edit_header):
    data = (folder / ARCHIVE).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    value = json.loads(data[8:size])
    text = json.dumps(edit_header(value) or value).encode()
    (folder / ARCHIVE).write_bytes(struct.pack("<Q", len(text)) + text + data[size:])


def compress(folder):
    """Write a pickle's archive once more, with its weights compressed."""
    with zipfile.ZipFile(folder / PICKLE) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def overlap(value):
    value[W1]["data_offsets"] = value[W1.replace("w1", "w3")]["data_offsets"]


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("bomb", "w")


DEEP = b'{"a":' * 100_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 96803\n"
PAGE_OF_HTML = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"
SHARD_2, SHARD_4 = (f"model-0000{i}-of-00004.safetensors" for i in (2, 4))

BEFORE_LOADING = [
    ("A", shutil.rmtree, "no folder at"),
    ("A", drop(PICKLE), "no weights: "),
    ("A", drop("params.json"), "no params.json"),
    ("A", put("params.json", b"{"), "no JSON object"),
    ("A", put("params.json", b"[]"), "no JSON object"),
    ("A", put("params.json", b"\xff\xfe"), "no JSON object"),
    ("A", put("params.json", DEEP), "no JSON object"),
    ("A", edit("params.json", moe=7), "no JSON object"),
    ("A", edit("params.json", moe=None), "dense model"),
    ("A", edit("params.json", dim=True), "params.json: dim must be a whole number"),
    ("A", edit("params.json", n_heads=None), "n_heads must be a whole .* not None"),
    ("A", edit("params.json", n_layers=600), "more layers and experts"),
    ("A", edit("params.json", n_kv_heads=3), "params.json: .*n_heads a multiple"),
    ("A", edit("params.json", norm_eps=float("nan")), "norm_eps must be a finite"),
    ("A", edit("params.json", norm_eps=1e5), "norm_eps must be at most"),
    ("A", edit("params.json", rope_theta=0.5), "rope_theta at least 1"),
    ("A", edit("params.json", rope_theta=10**400), "rope_theta must be a finite"),
    ("A", edit("params.json", rope_theta=False), "rope_theta must be a finite"),
    ("D", edit("config.json", rope_parameters={"rope_theta": 0}), "rope_theta must be"),
    ("A", split(10), r"cat consolidated.00.pth-split\{0..10\} > consolidated"),
    ("A", split(10, {3}), r"split3 is missing: 10 of 11 files"),
    ("A", put("model.safetensors"), "move one kind"),
    ("A", pipe(PICKLE), r"consolidated.00.pth is not a regular file"),
    ("A", lambda f: (drop(PICKLE)(f), put("a.gguf")(f)), "gguf for llama.cpp"),
    ("B", drop("consolidated.07.pt"), "consolidated.07.pt is missing"),
    ("D", edit("config.json", num_local_experts=None), "dense model"),
    ("D", edit("config.json", hidden_size=[32]), "dim must be a whole"),
    ("D", edit("config.json", hidden_size="32", head_dim=None), "config.json: "),
    ("D", drop("model.safetensors"), "no weights"),
    ("D", drop("config.json"), "no config.json"),
    ("D-sharded", drop(SHARD_2), f"{SHARD_2} is missing: 3 of 4"),
    ("D-sharded", drop(SHARD_4), f"{SHARD_4} is missing"),
    ("D-sharded", pipe(SHARD_2), f"{SHARD_2} is not a regular file"),
]

QINT8 = (0.1, 0, torch.qint8)
IN_HEADERS = [
    ("A", edit("params.json", head_dim=4), r"is \(32, 32\).* has \(16, 32\) for it"),
    ("A", edit("params.json", dim=2**30), "does not fit"),
    ("A", put(PICKLE, b""), "cannot read .*consolidated.00.pth .* md5 .*1faa9bc9b2"),
    ("A", put(PICKLE, POINTER), "git lfs pull"),
    ("A", cut(PICKLE, 9000, 10**9), "consolidated.00.pth .* join .* md5 .*1faa9bc9b2"),
    ("A", cut(PICKLE, 8192, 16384), "displaced.* join .* md5 .*1faa9"),
    ("A", compress, "displaced or compressed"),
    ("A", tensors("norm.weight", lambda t: Bomb()), "GLOBAL io.open.*would run code"),
    ("A", tensors(7, torch.neg), "'7' .* no place for it"),
    ("A", tensors("a\nb", torch.neg), r"'a\\nb' .* no place for it"),
    ("A", tensors(W1, lambda t: [t]), "no plain tensor"),
    ("A", tensors(W1, lambda t: torch.nested.nested_tensor([t, t])), "no plain tensor"),
    ("A", tensors(W1, torch.Tensor.to_sparse), "no plain tensor"),
    ("A", tensors(W1, torch.Tensor.t), "no plain tensor"),
    ("A", tensors(W1, lambda t: t.to("meta")), "no plain tensor"),
    ("A", tensors(W1, lambda t: torch.quantize_per_tensor(t.float(), *QINT8)), "qint8"),
    ("C", cut(ARCHIVE, -7, 10**9), "7 of .* bytes are missing"),
    ("C", put(ARCHIVE, struct.pack("<Q", 2**62)), "cannot read"),
    ("C", put(ARCHIVE, PAGE_OF_HTML), "cannot read"),
    ("C", header(overlap), "cannot read"),
    ("C", header(lambda h: h[W1]["data_offsets"].pop()), "cannot read"),
    ("C", header(lambda h: h[W1].pop("data_offsets")), "cannot read"),
    ("C", header(lambda h: {"a": 1}), "cannot read"),
    ("C", tensors(W1, lambda t: None), f"lacks {W1}"),
    ("C", tensors("extra", torch.neg), "'extra' .* no place for it"),
    ("C", tensors(W1, lambda t: t[1:]), r"is \(47, 32\)"),
    ("C", tensors(W1, torch.Tensor.char), "torch.int8"),
]


@pytest.mark.parametrize("layout, change, message", BEFORE_LOADING)
def test_refused_before_loading(copy_of, layout, change, message):
    folder = copy_of(layout)
    change(folder)
    assert re.search(message, refusal(folder, before_loading=True))


@pytest.mark.parametrize("layout, change, message", IN_HEADERS)
def test_refused_before_a_weight_is_read(copy_of, monkeypatch, layout, change, message, recwarn):
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
    {"layer_types": ["full_attention"] * 2, "hidden_act": "swish"},
    {"partial_rotary_factor": 0.5, "attention_bias": True, "rope_type": "yarn"},
    {"max_position_embeddings": 8, "router_jitter_noise": 0.5, "type": "linear"},
]


@pytest.mark.parametrize("layout, name", [("A", "params.json"), ("D", "config.json")])
@pytest.mark.parametrize("keys", [*HARMFUL, *HARMLESS], ids=str)
def test_keys_of_configs(copy_of, source, capsys, layout, name, keys):
    folder = copy_of(layout)
    edit(name, **keys)(folder)
    if keys in HARMFUL:
        message = refusal(folder, before_loading=True)
        key = "rope_type" if "rope" in str(keys) else min(keys)
        assert str(folder / name) in message and key in message
    else:
        assert_loads(folder, source)
        assert load(folder).params == ARGS and capsys.readouterr().err == ""


@pytest.mark.parametrize("keys", [*HARMFUL[:-2], *HARMLESS], ids=str)
def test_transformers_agrees_on_the_keys(copy_of, source, keys):
    """A key is refused if and only if transformers' logits change, or it fails too."""
    from transformers import MixtralForCausalLM

    if keys.keys() & {"yarn", "lora", "tie_word_embeddings", "model_type"}:
        pytest.skip("a key of params.json, or not one of MixtralForCausalLM's")
    folder, tokens = copy_of("D"), torch.arange(32)[None]
    edit("config.json", rope_parameters=None, rope_theta=5e5)(folder)

    def logits() -> torch.Tensor | None:
        try:
            model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
            cache = model(tokens[:, :16], use_cache=True).past_key_values
            return model(tokens[:, 16:], past_key_values=cache).logits
        except Exception:  # noqa: BLE001
            return None

    want = logits()
    edit("config.json", **keys)(folder)
    got = logits()
    same = got is not None and torch.allclose(got, want, atol=1e-4)
    assert same == (keys in HARMLESS)


def test_the_early_sliding_window(copy_of, source, capsys):
    folder = copy_of("D")
    edit("config.json", sliding_window=4096, n_heads=2)(folder)  # n_heads is unknown
    assert_loads(folder, source)
    warning = r".*sliding_window 4096 is ignored.*\n"
    assert re.fullmatch(warning, capsys.readouterr().err)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_complete_layout_beside_a_part_of_another(copy_of, source, layout):
    folder = copy_of(layout)
    (folder / INDEX).unlink(missing_ok=True)  # it is not needed
    beside = {"model-00001-of-00003.safetensors", INDEX, "consolidated.00.pt"}
    beside |= {f"{PICKLE}-split0", "model-00001-of-00000.safetensors"}
    beside |= {"consolidated.99999999999.pth", "model-00001-of-99999999999.safetensors"}
    for name in beside - {path.name for path in folder.iterdir()}:
        put(name)(folder)
    assert_loads(folder, source)


@pytest.mark.parametrize("layout", ["A", "C"])
def test_folder_names_that_are_no_text(source, folders, tmp_path, layout):
    shutil.copytree(folders[layout], tmp_path / "a\nb")
    assert_loads(tmp_path / "a\nb", source)
    folder = shutil.copytree(folders[layout], tmp_path / os.fsdecode(b"m\xff"))
    assert "cannot read" in refusal(folder)


def test_without_safetensors(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refusal(folders["C"])


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
    assert re.search("cannot read|no JSON", refusal(folder))
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert allocated < 40e6 and grown < 200e3  # bytes, kB


WIDE = ModelArgs(256, 1, 32, 512, 8, 2, 1e-5, 64, 4, max_seq_len=16)
LAYER = [f"layers.0.{name}" for name in ("attention.wk", "attention.wo", "ffn_norm")]
LAYER += [f"layers.0.feed_forward.experts.{i}.w{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_of_zeros(tmp_path, layout, stored):
    """16 KiB are found in any matrix, but scattered zeros are harmless."""
    state = random_transformer(WIDE, dtype=stored).state_dict()
    for name, tensor in state.items():
        tensor.flatten()[::2] = 0  # all looked at
        if name in ("tok_embeddings.weight", "output.weight"):
            tensor[32:] = 0  # tokens that are not used
    for name in (None, *(f"{name}.weight" for name in LAYER)):
        damaged = {key: tensor.clone() for key, tensor in state.items()}
        if name:  # in wk a head, which the hub keeps together
            tensor = damaged[name]
            if layout == "B" and ".w2." in name:  # where w2 lies transposed
                tensor = tensor.T
            tensor[: 16384 // tensor[0].nbytes if tensor.dim() > 1 else None] = 0
        folder = write(tmp_path / str(name), layout, WIDE, damaged)
        for dtype in (torch.bfloat16, torch.float32):
            if name:
                message = refusal(folder, dtype=dtype)
                assert name in message and "holds a run of zero bytes" in message
            else:
                load(folder, dtype)


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


@pytest.mark.parametrize("stderr", [None, "/dev/null", "/dev/full"])
def test_report_never_fails(monkeypatch, stderr):
    stderr = stderr and Path(stderr).open("w")  # noqa: SIM115
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
    args, gpus = ModelArgs(), [f"cuda:{i}" for i in range(4)]
    free = dict.fromkeys((*gpus, "cpu"), 40 * 10**9)
    monkeypatch.setattr(checkpoint, "free_memory", free.get)
    check_memory(args, gpus)
    first = f"cuda:0 needs {memory_needed(args, 2)[0] / 1e9 + 1.07:.1f} GB, 40.0 GB"
    ways = "fits with int8, it fits with num_gpus 4, it fits with cpu_layers 9 "
    with pytest.raises(RuntimeError, match=f"{ways}.{first}.*cuda:1") as caught:
        check_memory(args, gpus[:2])
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)
    with pytest.raises(RuntimeError, match="lower max_seq_len .*cpu needs .* 40.0 GB"):
        check_memory(args, ["cpu"])
    free["cuda:0"] = 16 * 10**9
    with pytest.raises(RuntimeError, match="fits with int8 and cpu_layers 26 .cuda:0"):
        check_memory(args, gpus[:1])
    for device, layers in (("cpu", 1), ("cuda:0", 33), ("cuda:0", 1.5)):
        with pytest.raises(ValueError, match="0 to 32, or 0 without GPUs"):
            check_memory(args, [device], cpu_layers=layers)


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


# 8 bits


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
    layer = Linear(torch.empty(515, 48, dtype=torch.int8), torch.empty(515))
    quantize(layer, tensor)
    want = (tensor / (tensor.abs().amax(1, keepdim=True) / 127).clamp_min(1e-9)).round()
    assert torch.equal(layer.weight, want.char())
    assert not layer.scale[256:258].any() and layer.scale[:256].all()
    assert layer.weight.min() == -127 and layer.weight.max() == 127


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 47])
def test_int8_of_damaged_weights(copy_of, row, value):
    folder = copy_of("C")
    damage = torch.zeros(48, 32)
    damage[row, 5] = value
    tensors(W1, damage.add)(folder)
    assert re.match(rf"{W1} in .* not finite: download", refusal(folder, int8=True))


@pytest.mark.parametrize("layout", ["A", "B", "D"])
@pytest.mark.parametrize("w", ["wq", "wk"])
def test_not_finite_where_attention_may_hide_it(source, tmp_path, layout, w):
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    state[f"layers.1.attention.{w}.weight"][0, 5] = math.nan
    folder = write(tmp_path, layout, ARGS, state)
    assert re.search(rf"attention.{w}.* not finite: download", refusal(folder))


def anonymous() -> int:
    """Bytes of this process's memory that are no mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.parametrize("layout", ["A", "B"])
def test_little_memory_while_quantizing(tmp_path, layout):
    """No bfloat16 or float32 copy of a matrix, let alone of the model of 200 MB."""
    args = ModelArgs(4096, 1, 64, 4096, 2, 1, 1e-5, 64, 2, max_seq_len=16)
    state = {}
    with torch.device("meta"):
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
