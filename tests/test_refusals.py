"""What is not a complete checkpoint of a Mixtral is refused in one clear line."""

import re
import shutil
import struct
import sys

import pytest
import torch
from helpers.checkpoints import (
    PAGE_OF_HTML,
    POINTER,
    W1,
    assert_loads,
    compress,
    cut,
    drop,
    edit,
    header,
    pipe,
    put,
    refusal,
    split,
    tensors,
)
from helpers.layouts import ARCHIVE, INDEX, PICKLE
from safetensors.torch import load_file, save_file

from mixtral import checkpoint


def only_for_llama_cpp(folder):
    drop(PICKLE)(folder)
    put("a.gguf")(folder)


def overlap(value):
    value[W1]["data_offsets"] = value[W1.replace("w1", "w3")]["data_offsets"]


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("bomb", "w")


DEEP = b'{"a":' * 100_000
SHARD_1, SHARD_2, SHARD_4 = (f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 4))


def repeat_in_shard_2(folder):
    """Give the second shard a tensor of the first, too."""
    name, tensor = next(iter(load_file(folder / SHARD_1).items()))
    save_file(load_file(folder / SHARD_2) | {name: tensor}, folder / SHARD_2)


BEFORE_LOADING = [
    ("A", shutil.rmtree, "no folder at"),
    ("A", drop(PICKLE), "no weights: expected consolidated"),
    ("A", drop("params.json"), "no params.json"),
    ("A", put("params.json", b"{"), "not a JSON object"),
    ("A", put("params.json", b"[]"), "not a JSON object"),
    ("A", put("params.json", b"\xff\xfe"), "not a JSON object"),
    ("A", put("params.json", DEEP), "not a JSON object"),
    ("A", edit("params.json", moe=7), "moe is not a JSON object"),
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
    ("A", pipe(PICKLE), r"consolidated.00.pth is not a regular file"),
    ("A", only_for_llama_cpp, "gguf for llama.cpp"),
    ("B", drop("consolidated.07.pt"), "consolidated.07.pt is missing: 7 of 8"),
    ("D", edit("config.json", num_local_experts=None), "dense model"),
    ("D", edit("config.json", hidden_size=[32]), "dim must be a whole"),
    ("D", edit("config.json", hidden_size="32", head_dim=None), "config.json: "),
    ("D", drop("model.safetensors"), "no weights"),
    ("D", drop("config.json"), "no config.json"),
    ("D-sharded", drop(SHARD_2), f"{SHARD_2} is missing: 3 of 4"),
    ("D-sharded", drop(SHARD_4), f"{SHARD_4} is missing"),
    ("D-sharded", pipe(SHARD_2), f"{SHARD_2} is not a regular file"),
    ("bin-sharded", drop("pytorch_model-00002-of-00004.bin"), "-00002-of-.* 3 of 4"),
]


def own_names(index):
    """Shards that only an index could tell, beside this one."""

    def change(folder):
        for i, path in enumerate(sorted(folder.glob("model-*"))):
            path.rename(folder / f"own{i}.safetensors")
        put(INDEX, index)(folder)

    return change


BEFORE_LOADING += [
    (
        "D-sharded",
        own_names(PAGE_OF_HTML),
        f"without a readable index .*: .*{INDEX} is not a JSON object: download",
    ),
    ("D-sharded", own_names(b"{}"), f"which files to read: .*{INDEX} has no weight_map: download"),
    ("D-sharded", own_names(b'{"weight_map": {"a": 1}}'), "'1', which is not a file's name"),
    ("D-sharded", own_names(b'{"weight_map": {"a": "/b"}}'), "'/b', which is not a file's name"),
    ("D-sharded", own_names(b'{"weight_map": {"a": ".."}}'), "'..', which is not a file's name"),
    ("D-sharded", own_names(b'{"weight_map": {"a": ""}}'), "'', which is not a file's name"),
    ("D-sharded", pipe(INDEX), None),  # it is as good as none, and not opened
]

