"""A tiny model's checkpoint folders: how to load, change and damage them."""

import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.layouts import ARCHIVE, PICKLE
from mixtral import ModelArgs, Transformer
from mixtral.checkpoint import load_checkpoint, read_params
from mixtral.devices import check_memory

ARGS = ModelArgs(32, 2, 8, 48, 4, 2, 1e-5, 40, 4, rope_theta=5e5, max_seq_len=16)
TOKENS = torch.arange(12).view(1, 12)
W1 = "layers.0.feed_forward.experts.1.w1.weight"
REFUSED = (ValueError, FileNotFoundError, RuntimeError)
PAGE_OF_HTML = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 96803\n"


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


# Changes to a folder. Called without it, they return a function that takes it.


def change(function: Callable) -> Callable:
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
def tensors(folder, name, value, **options):
    """Replace a tensor by what value makes of W1, or remove it if that is None."""
    pickled = (folder / PICKLE).exists()
    path = folder / (PICKLE if pickled else ARCHIVE)
    state = torch.load(path) if pickled else load_file(path)
    state |= {name: value(state[W1])}
    state = {k: v for k, v in state.items() if v is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        torch.save(state, path, **options) if pickled else save_file(state, path)


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
