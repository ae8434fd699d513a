"""Every layout loads, and of a folder that holds several the right one."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ARGS, assert_loads, drop, edit, load, put, refusal, tensors
from helpers.layouts import ARCHIVE, INDEX, LAYOUTS, PICKLE, PICKLE_INDEX, write
from helpers.reference import random_transformer
from safetensors.torch import load_file, save_file

from mixtral import Mixtral, Transformer
from mixtral.checkpoint import load_checkpoint, read_params


@pytest.mark.parametrize("devices", [("cpu",), ("cpu",) * 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_alike(source, folders, logged, layout, devices):
    assert load(folders[layout], devices=devices).params == ARGS
    assert (len(list(folders[layout].glob("*model-*"))) > 2) == layout.endswith("sharded")
    assert_loads(folders[layout], source, devices=devices)
    assert logged == []


def test_transformers_fuses_the_experts_of_layout_d2(folders):
    """Else the layout would test nothing that layout D does not."""
    shapes = {name: tuple(t.shape) for name, t in load_file(folders["D2"] / ONE_FILE).items()}
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (4, 96, 32)
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (4, 32, 48)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_demo_in_every_layout(demo, tmp_path, layout):
    model = Transformer(read_params(demo, 64, 4))
    load_checkpoint(model, demo)
    folder = write(tmp_path, layout, model.params, model.state_dict())
    texts = []
    for path in (demo, folder):
        mixtral = Mixtral.build(path, demo / "tokenizer.model", 64, 4, num_gpus=0)
        texts.append(mixtral.text_completion(["The LORD is my", "And"], 0, max_gen_len=20))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_other_dtypes_are_converted(source, tmp_path, layout, stored):
    state = {name: t.to(stored) for name, t in source.state_dict().items()}
    folder = write(tmp_path, layout, ARGS, state)
    for wanted in (torch.bfloat16, torch.float32):
        loaded = load(folder, wanted).state_dict()
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor.to(wanted)), name


@pytest.mark.parametrize("layout", ["A", "C", "D2"])
def test_mapped_weights_are_not_copied(folders, layout):
    weight = load(folders[layout]).layers[0].feed_forward.experts[0].w1.weight
    name = f"{folders[layout].parent.name}/{layout}/"
    ours = re.compile(rf"([0-9a-f]+)-([0-9a-f]+) .*{name}")
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [(int(m[1], 16), int(m[2], 16)) for m in map(ours.match, maps) if m]
    assert any(begin <= weight.data_ptr() < end for begin, end in ranges)


# Folders that hold more than one set of files

ONE_FILE = "model.safetensors"


@pytest.fixture(scope="module")
def stale(tmp_path_factory) -> Path:
    """Another model in three shards and in other layouts."""
    state = random_transformer(ARGS, dtype=torch.bfloat16, seed=1).state_dict()
    top = tmp_path_factory.mktemp("stale")
    for layout in ("B", "C", "D-sharded", "bin-sharded"):
        write(top / layout, layout, ARGS, state)
    return top


def add_weights(folder: Path, other: Path, total: int | None = None) -> list[str]:
    """Copy the weights of another folder, its shards numbered as if they were so many.

    The numbers beyond are empty files; without a total the names stay.
    """
    added = []
    for path in sorted(other.iterdir()):
        if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
            continue
        name = path.name if total is None else re.sub(r"of-\d+", f"of-{total:05}", path.name)
        shutil.copy(path, folder / name)
        added.append(name)
    for i in range(len(added), total or 0):
        name = re.sub(r"-\d{5}-", f"-{i + 1:05}-", added[0])
        (folder / name).touch()
        added.append(name)
    return added


def rename_shards(folder: Path, index: str, name_of) -> None:
    """Give the shards that an index names other names, there and in the folder."""
    weight_map = json.loads((folder / index).read_text())["weight_map"]
    names = {old: name_of(i, old) for i, old in enumerate(sorted(set(weight_map.values())))}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    edit(index, weight_map={tensor: names[old] for tensor, old in weight_map.items()})(folder)


@pytest.mark.parametrize("name", ["model", "pytorch_model", "consolidated", "own"])
@pytest.mark.parametrize("index", [INDEX, f"other.{INDEX}", "consolidated.safetensors.index.json"])
def test_the_index_decides(copy_of, source, stale, logged, name, index):
    """Between two complete sets of shards, whatever their names and their numbers."""
    folder = copy_of("D-sharded")

    def name_of(i: int, old: str) -> str:
        return f"own{i}.safetensors" if name == "own" else old.replace("model", name)

    rename_shards(folder, INDEX, name_of)
    (folder / INDEX).rename(folder / index)
    for total in (5, 6):
        add_weights(folder, stale / "D-sharded", total)
    add_weights(folder, stale / "C")
    assert_loads(folder, source)
    assert len(logged) == 1 and f"not from {ARCHIVE}" in logged[0]


def test_an_index_of_one_file(copy_of, source, logged):
    folder = copy_of("D")
    names = load_file(folder / ONE_FILE)
    index = {"weight_map": dict.fromkeys(names, ONE_FILE)}
    put(INDEX, json.dumps(index).encode())(folder)
    assert_loads(folder, source)
    assert logged == []


def test_the_index_of_pickles_decides(copy_of, source, stale):
    folder = copy_of("bin-sharded")
    add_weights(folder, stale / "bin-sharded", 5)
    rename_shards(folder, PICKLE_INDEX, lambda i, old: f"own{i}.bin")
    assert_loads(folder, source)


@pytest.mark.parametrize("layout", ["D-sharded", "bin-sharded"])
def test_two_sets_without_an_index_are_refused(copy_of, stale, layout):
    folder = copy_of(layout)
    added = add_weights(folder, stale / layout, 5)
    for index in folder.glob("*.index.json"):
        index.unlink()
    message = refusal(folder, before_loading=True)
    first = added[0].replace("of-00005", "of-00004")
    assert f"two complete sets of weights, {first} and {added[0]}: move one" in message


def test_two_other_indices_are_refused(copy_of, stale):
    folder = copy_of("D-sharded")
    (folder / INDEX).rename(folder / f"c.{INDEX}")
    added = add_weights(folder, stale / "D-sharded", 5)
    index = json.loads((folder / f"c.{INDEX}").read_text())
    put(f"b.{INDEX}", json.dumps(index).encode())(folder)  # it names the same files
    load(folder)
    index["weight_map"] = dict(zip(index["weight_map"], added * 100))
    put(f"a.{INDEX}", json.dumps(index).encode())(folder)
    assert f"two complete sets of weights, {added[0]} and" in refusal(folder, True)


def test_the_hubs_index_is_preferred(copy_of, source, stale, logged):
    """Some of Mistral's folders on the hub have an index for each of two complete sets."""
    folder = copy_of("D-sharded")
    added = []
    for path in sorted((stale / "D-sharded").glob("model-*")):
        added.append(path.name.replace("model", "consolidated"))
        shutil.copy(path, folder / added[-1])
    index = json.dumps({"weight_map": dict(enumerate(added))})
    put("consolidated.safetensors.index.json", index.encode())(folder)
    assert_loads(folder, source)
    shard = "model-00001-of-00004.safetensors"
    assert logged == [f"{folder}: weights are read from {shard}, not from {added[0]}"]


