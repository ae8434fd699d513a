"""Turns a downloaded folder, in any of the published layouts, into parameters.

Files are memory-mapped. All headers are read, and every tensor is compared with the
model's parameters, before the first weight is read and sent to its device.
"""

import contextlib
import json
import os
import re
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .model import Linear, ModelArgs, Transformer

# The hub's keys in config.json, and ModelArgs' fields, which params.json has as keys.
KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_local_experts": "num_experts",
    "rms_norm_eps": "norm_eps",
}

# Keys (regular expressions) that change the result unless they have one of these values
# or an empty one. A list is judged by its elements.
HARMLESS = {
    "model_type": ["mixtral", "transformer"],
    "hidden_act": ["silu", "swish"],
    "rope_type": ["default"],
    "layer_types": ["full_attention"],
    "_?sliding_window|attention_chunk_size|kv_sharing_modes|per_layer_config": [],
    "yarn|lora|llama_4_scaling|tie_word_embeddings|tied_embeddings": [],
    "quantization(_config)?|compression_config": [],
}

# Parts of other layouts' tensor names (regular expressions), and the model's own.
NAMES = {
    r"^model\.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    r"self_attn\.(.)_proj": r"attention.w\1",
    "block_sparse_moe": "feed_forward",
}

TORRENT = "consolidated.00.pth"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAX_JSON = 2**23  # bytes of a config or a header; the published have less than 2**20
ACTIVATIONS = 2**30  # bytes a device needs beside weights and cache, generously


def report(text: str, end: str = "\n") -> None:
    """Write to stderr. If that is closed or broken, do nothing."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text + end)
        sys.stderr.flush()


def find_files(folder: Path) -> list[Path]:
    """The weights files of the layout that is complete in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give the checkpoint's folder")
    names = {path.name for path in folder.iterdir()}
    text = " ".join(names)
    last = max(map(int, re.findall(rf"{TORRENT}-split(\d\d?)\b", text)), default=0)
    layouts = [[TORRENT], [f"consolidated.{i:02}.pt" for i in range(8)]]
    layouts += [["consolidated.safetensors"], ["model.safetensors"]]
    for n in set(re.findall(r"\bmodel-\d{5}-of-(\d{5})\b", text)) - {"00000"}:
        numbers = range(1, int(n) + 1)
        layouts.append([f"model-{i:05}-of-{n}.safetensors" for i in numbers])
    kinds = {f[0].endswith(".safetensors") for f in layouts if names.issuperset(f)}
    layouts.append([f"{TORRENT}-split{i}" for i in range(last + 1)])
    files = max(layouts, key=lambda files: len(names.intersection(files)) / len(files))
    there = [name for name in files if name in names]
    lost = "".join([name for name in files if name not in names][:1])
    odd = "".join([name for name in there if not (folder / name).is_file()][:1])
    parts = "split" in files[0]
    problems = {
        "pickles and safetensors: move one kind of weights elsewhere": len(kinds) > 1,
        "no weights, but .gguf for llama.cpp": not there and ".gguf" in text,
        "no weights: expected consolidated.* or model*.safetensors": not there,
        f"{lost} is missing: {len(there)} of {len(files)} files are there": lost,
        f"{odd} is not a regular file: replace it": odd,
        f"parts to join: cat {TORRENT}-split{{0..{last}}} > {TORRENT}": parts,
    }
    for problem, applies in problems.items():
        if applies:
            raise FileNotFoundError(f"in {folder}: {problem}")
    return [folder / name for name in files]


