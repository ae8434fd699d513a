"""Turns a downloaded folder, in any of the published layouts, into parameters.

Files are memory-mapped. All headers are read, and every tensor is compared with the
model's parameters, before the first weight is read. Then each tensor goes straight to
its device. Two tables translate the layouts' names of sizes and of tensors.
"""

import contextlib
import io
import json
import os
import pickle
import re
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .model import Linear, ModelArgs, Transformer

# ModelArgs' field: its key in params.json and in the hub's config.json.
KEYS = {
    "dim": ("dim", "hidden_size"),
    "n_layers": ("n_layers", "num_hidden_layers"),
    "hidden_dim": ("hidden_dim", "intermediate_size"),
    "n_heads": ("n_heads", "num_attention_heads"),
    "n_kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "head_dim": ("head_dim", "head_dim"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "num_experts": ("num_experts", "num_local_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_tok"),
    "norm_eps": ("norm_eps", "rms_norm_eps"),
    "rope_theta": ("rope_theta", "rope_theta"),
}

# Keys (regular expressions) that change the result unless they have one of these values
# or an empty one. A list is judged by its elements.
HARMLESS = {
    "model_type": ["mixtral", "transformer"],
    "hidden_act": ["silu", "swish"],
    "rope_type": ["default"],
    "layer_types": ["full_attention"],
    "is_causal": [True],
    "_?sliding_window|attention_chunk_size|kv_sharing_modes|per_layer_config": [],
    "yarn|lora|llama_4_scaling|tie_word_embeddings|tied_embeddings": [],
    "quantization(_config)?|compression_config": [],
}

# Parts of other layouts' tensor names, and the model's own.
NAMES = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.layers.": "layers.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.q_proj.": ".attention.wq.",
    ".self_attn.k_proj.": ".attention.wk.",
    ".self_attn.v_proj.": ".attention.wv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".block_sparse_moe.": ".feed_forward.",
}

TORRENT = "consolidated.00.pth"
HEADER_LIMIT = 100 * 2**20  # bytes; the limit of safetensors itself
PAGE = 4096  # bytes
ACTIVATIONS = 2**30  # bytes a device needs beside weights and cache, generously


