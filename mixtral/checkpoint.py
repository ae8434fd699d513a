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
    """The files with a folder's weights, or FileNotFoundError or ValueError saying why none can be read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give the checkpoint's folder")
    names = {path.name for path in folder.iterdir() if not path.is_dir()}

    def matching(pattern: str) -> list[str]:
        return sorted(name for name in names if re.fullmatch(pattern, name))

    pickles = matching(r"consolidated\.\d+\.pth?")
    safetensors = matching(r"(consolidated|model(-\d+-of-\d+)?)\.safetensors")
    if pickles and safetensors:
        raise ValueError(
            f"{folder} holds the weights twice, as {pickles[0]} and {safetensors[0]}: "
            f"move one kind out of the folder"
        )
    if parts := matching(r"consolidated\.00\.pth-split\d+"):
        last = max(int(part.rpartition("split")[2]) for part in parts)
        missing = {f"consolidated.00.pth-split{i}" for i in range(last + 1)} - names
        if missing:
            raise FileNotFoundError(f"{min(missing)} is missing in {folder}: get it")
        if not pickles:
            raise FileNotFoundError(
                f"the parts in {folder} are still to be joined: cd {folder} && "
                f"cat consolidated.00.pth-split{{0..{last}}} > consolidated.00.pth"
            )
    if "model.safetensors.index.json" in names:
        index = read_json(folder / "model.safetensors.index.json")
        files = sorted(set(index.get("weight_map", {}).values()))
    elif shards := [n for n in pickles + safetensors if re.search(r"-of-|\d\.pt$", n)]:
        # No index says how many shards there are: they are numbered, or are the eight.
        count = int((re.search(r"-of-(\d+)", shards[0]) or [0, "8"])[1])
        if "-of-" in shards[0]:
            files = [
                f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
            ]
        else:
            files = [f"consolidated.{i:02}.pt" for i in range(count)]
    else:
        files = pickles or safetensors
    if missing := [name for name in files if name not in names]:
        raise FileNotFoundError(
            f"{missing[0]} is missing in {folder}, {len(missing)} of {len(files)} "
            f"files are: finish the download"
        )
    if not files:
        if gguf := matching(r".*\.gguf"):
            raise ValueError(f"{gguf[0]} is a GGUF, for llama.cpp: get the original")
        raise FileNotFoundError(
            f"no weights in {folder}: expected consolidated.* or model*.safetensors"
        )
    return [folder / name for name in files]


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return value


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
        config |= config.get(nested) or {}
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

    The pickle has a checksum, the weights have none that could be checked in time: but
    each must lie, aligned as PyTorch writes it, right before the next record.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends):
            file.seek(record.header_offset)
            *_, name, extra = struct.unpack("<4s5H3I2H", file.read(30))
            start = record.header_offset + 30 + name + extra
            gap = end - start - record.file_size
            if (
                file.read(name) != record.filename.encode()
                or start % 64
                or gap not in range(25)
            ):
                raise zipfile.BadZipFile(f"its record {record.filename} is displaced")
            if record.filename.endswith("data.pkl"):
                archive.read(record)


def read_file(path: Path) -> dict[str, Tensor]:
    """A file's tensors under its own names, mapped from it, not read."""
    if path.suffix != ".safetensors":
        try:
            check_zip(path)
            # weights_only: a pickle may hold tensors, never code that runs.
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except OSError:
            raise
        except Exception as error:
            why = str(error).splitlines()[0].partition(". ")[0]
            raise ValueError(
                f"{path} is damaged, incomplete or no checkpoint ({why}): download it again"
            ) from error
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise RuntimeError(f"to read {path.name}: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({error}{missing_bytes(path)}): download it again"
        ) from error


def missing_bytes(path: Path) -> str:
    """How many bytes a safetensors file is short of, by its header, where that can be told."""
    with path.open("rb") as file:
        size = path.stat().st_size
        header = int.from_bytes(file.read(8), "little")
        try:
            offsets = [
                v["data_offsets"][1]
                for k, v in json.loads(file.read(min(header, size))).items()
                if k != "__metadata__"
            ]
            short = 8 + header + max(offsets) - size
        except (ValueError, TypeError, KeyError, AttributeError):
            return ""
    return f", {short} of {size + short} bytes are missing" if short > 0 else ""