@pytest.mark.parametrize("layout", ["C", "D-sharded", "bin-sharded"])
def test_hidden_files_are_not_weights(copy_of, source, logged, layout):
    """macOS writes "._" files beside those that it copies to other disks."""
    folder = copy_of(layout)
    for index in folder.glob("*.index.json"):
        index.unlink()
    for path in list(folder.iterdir()):
        put(f"._{path.name}")(folder)
    assert_loads(folder, source)
    assert logged == []


def test_a_shard_without_tensors(copy_of, source):
    folder = copy_of("D-sharded")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    save_file({}, folder / "model-00000-of-00004.safetensors")
    edit(INDEX, weight_map=weight_map | {"none": "model-00000-of-00004.safetensors"})(folder)
    assert_loads(folder, source)


def test_large_metadata(copy_of, source):
    """A header may have up to 100 MB in safetensors."""
    folder = copy_of("C")
    save_file(load_file(folder / ARCHIVE), folder / ARCHIVE, metadata={"notes": "a" * 2**23})
    assert_loads(folder, source)


def test_two_kinds_of_pickles_are_refused(copy_of, stale):
    folder = copy_of("A")
    add_weights(folder, stale / "B")
    message = refusal(folder, before_loading=True)
    assert f"two complete sets of weights, {PICKLE} and consolidated.00.pt" in message