def report(text: str, end: str = "\n") -> None:
    """Write to stderr. If that is closed or broken, do nothing."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text + end)
        sys.stderr.flush()


def find_files(folder: Path) -> list[Path]:
    """The weights files of the layout that is complete in a folder."""
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", str(folder)):
        raise ValueError(f"rename the folder {str(folder)!a}: that is not UTF-8 text")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give the checkpoint's folder")
    regular = {path.name: path.is_file() for path in sorted(folder.iterdir())}
    names = {name for name in regular if regular[name]}
    layouts = [[TORRENT], [f"consolidated.{i:02}.pt" for i in range(8)]]
    layouts += [["consolidated.safetensors"], ["model.safetensors"]]
    shard, split = r"model-\d{5}-of-(\d{5})\.safetensors", TORRENT + r"-split(\d{1,2})"
    counts = {m[1] for name in names if (m := re.fullmatch(shard, name))}
    for n in sorted(counts - {"00000"}):
        numbers = range(1, int(n) + 1)
        layouts.append([f"model-{i:05}-of-{n}.safetensors" for i in numbers])
    complete = [files for files in layouts if names.issuperset(files)]
    if len({files[0].endswith("safetensors") for files in complete}) == 2:
        both = f"{complete[0][0]} and {complete[-1][0]}"
        raise ValueError(f"{folder} holds {both}: move one kind of weights elsewhere")
    if complete:
        return [folder / name for name in complete[0]]
    for name in (name for name in regular if name not in names):
        if re.fullmatch(r"(consolidated|model).*\.(pth?|safetensors)", name):
            raise ValueError(f"{name!r} in {folder} is not a regular file: replace it")
    parts = [int(m[1]) for name in names if (m := re.fullmatch(split, name))]
    last = max(parts, default=-1)
    layouts.append([f"{TORRENT}-split{i}" for i in range(last + 1)])
    files = max(layouts, key=lambda files: len(names.intersection(files)))
    missing = [name for name in files if name not in names]
    if not missing:
        join = f"cat {TORRENT}-split{{0..{last}}} > {TORRENT}"
        raise FileNotFoundError(
            f"{folder} holds parts to be joined: cd {folder} && {join}"
        )
    if len(missing) < len(files):
        count = f"{len(missing)} of {len(files)} files are"
        raise FileNotFoundError(f"{missing[0]} is missing in {folder}: {count}")
    if gguf := [name for name in regular if name.endswith(".gguf")]:
        raise ValueError(f"{gguf[0]!r} is a GGUF, for llama.cpp: get the original")
    wanted = "expected consolidated.* or model*.safetensors"
    raise FileNotFoundError(f"no weights in {folder}: {wanted}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise ValueError("too large")  # a file of weights
        return {**json.loads(path.read_bytes())}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object: download it again") from error


def read_config(path: Path) -> dict[str, Any]:
    """A config's keys, nested ones among them.

    Raises ValueError for keys with which transformers would compute something else.
    """
    config = read_json(path)
    if path.name == "config.json" and config.get("sliding_window") == 4096:
        report(f"{path}: sliding_window 4096 is ignored, since Mixtral has none")
        del config["sliding_window"]
    if isinstance(config.get("moe"), dict):
        config |= config["moe"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"type": rope}
    config["rope_type"] = rope.get("rope_type") or rope.get("type")
    if rope.get("rope_theta") is not None:
        config["rope_theta"] = rope["rope_theta"]
    for key, value in config.items():
        allowed = next((HARMLESS[k] for k in HARMLESS if re.fullmatch(k, key)), None)
        for each in value if isinstance(value, list) else [value]:
            empty = not each and (key != "is_causal" or each is None)
            if allowed is not None and not empty and each not in allowed:
                what = f"{path} has {key} {str(each)!r:.80}"
                raise ValueError(f"{what}: get the original bfloat16 Mixtral")
    return config


def read_params(
    ckpt_dir: str | Path, max_seq_len: int, max_batch_size: int
) -> ModelArgs:
    """The sizes that a checkpoint states, after a check that its files are complete."""
    room = ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    folder = Path(ckpt_dir)
    configs = ["params.json", "config.json"]
    if find_files(folder)[0].name.startswith("model"):
        configs.reverse()
    path = next((folder / c for c in configs if (folder / c).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {configs[0]} in {folder}: download it too")
    config = read_config(path)
    sizes: dict[str, Any] = {}
    for field, keys in KEYS.items():
        keys = keys if path.name == "params.json" else keys[::-1]
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if value is None and field == "num_experts":
            raise ValueError(f"{path} names no experts: a dense model, not a Mixtral")
        if value is None and field == "head_dim":
            value = sizes["dim"] // sizes["n_heads"]
        if value is None and field == "rope_theta":
            value = ModelArgs.rope_theta  # the torrent does not say
        kind = type(getattr(ModelArgs, field))
        if type(value) not in (int, kind) or not 0 < value < 2**40:
            raise ValueError(f"{path} gives no usable {' or '.join(sorted(set(keys)))}")
        sizes[field] = kind(value)
    if sizes["n_layers"] * sizes["num_experts"] > 2**11:  # too slow to build
        raise ValueError(f"{path} gives more layers and experts than any Mixtral has")
    try:
        return replace(room, **sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class BoundedFile(io.FileIO):
    """A file of which a damaged length cannot cause gigabytes to be read."""

    def read(self, size: int = -1) -> bytes:
        if size > HEADER_LIMIT:
            raise zipfile.BadZipFile("its directory is damaged")
        return super().read(size)


def check_zip(path: Path) -> None:
    """Raise if a pickle's archive is damaged in a way that could displace tensors.

    The pickle has a checksum. The weights' would take too long; but each must lie, at a
    multiple of 64 bytes as PyTorch writes it, between its own header and the next.
    """
    with BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends):
            if record.header_offset < 0:
                missing = f"{-record.header_offset} bytes are missing in the middle"
                raise zipfile.BadZipFile(missing)
            if record.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{record.filename} is compressed")
            file.seek(record.header_offset + 26)
            name, extra = struct.unpack("<2H", file.read(4))
            start = record.header_offset + 30 + name + extra
            named = file.read(name) == record.filename.encode()
            gap = end - start - record.file_size  # at most a data descriptor
            if not named or start % 64 or gap not in range(25):
                raise zipfile.BadZipFile(f"{record.filename} is displaced")
            if record.filename.endswith("data.pkl"):
                archive.read(record)


def read_file(path: Path) -> dict[str, Tensor]:
    """A file's tensors under its own names, mapped from it, not read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in [*file.keys()]}
        check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual tensors, refused later
            # weights_only: a pickle may hold tensors, never code that runs.
            return {**torch.load(path, "cpu", mmap=True, weights_only=True)}
    except ImportError as error:
        raise RuntimeError(f"to read {path.name}: pip install safetensors") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise explain_damage(path, error) from error


