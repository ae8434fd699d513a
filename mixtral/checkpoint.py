"""From a downloaded folder to parameters, whichever of the published layouts it has.

The files are memory-mapped. Every header is read and every tensor held against the
model's parameters before the first byte of weights moves; then tensor by tensor they go
straight to their device. What a layout calls its tensors and sizes is in two tables.
"""

import json
import re
import struct
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import ModelArgs, Transformer

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

ACTIVATIONS = 2**30  # bytes a device needs beside weights and cache, generously


def find_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, all of them there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give the checkpoint's folder")
    names = {path.name for path in folder.iterdir() if not path.is_dir()}

    def matching(pattern: str) -> list[str]:
        return sorted(name for name in names if re.fullmatch(pattern, name))

    pickles = matching(r"consolidated\.\d+\.pth?")
    safetensors = matching(r"(consolidated|model(-\d+-of-\d+)?)\.safetensors")
    parts = matching(r"consolidated\.00\.pth-split\d+")
    files = pickles or safetensors
    if pickles and safetensors:
        both = f"{pickles[0]} and {safetensors[0]}"
        raise ValueError(f"{folder} holds {both}: move one kind of weights elsewhere")
    if parts and not files:
        last = max(int(part.rpartition("split")[2]) for part in parts)
        files = [f"consolidated.00.pth-split{i}" for i in range(last + 1)]
    elif "model.safetensors.index.json" in names:
        index = read_json(folder / "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{folder}'s index has no weight_map: download it again")
        files = sorted(set(map(str, index.values())))
    elif files and (match := re.search(r"-of-(\d+)", files[0])):
        count = int(match[1])
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    elif files and files[0].endswith(".pt"):
        files = [f"consolidated.{i:02}.pt" for i in range(8)]
    if missing := [name for name in files if name not in names]:
        part = f"{len(missing)} of {len(files)} files"
        raise FileNotFoundError(f"{missing[0]} is missing in {folder}, {part} are")
    if set(parts) & set(files):
        raise FileNotFoundError(
            f"{folder} holds parts to be joined: cd {folder} && cat consolidated.00.pth"
            f"-split{{0..{last}}} > consolidated.00.pth"
        )
    if not files and (gguf := matching(r".*\.gguf")):
        raise ValueError(
            f"{gguf[0]} is a GGUF, for llama.cpp: get the original weights"
        )
    if not files:
        wanted = "consolidated.* or model*.safetensors"
        raise FileNotFoundError(f"no weights in {folder}: expected {wanted}")
    return [folder / name for name in files]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_bytes())}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object: download it again") from error