OLD_KIND = {"_use_new_zipfile_serialization": False}
QINT8 = (0.1, 0, torch.qint8)
IN_HEADERS = [
    ("A", edit("params.json", head_dim=4), r"has shape \(32, 32\); the model has \(16, 32\)"),
    ("A", edit("params.json", dim=2**30), "does not fit"),
    ("A", put(PICKLE, b""), "cannot read .*consolidated.00.pth .* md5 .*1faa9bc9b2"),
    ("A", put(PICKLE, POINTER), "pointer: run git lfs pull"),
    ("A", put("model.safetensors"), "cannot read .*model.safetensors"),
    ("A", cut(PICKLE, 9000, 10**9), "consolidated.00.pth .* join .* md5 .*1faa9bc9b2"),
    ("A", cut(PICKLE, 8192, 16384), "displaced.* join .* md5 .*1faa9"),
    ("A", compress, "displaced or compressed"),
    ("A", tensors(W1, torch.clone, **OLD_KIND), "before PyTorch 1.6, .* convert it with torch"),
    ("A", tensors(W1, torch.clone, **OLD_KIND, pickle_protocol=4), "before PyTorch 1.6"),
    # Python 3.13 has it as _io.open.
    (
        "A",
        tensors("norm.weight", lambda t: Bomb()),
        "GLOBAL _?io.open.*would run code: do not use it elsewhere",
    ),
    ("A", tensors(7, torch.neg), "'7' .* no place for it"),
    ("A", tensors("a\nb", torch.neg), r"'a\\nb' .* no place for it"),
    ("A", tensors(W1, lambda t: [t]), "not a plain tensor"),
    ("A", tensors(W1, lambda t: torch.nested.nested_tensor([t, t])), "not a plain tensor"),
    ("A", tensors(W1, torch.Tensor.to_sparse), "not a plain tensor"),
    ("A", tensors(W1, torch.Tensor.t), "not a plain tensor"),
    ("A", tensors(W1, lambda t: t.to("meta")), "not a plain tensor"),
    ("A", tensors(W1, lambda t: torch.quantize_per_tensor(t.float(), *QINT8)), "qint8"),
    ("C", cut(ARCHIVE, -7, 10**9), "7 of .* bytes are missing"),
    ("C", put(ARCHIVE, struct.pack("<Q", 2**62)), "header would have 4611686018427387904 bytes"),
    ("C", put(ARCHIVE, PAGE_OF_HTML), "cannot read"),
    ("C", header(overlap), "cannot read"),
    ("C", header(lambda h: h[W1]["data_offsets"].pop()), "cannot read"),
    ("C", header(lambda h: h[W1].pop("data_offsets")), "cannot read"),
    ("C", header(lambda h: {"a": 1}), "cannot read"),
    ("C", tensors(W1, lambda t: None), rf"lacks 1 of 41 tensors, {W1} the first of them: download"),
    ("C", tensors("extra", torch.neg), "'extra' .* no place for it"),
    ("C", tensors(W1, lambda t: t[1:]), r"has shape \(47, 32\)"),
    ("C", tensors(W1, lambda t: t.view(1, 48, 32)), r"has shape \(1, 48, 32\)"),
    ("C", tensors(W1, torch.Tensor.char), "torch.int8"),
    ("D-sharded", repeat_in_shard_2, f"{SHARD_2} fills .*, which .*{SHARD_1} holds too"),
]

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
IN_HUB_HEADERS = [
    ("D", Q_PROJ, lambda t: t[1:], r"has shape \(31, 32\); the model has \(32, 32\)"),
    ("D", Q_PROJ, lambda t: t[:8], r"has shape \(8, 32\); the model has \(32, 32\)"),
    (
        "D",
        Q_PROJ,
        lambda t: t.view(4, 4, 2, 32),
        r"has shape \(4, 4, 2, 32\); the model has \(32, 32\)",
    ),
    ("D", Q_PROJ, lambda t: t[0, 0], r"has shape \(\); the model has \(32, 32\)"),
    ("D2", GATE_UP, lambda t: t[:, :94], r"has shape \(47, 32\); the model has \(48, 32\)"),
    (
        "D2",
        GATE_UP,
        lambda t: t[:3],
        "lacks 2 of 41 tensors, layers.0.feed_forward.experts.3.w1.weight the first",
    ),
    ("D2", GATE_UP, lambda t: torch.cat((t, t)), "no place for it"),
    ("D2", GATE_UP, lambda t: t[0], "no place for it"),
    ("D2", GATE_UP, lambda t: t[0, 0, 0], "no place for it"),
    (
        "D2",
        DOWN,
        lambda t: t.transpose(1, 2).contiguous(),
        r"has shape \(48, 32\); .* has \(32, 48\)",
    ),
    ("D2", DOWN, torch.Tensor.char, "not a plain tensor of floats .torch.int8"),
]


@pytest.mark.parametrize("layout, change, message", BEFORE_LOADING)
def test_refused_before_loading(copy_of, source, layout, change, message):
    folder = copy_of(layout)
    change(folder)
    if message is None:
        assert_loads(folder, source)
    else:
        assert re.search(message, refusal(folder, before_loading=True))


@pytest.mark.parametrize("layout, change, message", IN_HEADERS)
def test_refused_before_a_weight_is_read(copy_of, monkeypatch, layout, change, message, recwarn):
    folder = copy_of(layout)
    change(folder)
    recwarn.clear()
    monkeypatch.setattr(checkpoint, "is_pruned", None)
    monkeypatch.chdir(folder)
    assert re.search(message, refusal(folder))
    assert not recwarn and not (folder / "bomb").exists()


@pytest.mark.parametrize("layout, name, value, message", IN_HUB_HEADERS)
def test_tensors_of_the_hub(copy_of, monkeypatch, layout, name, value, message):
    path = copy_of(layout) / "model.safetensors"
    state = load_file(path)
    save_file(state | {name: value(state[name]).clone()}, path, metadata={"format": "pt"})
    monkeypatch.setattr(checkpoint, "is_pruned", None)
    assert re.search(message, refusal(path.parent))


def test_a_converted_pickle_of_the_old_kind(copy_of, source):
    """What the refusal advises helps."""
    folder = copy_of("A")
    tensors(W1, torch.clone, **OLD_KIND)(folder)
    path = folder / PICKLE
    (command,) = re.findall(r"torch\.save\(.*\)$", refusal(folder))
    exec(command)
    assert path.exists()
    assert_loads(folder, source)


def test_without_safetensors(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refusal(folders["C"])