def explain_damage(path: Path, error: Exception) -> ValueError:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code and isinstance(error, pickle.UnpicklingError):
        what = f"{path} tries to run code, {code[1]!r:.80}"
        return ValueError(f"{what}: nothing was run, do not use it elsewhere either")
    why, advice = " ".join(str(error).partition(". ")[0].split()), "download it again"
    with path.open("rb") as file:
        size, start = path.stat().st_size, file.read(8)
        if start == b"version ":
            advice = "it is a Git LFS pointer, run git lfs pull"
        elif path.name == TORRENT:
            md5 = "1faa9bc9b20fcfe81fcd4eb7166a79e6"
            advice += f", or join it again; the md5 of 8x7B's is {md5}"
        elif path.suffix == ".safetensors":
            header = int.from_bytes(start, "little")
            with contextlib.suppress(Exception):  # if it is damaged itself
                tensors = json.loads(file.read(header if header < HEADER_LIMIT else 0))
                tensors.pop("__metadata__", None)
                ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
                if (whole := 8 + header + max(ends)) > size:
                    why += f", {whole - size} of {whole} bytes are missing"
    return ValueError(f"{path} is damaged ({why[:200]}): {advice}")


def memory_needed(
    args: ModelArgs,
    n_devices: int,
    dtype: torch.dtype = torch.bfloat16,
    cpu_layers: int = 0,
    int8: bool = False,
) -> list[int]:
    """Bytes on each device and, last, those of the experts that are in host memory."""
    try:
        with torch.device("meta"):
            one = Transformer(replace(args, n_layers=1), ["meta"], dtype, int8=int8)
    except (RuntimeError, TypeError) as error:  # more bytes than 64 bits count
        raise ValueError("no memory can hold this: lower max_seq_len") from error
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
    on_gpus, layers = devices[0] != "cpu", args.n_layers
    if type(cpu_layers) is not int or not 0 <= cpu_layers <= layers:
        raise ValueError(f"cpu_layers must be 0 to {layers}, not {cpu_layers!r}")
    if cpu_layers and not on_gpus:
        raise ValueError("cpu_layers needs GPUs: without, all is in host memory anyway")
    free, host = [free_memory(device) for device in devices], free_memory("cpu")

    def lacks(n: int = len(devices), n_host: int = cpu_layers, int8: bool = int8):
        *needs, on_host = memory_needed(args, n, dtype, n_host, int8)
        has = free if n == len(devices) else [min(free)] * n
        needs = [*(need + ACTIVATIONS for need in needs), on_host]
        return [
            f"{place} needs {need / 1e9:.1f} GB, {there / 1e9:.1f} GB are free"
            for place, need, there in zip([*devices, "host"], needs, [*has, host])
            if need > there
        ]

    if not (missing := lacks()):
        return
    ways = ["int8"] if not int8 and not lacks(int8=True) else []
    if on_gpus:
        more = [n for n in (2, 4, 8) if n > len(devices) and args.num_experts % n == 0]
        ways += [f"num_gpus {n} of such cards" for n in more if not lacks(n)][:1]
        n_host = range(cpu_layers + 1, layers + 1)
        ways += [f"cpu_layers {n}" for n in n_host if not lacks(n_host=n)][:1]
        both = [n for n in n_host if not lacks(n_host=n, int8=True)][:1]
        ways += [f"int8 and cpu_layers {n}" for n in both if not ways]
    advice = "lower max_seq_len and max_batch_size, or use more memory"
    if ways:
        advice = f"it fits with {', or with '.join(ways)}"
    raise RuntimeError(f"the model does not fit: {advice} ({'; '.join(missing)})")


def free_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        return 2**63
    return int(re.search(r"MemAvailable: +(\d+)", meminfo)[1]) * 1024