def test_shards_that_the_index_does_not_name_are_no_substitute(copy_of, stale):
    folder = copy_of("D-sharded")
    add_weights(folder, stale / "D-sharded", 5)
    for name in ("model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"):
        drop(name)(folder)
    assert "model-00003-of-00004.safetensors is missing: 2 of 4" in refusal(folder, True)
    for path in folder.glob("*of-00004*"):
        path.unlink()
    assert "model-00001-of-00004.safetensors is missing: 0 of 4" in refusal(folder, True)


@pytest.mark.parametrize("layout", ["A", "B", "C"])
def test_an_index_without_its_shards_does_no_harm(copy_of, folders, source, logged, layout):
    """A download of one layout only leaves it, since it is small."""
    folder = copy_of(layout)
    shutil.copy(folders["D-sharded"] / INDEX, folder)
    assert_loads(folder, source)
    assert logged == []


def test_a_whole_hub_folder(copy_of, source, stale, logged):
    """The safetensors are read, or the pickles if a shard is missing: one line says it."""
    folder = copy_of("D-sharded")
    add_weights(folder, stale / "B")
    read_params(folder, 16, 1)
    shard = "model-00001-of-00004.safetensors"
    want = f"{folder}: weights are read from {shard}, not from consolidated.00.pt"
    assert logged == [want]
    assert_loads(folder, source)
    drop(shard)(folder)
    logged.clear()
    assert_loads(folder, load(stale / "B"))
    want = f"{folder}: weights are read from consolidated.00.pt, since {shard} is missing"
    assert logged == [want]


@pytest.mark.parametrize("index", [None, b"x", b"[]", b'{"weight_map": {"a": "../b"}}'])
@pytest.mark.parametrize("layout", ["D-sharded", "bin-sharded"])
def test_one_set_needs_no_index(copy_of, source, layout, index):
    folder = copy_of(layout)
    for path in folder.glob("*.index.json"):
        path.unlink() if index is None else path.write_bytes(index)
    assert_loads(folder, source)


def test_one_pickle_of_the_hub(copy_of, source):
    folder = copy_of("D")
    torch.save(load_file(folder / ONE_FILE), folder / "pytorch_model.bin")
    drop(ONE_FILE)(folder)
    put("training_args.bin")(folder)
    assert_loads(folder, source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_complete_layout_beside_a_part_of_another(copy_of, source, layout):
    folder = copy_of(layout)
    for path in folder.glob("*.index.json"):  # it is not needed
        path.unlink()
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


@pytest.mark.parametrize("layout", ["A", "C"])
@pytest.mark.parametrize(
    "name",
    ["rope.freqs", "layers.0.attention.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
)
def test_rotary_buffers_hold_no_weights(copy_of, source, layout, name):
    folder = copy_of(layout)
    tensors(name, lambda w1: torch.arange(4))(folder)
    assert_loads(folder, source)
    tensors(f"{name}.weight", lambda w1: w1.clone())(folder)
    assert "no place for it" in refusal(folder)