def read_params(
    ckpt_dir: str | Path, max_seq_len: int, max_batch_size: int
) -> ModelArgs:
    """The sizes a checkpoint states, once its files are found to be complete."""
    folder = Path(ckpt_dir)
    files = find_files(folder)
    configs = ["params.json", "config.json"]
    if files[0].name.startswith("model"):
        configs.reverse()
    path = next((folder / c for c in configs if (folder / c).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {configs[0]} in {folder}: download it too")
    config = read_json(path)
    if quantization := config.get("quantization_config"):
        method = isinstance(quantization, dict) and quantization.get("quant_method")
        raise ValueError(f"{folder} is quantised ({method}): get the bfloat16 original")
    for nested in ("moe", "rope_parameters"):
        if isinstance(config.get(nested), dict):
            config |= config[nested]
    sizes: dict[str, Any] = {}
    for field, keys in KEYS.items():
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if value is None and field == "num_experts":
            raise ValueError(f"{path} names no experts: a dense model, not a Mixtral")
        if value is None and field == "head_dim":
            value = sizes["dim"] // sizes["n_heads"]
        if value is None and field == "rope_theta":
            value = ModelArgs.rope_theta  # the torrent does not say
        if type(value) not in (int, type(getattr(ModelArgs, field))) or value <= 0:
            raise ValueError(f"{path} gives no usable {' or '.join(sorted(set(keys)))}")
        sizes[field] = value
    args = ModelArgs(**sizes, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    if args.n_heads % args.n_kv_heads or args.num_experts_per_tok > args.num_experts:
        raise ValueError(f"{path} gives sizes that no Mixtral can have")
    return args


def check_zip(path: Path) -> None:
    """Raise where a pickle's archive is damaged in a way that could displace tensors.

    The pickle has a checksum. The weights' would take too long; but each must lie, at a
    multiple of 64 bytes as PyTorch writes it, between its own header and the next.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends):
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
        if path.suffix != ".safetensors":
            check_zip(path)
            # weights_only: a pickle may hold tensors, never code that runs.
            tensors = torch.load(path, "cpu", mmap=True, weights_only=True)
            return {**tensors}
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ImportError as error:
        raise RuntimeError(f"to read {path.name}: pip install safetensors") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        # Whatever a damaged file makes its reader raise.
        why = str(error).partition("\n")[0].partition(". ")[0] + missing_bytes(path)
        raise ValueError(f"{path} is damaged ({why}): download it again") from error


def missing_bytes(path: Path) -> str:
    """How much of a safetensors file is missing, where its header tells."""
    with path.open("rb") as file:
        size, header = path.stat().st_size, int.from_bytes(file.read(8), "little")
        try:
            tensors = json.loads(file.read(min(header, size)))
            tensors.pop("__metadata__", None)
            whole = 8 + header + max(t["data_offsets"][1] for t in tensors.values())
        except (ValueError, TypeError, KeyError, AttributeError):
            return ""
    return f", {whole - size} of {whole} bytes are missing" if whole > size else ""


def memory_needed(args: ModelArgs, n_devices: int, itemsize: int = 2) -> list[int]:
    """Bytes of weights and cache on each device."""
    attention = 2 * args.dim * args.head_dim * (args.n_heads + args.n_kv_heads)
    layer = attention + args.dim * (2 + args.num_experts)
    cache = 2 * args.max_batch_size * args.max_seq_len * args.n_kv_heads * args.head_dim
    shared = args.n_layers * (layer + cache) + args.dim * (1 + 2 * args.vocab_size)
    experts = args.n_layers * args.num_experts * 3 * args.dim * args.hidden_dim
    need = [experts // n_devices * itemsize] * n_devices
    need[0] += shared * itemsize + 4 * args.max_seq_len * args.head_dim  # freqs_cis
    return need


def check_memory(args: ModelArgs, devices: Sequence[str], itemsize: int = 2) -> None:
    """Raise RuntimeError, with a table, where a device has too little free memory."""

    def needed(n: int) -> list[int]:
        return [bytes + ACTIVATIONS for bytes in memory_needed(args, n, itemsize)]

    free = [free_memory(device) for device in devices]
    table = list(zip(devices, needed(len(devices)), free))
    if all(need <= has for _, need, has in table):
        return
    more = [n for n in (2, 4, 8) if n > len(devices) and args.num_experts % n == 0]
    fits = [n for n in more if max(needed(n)) <= min(free) and devices[0] != "cpu"]
    advice = "lower --max-seq-len and --max-batch-size, or use more memory"
    if fits:
        advice = f"it fits on cards like these with --num-gpus {fits[0]}"
    lines = (
        f"\n  {device:7} needs {need / 1e9:6.1f} GB, {has / 1e9:6.1f} GB are free"
        for device, need, has in table
    )
    raise RuntimeError(f"the model does not fit: {advice}{''.join(lines)}")


def free_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux: nothing asks
        return 2**63
    return int(re.search(r"MemAvailable: +(\d+)", meminfo)[1]) * 1024


def rename(name: str, tensor: Tensor, num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """A file's tensor as the model's: an expert's own where they are stacked in one."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    stacked = re.fullmatch(r"(layers\.\d+\.feed_forward)\.(w[123])", name)
    if not stacked or tensor.dim() != 2 or len(tensor) % num_experts:
        return iter([(name, tensor)])
    prefix, w = stacked.groups()
    parts = (t.T if w == "w2" else t for t in tensor.chunk(num_experts))
    return ((f"{prefix}.experts.{i}.{w}.weight", t) for i, t in enumerate(parts))


def match(model: Transformer, folder: Path) -> dict[str, tuple[Tensor, bool]]:
    """Each parameter's tensor, and whether it keeps rotary pairs as halves, the hub's
    way. Raises ValueError where tensors and parameters are not one to one."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    found: dict[str, tuple[Tensor, bool]] = {}
    for path in find_files(folder):
        for original, stored in read_file(path).items():
            what = f"{original} in {path}"
            kind = getattr(stored, "dtype", type(stored))
            if kind not in (torch.bfloat16, torch.float16, torch.float32):
                raise ValueError(f"{what} is {kind}: get the bfloat16 original")
            halves = re.search(r"self_attn\.[qk]_proj", original) is not None
            for name, tensor in rename(original, stored, model.params.num_experts):
                if name not in shapes:
                    raise ValueError(f"the model has no place for {what}")
                if name in found:
                    raise ValueError(f"{what} is there a second time")
                if tensor.shape != shapes[name]:
                    is_, wanted = tuple(tensor.shape), tuple(shapes[name])
                    raise ValueError(f"{what} is {is_}, its config says {wanted}")
                found[name] = tensor, halves
    if missing := shapes.keys() - found.keys():
        count = f"{len(missing)} of {len(shapes)} tensors"
        raise ValueError(f"{folder} lacks {min(missing)}, in all {count}")
    return found


def load_checkpoint(model: Transformer, ckpt_dir: str | Path) -> None:
    """Fill every parameter of the model with its tensor, some at the same time.

    On the CPU the mapped file itself becomes the parameter, where the dtype is right.
    """
    found = match(model, Path(ckpt_dir))
    parameters = dict(model.named_parameters())

    @torch.inference_mode()
    def fill(name: str) -> float:
        (tensor, halves), parameter = found[name], parameters[name]
        if halves:
            pairs = tensor.unflatten(0, (-1, 2, model.params.head_dim // 2))
            tensor = pairs.transpose(1, 2).flatten(0, 2)
        same = tensor.dtype == parameter.dtype and tensor.is_contiguous()
        if same and parameter.device.type == "cpu" and not re.search(r"w[qkv]\.", name):
            tensor.view(-1)[::2048].sum()  # of every page a number: it is read now
            parameter.data = tensor
        else:
            # What is to be transposed crosses as it lies and is turned on its device.
            moved = tensor if tensor.is_contiguous() else tensor.to(parameter.device)
            parameter.copy_(moved)
        return tensor.nbytes / 1e9

    total = sum(tensor.nbytes for tensor, _ in found.values()) / 1e9
    done, begin = 0.0, time.time()
    with ThreadPoolExecutor(4) as pool:
        for name, size in zip(found, pool.map(fill, found)):  # in the files' order
            done += size
            if sys.stderr.isatty():
                rate = f"{done / (time.time() - begin):.1f} GB/s, {name}"
                line = f"\r{done:.1f} of {total:.1f} GB, {rate}\033[K"
                print(line, end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(end="\r\033[K", file=sys.stderr)