def rename(name: str, tensor: Tensor, num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """A file's tensor as the model's: each expert's own if they are stacked in one."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    stacked = re.fullmatch(r"(layers\.\d+\.feed_forward)\.(w[123])", name)
    if not stacked or tensor.dim() != 2 or len(tensor) % num_experts:
        return iter([(name, tensor)])
    prefix, w = stacked.groups()
    parts = (t.T if w == "w2" else t for t in tensor.chunk(num_experts))
    return ((f"{prefix}.experts.{i}.{w}.weight", t) for i, t in enumerate(parts))


def match(model: Transformer, folder: Path) -> dict[str, tuple[Tensor, Path]]:
    """Each parameter's tensor, perhaps as a permuted view, and the file it is in.

    Raises ValueError if tensors and parameters are not one to one.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    found: dict[str, tuple[Tensor, Path]] = {}
    for path in find_files(folder):
        for original, stored in read_file(path).items():
            what = f"{str(original)!r:.100} in {path}"
            plain = type(stored) in (Tensor, nn.Parameter) and not stored.is_nested
            if not plain or stored.layout != torch.strided or stored.is_meta:
                raise ValueError(f"{what} is no plain tensor: get the original weights")
            if stored.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise ValueError(f"{what} is {stored.dtype}: get the bfloat16 original")
            for name, tensor in rename(str(original), stored, model.params.num_experts):
                if name not in shapes:
                    raise ValueError(f"the model has no place for {what}")
                if name in found:
                    raise ValueError(f"{what} is there a second time")
                if tensor.shape != shapes[name]:
                    is_, wanted = tuple(tensor.shape), tuple(shapes[name])
                    raise ValueError(f"{what} is {is_}, its config says {wanted}")
                if re.search(r"self_attn\.[qk]_proj", str(original)):
                    # The hub keeps rotary pairs as halves of a head, not side by side.
                    pairs = tensor.unflatten(0, (-1, 2, model.params.head_dim // 2))
                    tensor = pairs.transpose(1, 2)
                found[name] = tensor, path
    if missing := shapes.keys() - found.keys():
        count = f"{len(missing)} of {len(shapes)} tensors"
        raise ValueError(f"{folder} lacks {min(missing)}, in all {count}")
    return found


def has_zero_page(tensor: Tensor) -> bool:
    """Whether a whole page of a tensor, or all of it if it is smaller, is zero bytes.

    A number of every page is read, which loads a mapped tensor from the disk.
    """
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    integers = torch.int32 if tensor.itemsize == 4 else torch.int16  # -0.0 is not zero
    flat = tensor.permute(order).reshape(-1).view(integers)  # as it lies in the file
    size, start = PAGE // tensor.itemsize, -tensor.data_ptr() % PAGE // tensor.itemsize
    n = max(0, len(flat) - start) // size
    pages = flat[start : start + n * size].view(n, size) if n else flat[None]
    if pages[:, 0].all():
        return False
    suspects = pages[pages[:, 0] == 0]
    return bool((suspects == 0).all(dim=1).any())


def quantize(layer: Linear, tensor: Tensor) -> None:
    """Round rows to 8 bits: the scale is a row's largest magnitude divided by 127."""
    for i in range(0, len(tensor), 256):  # rows, to need little memory at a time
        rows = tensor[i : i + 256].to(layer.weight.device, torch.float32)
        largest = rows.abs().amax(dim=1)
        if not largest.isfinite().all():
            raise ValueError("holds values that are not finite: download it again")
        scale = (largest / 127).to(layer.scale.dtype)
        layer.scale[i : i + 256] = scale
        rows /= scale.float().clamp_min(1e-30)[:, None]
        layer.weight[i : i + 256] = rows.round_().clamp_(-127, 127)


@torch.inference_mode()
def fill(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Copy a tensor to the layer's weight, or let the mapped file itself be the weight.

    Raises ValueError, to be read after the tensor's name, if the tensor is damaged.
    """
    weight = layer.weight
    # Rows of unused tokens may be zero.
    if has_zero_page(tensor) and name not in ("tok_embeddings.weight", "output.weight"):
        raise ValueError("holds a run of zero bytes: the download is incomplete")
    same = tensor.dtype == weight.dtype and tensor.is_contiguous()
    if same and weight.device.type == "cpu" and not re.search(r"w[qkv]\.", name):
        weight.data = tensor
        return
    if not tensor.is_contiguous() and weight.device.type != "cpu":
        tensor = tensor.to(weight.device)  # as it is: the device is faster at permuting
    if weight.dtype == torch.int8:
        quantize(layer, tensor)
    else:
        weight.view(tensor.shape).copy_(tensor)


def load_checkpoint(model: Transformer, ckpt_dir: str | Path) -> None:
    """Fill every parameter of the model, in the files' order, four at a time."""
    found = match(model, Path(ckpt_dir))
    total = sum(tensor.nbytes for tensor, _ in found.values()) / 1e9
    done, begin, terminal = 0.0, time.time(), os.isatty(2)

    def load(name: str) -> float:
        tensor, path = found[name]
        try:
            fill(model.get_submodule(name.removesuffix(".weight")), name, tensor)
        except ValueError as error:
            raise ValueError(f"{name} in {path} {error}") from error
        return tensor.nbytes / 1e9

    with ThreadPoolExecutor(4) as pool:
        for name, size in zip(found, pool.map(load, found)):
            done += size
            if terminal:
                rate = f"{done / (time.time() - begin):.1f} GB/s, {name}"
                report(f"\r{done:.1f} of {total:.1f} GB, {rate}\033[K", end="")
    if terminal:
        report("\r\033[K", end="")