def read_params(ckpt_dir: str | Path, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """The sizes that a checkpoint states, after a check that its files are complete."""
    room = ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    folder = Path(ckpt_dir)
    hub = find_files(folder)[0].name.startswith("model")
    configs = ["config.json", "params.json"][:: 1 if hub else -1]
    path = next((folder / c for c in configs if (folder / c).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {configs[0]} in {folder}: download it too")
    config = read_config(path)
    sizes = {f.name: config.get(f.name) for f in fields(room) if "max_" not in f.name}
    if sizes["num_experts"] is None:
        raise ValueError(f"{path} names no experts: a dense model, not a Mixtral")
    try:
        sizes["head_dim"] = sizes["head_dim"] or sizes["dim"] // sizes["n_heads"]
        params = replace(room, **sizes)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if params.n_layers * params.num_experts > 2**11:  # too slow to build
        raise ValueError(f"{path} gives more layers and experts than any Mixtral has")
    return params


def read_config(path: Path) -> dict:
    """A config's values under the names of ModelArgs' fields, and its other keys."""
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_JSON))
        config = {"rope_theta": ModelArgs.rope_theta, **config}  # the torrent has none
        config |= config.get("moe") or {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object: download it again") from error
    if path.name == "config.json" and config.get("sliding_window") == 4096:
        report(f"{path}: sliding_window 4096 is ignored, since Mixtral has none")
        del config["sliding_window"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"type": rope}
    config |= rope | {"rope_type": rope.get("rope_type") or rope.get("type")}
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        for pattern, allowed in HARMLESS.items():
            wrong = [each for each in values if each and each not in allowed]
            if wrong and re.fullmatch(pattern, key):
                what = f"{path} has {key} {str(wrong[0])!r:.80}"
                raise ValueError(f"{what}: get the original bfloat16 Mixtral")
    return config | {KEYS[key]: config[key] for key in KEYS if key in config}


def check_zip(path: Path) -> None:
    """Raise if damage to a pickle's archive could displace tensors."""
    # The pickle has a checksum. The weights' would take too long; but each must lie, at
    # a multiple of 64 bytes as PyTorch writes it, between its own header and the next.
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends):
            file.seek(max(0, record.header_offset) + 26)
            name, extra = struct.unpack("<2H", file.read(4))
            start = record.header_offset + 30 + name + extra
            named = file.read(name) == record.filename.encode()
            aligned = start > 0 and start % 64 == 0
            gap = end - start - record.file_size  # at most a data descriptor
            if not (named and aligned and 0 <= gap < 25) or record.compress_type:
                raise ValueError(f"{record.filename} is displaced or compressed")
            if record.filename.endswith("data.pkl"):
                archive.read(record)


def read_file(path: Path) -> dict[str, Tensor]:
    """A file's tensors under its own names, mapped from it, not read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, MAX_JSON)))
            header.pop("__metadata__", None)
            size += 8 + max(tensor["data_offsets"][1] for tensor in header.values())
            if (missing := size - path.stat().st_size) > 0:
                raise ValueError(f"{missing} of {size} bytes are missing")
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in header}
        check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual tensors, refused later
            # weights_only: a pickle may hold tensors, never code that runs.
            state = torch.load(path, "cpu", mmap=True, weights_only=True)
        return {str(name): tensor for name, tensor in state.items()}
    except Exception as error:  # whatever a damaged file makes its reader raise
        code = re.search(r"GLOBAL \S+", str(error))
        why = code[0] if code else " ".join(str(error).partition(". ")[0].split())
        joined = path.name == TORRENT
        pointer = path.stat().st_size < 999 and b"git-lfs" in path.read_bytes()
        advice = {
            "pip install safetensors": isinstance(error, ImportError),
            "check the disk and its permissions": isinstance(error, OSError),
            "it would run code, do not use it elsewhere either": code,
            "it is a Git LFS pointer, run git lfs pull": pointer,
            "join or download it again; 8x7B's md5 is 1faa9bc9b20fcfe81fcd4eb7166a79e6": joined,
            "download it again": True,
        }
        what = next(text for text, applies in advice.items() if applies)
        raise ValueError(f"cannot read {path} ({why[:200]}): {what}") from error


def memory_needed(
    args: ModelArgs,
    n_devices: int,
    dtype: torch.dtype = torch.bfloat16,
    cpu_layers: int = 0,
    int8: bool = False,
) -> list[int]:
    """Bytes on each device and, last, those of the experts that are in host memory."""
    with torch.device("meta"):
        one = Transformer(replace(args, n_layers=1), ["meta"], dtype, int8=int8)
    shared, experts = 0, 0
    for name, tensor in [*one.named_parameters(), *one.named_buffers()]:
        if ".experts." in name:
            experts += tensor.nbytes
        else:
            shared += tensor.nbytes * (args.n_layers if "layers." in name else 1)
    share = experts * (args.n_layers - cpu_layers) // n_devices
    return [shared + share] + [share] * (n_devices - 1) + [experts * cpu_layers]


def check_memory(
    args: ModelArgs,
    devices: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    cpu_layers: int = 0,
    int8: bool = False,
) -> None:
    """Raise RuntimeError, with what would help, if some memory is too small."""
    n, most = len(devices), 0 if devices[0] == "cpu" else args.n_layers
    if type(cpu_layers) is not int or not 0 <= cpu_layers <= most:
        limit = f"0 to {args.n_layers}, or 0 without GPUs"
        raise ValueError(f"cpu_layers must be {limit}, not {cpu_layers!r}")
    free, ram = [free_memory(device) for device in devices], free_memory("cpu")

    def lacks(num_gpus: int = n, cpu_layers: int = cpu_layers, int8: bool = int8):
        *needs, on_host = memory_needed(args, num_gpus, dtype, cpu_layers, int8)
        needs = [need + ACTIVATIONS for need in needs]
        # Only the devices that there are: more of them would be alike.
        return [
            f"{place} needs {need / 1e9:.1f} GB, {has / 1e9:.1f} GB are free"
            for place, need, has in [*zip(devices, needs, free), ("host", on_host, ram)]
            if need > has
        ]

    def first(ways: list[dict[str, int]]) -> list[dict[str, int]]:
        return [way for way in ways if not lacks(**way)][:1]

    if not (missing := lacks()):
        return
    layers = [{"cpu_layers": k} for k in range(cpu_layers + 1, most + 1)]
    more = [{"num_gpus": k} for k in (2, 4, 8) if most and k > n]
    ways = first([{"int8": True}]) + first(more) + first(layers)
    ways = ways or first([{"int8": True} | way for way in layers])
    fits = [
        "it fits with " + " and ".join(k if v is True else f"{k} {v}" for k, v in items)
        for items in map(dict.items, ways)
    ]
    advice = ", ".join(fits) or "lower max_seq_len and max_batch_size"
    raise RuntimeError(f"the model does not fit: {advice} ({'; '.join(missing)})")


def free_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux
        return 2**63
    return int(re.search(r"MemAvailable: +(\d+)", meminfo.read_text())[1]) * 1024


def rename(name: str, tensor: Tensor, num_experts: int) -> dict[str, Tensor]:
    """A file's tensor as the model's: each expert's own if they are stacked in one."""
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    stacked = re.fullmatch(r"(layers\.\d+\.feed_forward\.)(w[123])", name)
    if not stacked:
        return {name: tensor}
    prefix, w = stacked.groups()
    parts = (t.T if w == "w2" else t for t in tensor.chunk(num_experts))
    return {f"{prefix}experts.{i}.{w}.weight": part for i, part in enumerate(parts)}


def match(model: Transformer, folder: Path) -> dict[str, tuple[Tensor, Path]]:
    """Each parameter's tensor, perhaps as a permuted view, and the file it is in."""
    args, found = model.params, {}
    missing = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for path in find_files(folder):
        for original, stored in read_file(path).items():
            what = f"{original!r:.100} in {path} is"
            kind = getattr(stored, "dtype", type(stored))
            odd = kind not in FLOATS or stored.layout != torch.strided
            if (
                odd
                or stored.is_nested
                or stored.is_meta
                or not stored.is_contiguous()
                or stored.is_neg()
            ):
                what += f" no plain tensor of floats ({kind})"
                raise ValueError(f"{what}: get the original bfloat16 weights")
            for name, tensor in rename(original, stored, args.num_experts).items():
                shape, wanted = tuple(tensor.shape), missing.pop(name, "no place")
                if shape != wanted:
                    raise ValueError(f"{what} {shape}, the model has {wanted} for it")
                if re.search(r"self_attn\.[qk]_proj", original):
                    # The hub keeps rotary pairs as halves of a head, not side by side.
                    pairs = tensor.unflatten(0, (-1, 2, args.head_dim // 2))
                    tensor = pairs.transpose(1, 2)
                found[name] = tensor, path
    if missing:
        lacks = f"{min(missing)}, in all {len(missing)} tensors"
        raise ValueError(f"{folder} lacks {lacks}: download it again")
    return found


def has_zero_run(tensor: Tensor) -> bool:
    """Whether 4 KiB of a tensor, or all of a smaller one, are zero in its file."""
    flat = tensor.as_strided([tensor.numel()], [1])  # as it lies in the file
    n = min(4096 // tensor.itemsize, len(flat))
    runs = flat[: len(flat) // n * n].view(-1, n)
    suspects = runs[runs[:, 0] == 0]  # reads a number of every page from the disk
    return bool((suspects == 0).all(dim=1).any())


def quantize(layer: Linear, tensor: Tensor) -> None:
    """Round rows to 8 bits: the scale is a row's largest magnitude divided by 127."""
    for i in range(0, len(tensor), 256):  # rows, to need little memory at a time
        rows = tensor[i : i + 256].to(layer.weight.device, torch.float32)
        scale = (rows.abs().amax(dim=1) / 127).to(layer.scale.dtype)
        layer.scale[i : i + 256] = scale
        rows /= scale.float().clamp_min(1e-30)[:, None]
        layer.weight[i : i + 256] = rows.round_().clamp_(-127, 127)
    if not layer.scale.isfinite().all():
        raise ValueError("holds values that are not finite: download it again")


@torch.inference_mode()
def fill(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Copy a tensor to the layer's weight, or let the mapped file be the weight."""
    weight, dense, on_cpu = layer.weight, tensor.is_contiguous(), layer.weight.is_cpu
    fused = re.search(r"w[qkv]\.", name)  # a slice of wqkv
    # Rows of unused tokens may be zero.
    if has_zero_run(tensor) and name not in ("tok_embeddings.weight", "output.weight"):
        raise ValueError("holds a run of zero bytes: the download is incomplete")
    if fused and not tensor.isfinite().all():  # attention may hide them
        raise ValueError("holds values that are not finite: download it again")
    if not dense and not on_cpu:
        tensor = tensor.to(weight.device)  # where permuting is faster
    if weight.dtype == torch.int8:
        quantize(layer, tensor)
    elif dense and on_cpu and tensor.dtype == weight.dtype and not fused:
        weight.data = tensor
    else:
        weight.view(tensor.shape).copy_(tensor)


def load_checkpoint(model: Transformer, ckpt_dir: str | Path) -> None:
    """Fill every parameter of the model, in the files' order, four at a time."""
    found = match(model, Path(ckpt_dir))
    total = sum(tensor.nbytes for tensor, _ in found.values())
    done, begin, terminal = 0, time.time(), os.isatty(2)

    def load(name: str) -> int:
        tensor, path = found[name]
        try:
            fill(model.get_submodule(name.removesuffix(".weight")), name, tensor)
        except ValueError as error:
            raise ValueError(f"{name} in {path} {error}") from error
        return tensor.nbytes

    with ThreadPoolExecutor(4) as pool:
        for name, size in zip(found, pool.map(load, found)):
            done += size
            rate = f"{done / (time.time() - begin) / 1e9:.1f} GB/s, {name}"
            text = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate}"
            report(f"\r{text if done < total else ''}\033[K" * terminal, end="")