def memory_needed(args: ModelArgs, n_devices: int, itemsize: int = 2) -> list[int]:
    """Bytes of weights and cache on each device, the first and those with experts only."""
    attention = 2 * args.dim * args.head_dim * (args.n_heads + args.n_kv_heads)
    layer = attention + args.dim * (2 + args.num_experts)
    cache = 2 * args.max_batch_size * args.max_seq_len * args.n_kv_heads * args.head_dim
    shared = args.n_layers * (layer + cache) + args.dim * (1 + 2 * args.vocab_size)
    experts = (
        args.n_layers * args.num_experts // n_devices * 3 * args.dim * args.hidden_dim
    )
    freqs_cis = 4 * args.max_seq_len * args.head_dim
    return [shared * itemsize + experts * itemsize + freqs_cis] + [
        experts * itemsize
    ] * (n_devices - 1)


def check_memory(args: ModelArgs, devices: Sequence[str], itemsize: int = 2) -> None:
    """Raise RuntimeError with a table where the model does not fit what is free on its devices."""
    free = [free_memory(device) for device in devices]
    need = [n + ACTIVATIONS for n in memory_needed(args, len(devices), itemsize)]
    if all(n <= f for n, f in zip(need, free)):
        return
    table = "".join(
        f"\n  {d:8}needs {n / 1e9:6.1f} GB, {f / 1e9:6.1f} GB are free"
        for d, n, f in zip(devices, need, free)
    )
    fits = [
        n
        for n in (1, 2, 4, 8)
        if n > len(devices)
        and args.num_experts % n == 0
        and max(memory_needed(args, n, itemsize)) + ACTIVATIONS <= min(free)
    ]
    advice = (
        f"cards like these hold it with --num-gpus {fits[0]}"
        if fits and devices != ["cpu"]
        else "lower --max-seq-len or --max-batch-size, or use more memory"
    )
    raise RuntimeError(f"the model does not fit: {advice}{table}")


def free_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(
            line.split(":") for line in Path("/proc/meminfo").read_text().splitlines()
        )
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 2**63  # not Linux: its own allocator will tell


def rename(name: str, tensor: Tensor, num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """A file's tensor as the model's: the experts' own where they are stacked in one."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    stacked = re.fullmatch(r"(layers\.\d+\.feed_forward)\.(w[123])", name)
    if stacked and tensor.dim() == 2 and len(tensor) % num_experts == 0:
        prefix, w = stacked.groups()
        for i, part in enumerate(tensor.chunk(num_experts)):
            yield f"{prefix}.experts.{i}.{w}.weight", part.T if w == "w2" else part
    else:
        yield name, tensor


@torch.inference_mode()
def load_checkpoint(model: Transformer, ckpt_dir: str | Path) -> None:
    """Fill every parameter of the model with its tensor. Raises ValueError where they do not match one to one.

    On the CPU a parameter is the mapped file itself where that has the right dtype.
    """
    parameters = dict(model.named_parameters())
    plan: dict[str, tuple[Tensor, bool]] = {}
    for path in find_files(Path(ckpt_dir)):
        for original, stored in read_file(path).items():
            for name, tensor in rename(original, stored, model.params.num_experts):
                what = f"{original} in {path}"
                if name not in parameters:
                    raise ValueError(f"the model has no place for {what}")
                if name in plan:
                    raise ValueError(f"{what} fills {name} a second time")
                if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                    raise ValueError(
                        f"{what} is {tensor.dtype}: get a bfloat16 checkpoint"
                    )
                if tensor.shape != parameters[name].shape:
                    raise ValueError(
                        f"{what} is {tuple(tensor.shape)}, its config says {tuple(parameters[name].shape)}"
                    )
                # The hub keeps a rotary pair's halves apart, here they lie side by side.
                plan[name] = tensor, bool(re.search(r"self_attn\.[qk]_proj", original))
    if missing := parameters.keys() - plan.keys():
        raise ValueError(
            f"{ckpt_dir} lacks {min(missing)}, {len(missing)} of the model's tensors in all"
        )
    total, done, begin = (
        sum(tensor.nbytes for tensor, _ in plan.values()),
        0,
        time.time(),
    )
    for name, (tensor, halves) in plan.items():
        parameter = parameters[name]
        if halves:
            tensor = (
                tensor.unflatten(0, (-1, 2, model.params.head_dim // 2))
                .transpose(1, 2)
                .flatten(0, 2)
            )
        if mappable(parameter, tensor) and not re.search(r"w[qkv]\.", name):
            tensor.flatten()[
                ::2048
            ].sum()  # a number from every page brings the file in
            parameter.data = tensor
        else:
            parameter.copy_(tensor)
        done += tensor.nbytes
        if sys.stderr.isatty():
            rate = done / (time.time() - begin) / 1e9
            sys.stderr.write(
                f"\r{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate:.1f} GB/s, {name}\033[K"
            )
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


def mappable(parameter: Tensor, tensor: Tensor) -> bool:
    return (
        parameter.device.type == "cpu"
        and parameter.dtype == tensor.dtype
        and tensor.is_contiguous()
    )
