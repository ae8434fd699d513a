"""Turns a downloaded folder, in any of the published layouts, into parameters.

Files are memory-mapped. All headers are read, and every tensor is compared with the model's
parameters, before the first weight is read and sent to its device.
"""

import contextlib
import json
import logging
import re
import struct
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .model import Linear, ModelArgs, Transformer

logger = logging.getLogger(__name__)

# The file of the torrent, and the checksum that it has for 8x7B.
TORRENT = "consolidated.00.pth"
TORRENT_MD5 = "1faa9bc9b20fcfe81fcd4eb7166a79e6"

# The endings of the names of index files, and the index that transformers reads.
SAFETENSORS_INDEX = ".safetensors.index.json"
PICKLES_INDEX = ".bin.index.json"
HUB_INDEX = "model.safetensors.index.json"


def read_params(ckpt_dir: str | Path, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """The model's sizes from the checkpoint's config, and the cache's as given.

    Raises FileNotFoundError if files are missing, and ValueError if the config is not that of a
    published Mixtral or if two complete sets of weights are equal in rank.
    """
    cache_sizes = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    args = ModelArgs(**cache_sizes)  # refuses impossible cache sizes before the folder is read
    folder = Path(ckpt_dir)
    found = find_files(folder)
    first = found.paths[0].name
    if found.unread:
        others = " and ".join(found.unread)
        logger.info("%s: weights are read from %s, not from %s", folder, first, others)
    if found.missing is not None:
        logger.warning(
            "%s: weights are read from %s, since %s is missing", folder, first, found.missing
        )
    path = find_config(folder, first)
    config = read_config(path)
    sizes: dict[str, Any] = {
        f.name: config.get(f.name) for f in fields(args) if f.name not in cache_sizes
    }
    if sizes["num_experts"] is None:
        raise ValueError(f"{path} names no experts: a dense model, not a Mixtral")
    try:
        if sizes["head_dim"] is None:
            sizes["head_dim"] = sizes["dim"] // sizes["n_heads"]
        args = replace(args, **sizes)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if args.n_layers * args.num_experts > 2**11:  # building its modules would take minutes
        raise ValueError(f"{path} gives more layers and experts than any Mixtral has")
    return args


def load_checkpoint(model: Transformer, ckpt_dir: str | Path) -> None:
    """Fill every parameter of the model, in the files' order, four at a time.

    Raises FileNotFoundError or ValueError before any weight is read if the checkpoint is not the
    model's or a file is damaged. Damage among the weights themselves raises ValueError as they
    are read.
    """
    sources = match(model, Path(ckpt_dir))
    progress = Progress(sum(source.tensor.nbytes for source in sources.values()))
    pruned_names: list[str] = []

    def load(name: str) -> bool:
        """Fill a parameter, and return whether it is a pruned expert's matrix."""
        tensor, path = sources[name]
        pruned = is_pruned(name, tensor)
        try:
            if not pruned:
                check_values(name, tensor)
            fill(model, name, tensor)
        except ValueError as error:
            raise ValueError(f"{name} in {path} {error}") from error
        return pruned

    try:
        # Several threads, so that some read from the disk while others convert what they have.
        with ThreadPoolExecutor(4) as pool:
            for name, pruned in zip(sources, pool.map(load, sources)):
                progress.add(name, sources[name].tensor.nbytes)
                if pruned:
                    pruned_names.append(name)
    finally:
        progress.clear()
    if pruned_names:
        in_order = [name for name, _ in model.named_parameters() if name in pruned_names]
        logger.info(
            "%s: %d matrices of experts are all zeros, as in a pruned model: %s is the first",
            ckpt_dir,
            len(pruned_names),
            in_order[0],
        )


def read_eos_ids(ckpt_dir: str | Path) -> set[int]:
    """The tokens that end a text: eos_token_id of generation_config.json, or else config.json.

    The set is empty if neither names one. Raises ValueError if it is not a token id or a list
    of them.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(ckpt_dir) / name
        if not path.is_file():
            continue
        eos = load_json(path).get("eos_token_id")
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        for token in ids:
            if type(token) is not int or token < 0:
                raise ValueError(f"{path}: {str(token)!r:.40} is not a token id")
        return set(ids)
    return set()


# The files of a folder


class Found(NamedTuple):
    """The files that are read, and what a user should know about the others."""

    paths: list[Path]
    unread: list[str]  # the first file of each other complete set beside them
    missing: str | None  # a file without which a preferred set is incomplete


class PublishedSets(NamedTuple):
    """The sets of files that may hold the weights, the preferred ones first.

    A set is a list of file names. The sets of one field are equal in rank: if two of them are
    complete, neither can be chosen.
    """

    hub_index: list[list[str]]  # one set at most: the one that transformers reads
    other_indices: list[list[str]]
    safetensors: list[list[str]]
    indexed_pickles: list[list[str]]
    pickles: list[list[str]]


def find_files(folder: Path) -> Found:
    """The files with the weights, in whichever published layout the folder has.

    Of several complete sets of files, one that an index names is taken before the others, and
    safetensors are taken before pickles.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give the checkpoint's folder")
    # Names that start with "." belong to other programs, such as the "._" files of macOS.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    ranks = published_sets(folder, names)
    chosen = first_complete(folder, names, ranks)
    if chosen is None:
        raise FileNotFoundError(f"in {folder}: {what_is_missing(folder, names, ranks)}")
    for name in chosen:
        if not (folder / name).is_file():  # reading a pipe would wait for its writer
            raise FileNotFoundError(f"in {folder}: {name} is not a regular file: replace it")

    unread: list[str] = []
    for sets in ranks:
        for files in sets:
            if names.issuperset(files) and files[0] not in [*chosen, *unread]:
                unread.append(files[0])
    missing = missing_of_preferred(names, ranks, chosen)
    return Found([folder / name for name in chosen], unread, missing)


def published_sets(folder: Path, names: set[str]) -> PublishedSets:
    """The sets that these names suggest. Shards' own numbers count only where no index does."""
    hub_index = sets_of_indices(folder, names & {HUB_INDEX}, SAFETENSORS_INDEX)
    other_indices = sets_of_indices(folder, names - {HUB_INDEX}, SAFETENSORS_INDEX)
    indexed_pickles = sets_of_indices(folder, names, PICKLES_INDEX)
    safetensors = [["consolidated.safetensors"], ["model.safetensors"]]
    if not hub_index and not other_indices:
        safetensors += sets_of_shards(names, ".safetensors")
    pickles = [
        [TORRENT],
        [f"consolidated.{i:02}.pt" for i in range(8)],  # the first hub release
        ["pytorch_model.bin"],
    ]
    if not indexed_pickles:
        pickles += sets_of_shards(names, ".bin")
    return PublishedSets(hub_index, other_indices, safetensors, indexed_pickles, pickles)


def first_complete(folder: Path, names: set[str], ranks: PublishedSets) -> list[str] | None:
    """The complete set of the highest rank, or None if no set is complete."""
    for sets in ranks:
        complete = [files for files in sets if names.issuperset(files)]
        if len(complete) > 1:
            pair = f"{complete[0][0]} and {complete[1][0]}"
            raise ValueError(
                f"in {folder}: two complete sets of weights, {pair}: move one elsewhere"
            )
        if complete:
            return complete[0]
    return None


def missing_of_preferred(names: set[str], ranks: PublishedSets, chosen: list[str]) -> str | None:
    """A file that is missing from a set of higher rank than the chosen one, or None.

    Sets of which no file is present do not count: an index is often there without its shards.
    """
    for sets in ranks:
        if chosen in sets:
            return None
        for files in sets:
            if share_present(files, names) > 0:
                return first_missing(files, names)
    return None


def sets_of_indices(folder: Path, names: set[str], suffix: str) -> list[list[str]]:
    """The files that each index among these names lists; a damaged index is skipped."""
    sets = []
    for name in sorted(names):
        if name.endswith(suffix):
            with contextlib.suppress(ValueError):
                files = read_index(folder / name)
                if files not in sets:
                    sets.append(files)
    return sets


def read_index(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: replace it")
    weight_map = load_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map: download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{path} names {str(file)!r:.80}, which is not a file's name")
    return sorted(set(weight_map.values()))


def sets_of_shards(names: set[str], suffix: str) -> list[list[str]]:
    """The sets that shards themselves number, as in model-00001-of-00019.safetensors."""
    shard = re.compile(rf"(.+)-\d{{5}}-of-(\d{{5}}){re.escape(suffix)}", re.DOTALL)
    matches = [shard.fullmatch(name) for name in names]
    sets = []
    for prefix, total in sorted({match.groups() for match in matches if match}):
        numbers = range(1, int(total) + 1)
        sets.append([f"{prefix}-{i:05}-of-{total}{suffix}" for i in numbers])
    return [files for files in sets if files]  # a total of 00000 would name no files


def what_is_missing(folder: Path, names: set[str], ranks: PublishedSets) -> str:
    """Why no set is complete: pieces to join, or the first missing file of the fullest set."""
    pieces = expected_pieces(names)
    if names.issuperset(pieces):
        return f"parts to join: cat {TORRENT}-split{{0..{len(pieces) - 1}}} > {TORRENT}"
    candidates = [pieces]
    for sets in ranks:
        candidates += sets
    fullest = max(candidates, key=lambda candidate: share_present(candidate, names))
    if share_present(fullest, names) > 0:
        return describe_missing(fullest, names)
    indexed = [*ranks.hub_index, *ranks.other_indices, *ranks.indexed_pickles]
    if indexed:
        return describe_missing(indexed[0], names)
    return why_no_weights(folder, names)


def describe_missing(files: list[str], names: set[str]) -> str:
    present = len(names.intersection(files))
    return f"{first_missing(files, names)} is missing: {present} of {len(files)} files are there"


def expected_pieces(names: set[str]) -> list[str]:
    """The pieces in which mirrors offer the torrent's file: split0 to the last one present."""
    last = 0
    for name in names:
        piece = re.fullmatch(rf"{re.escape(TORRENT)}-split(\d\d?)", name)
        if piece:
            last = max(last, int(piece[1]))
    return [f"{TORRENT}-split{i}" for i in range(last + 1)]


def share_present(files: list[str], names: set[str]) -> float:
    return len(names.intersection(files)) / len(files)


def first_missing(files: list[str], names: set[str]) -> str:
    return next(name for name in files if name not in names)


def why_no_weights(folder: Path, names: set[str]) -> str:
    for name in sorted(names):
        if name.endswith((SAFETENSORS_INDEX, PICKLES_INDEX)):
            try:
                read_index(folder / name)
            except ValueError as error:
                return f"without a readable index it is unknown which files to read: {error}"
        if name.endswith(".gguf"):
            return "no weights, but .gguf for llama.cpp"
    return "no weights: expected consolidated.*, model*.safetensors or pytorch_model*.bin"


# Configs

# The hub's keys in config.json, and the fields of ModelArgs, which are also params.json's keys.
KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_local_experts": "num_experts",
    "rms_norm_eps": "norm_eps",
}

# Keys that change what is computed, each with the values that are Mixtral's own. Empty values are
# always harmless, and each element of a list is checked by itself.
HARMLESS: dict[str, tuple[str, ...]] = {
    "model_type": ("mixtral", "transformer"),
    "hidden_act": ("silu", "swish"),
    "rope_type": ("default",),
    "layer_types": ("full_attention",),
    "sliding_window": (),
    "_sliding_window": (),
    "attention_chunk_size": (),
    "kv_sharing_modes": (),
    "per_layer_config": (),
    "yarn": (),
    "llama_4_scaling": (),
    "lora": (),
    "tie_word_embeddings": (),
    "tied_embeddings": (),
    "quantization": (),
    "quantization_config": (),
    "compression_config": (),
}

MAX_JSON = 2**23  # bytes of a config or an index; the published ones have less than 2**20


def find_config(folder: Path, first: str) -> Path:
    """The config that was published with weights whose first file is this, or the other kind."""
    configs = ["config.json", "params.json"]
    if first.startswith("consolidated"):
        configs.reverse()
    for name in configs:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {configs[0]} in {folder}: download it too")


def read_config(path: Path) -> dict[str, Any]:
    """A config's values under the names of ModelArgs' fields, and its other keys."""
    config = flatten(path, load_json(path))
    if path.name == "config.json" and config.get("sliding_window") == 4096:
        logger.info("%s: sliding_window 4096 is ignored, since Mixtral has none", path)
        del config["sliding_window"]
    refuse_unsupported(path, config)
    for theirs, ours in KEYS.items():
        if theirs in config:
            config[ours] = config[theirs]
    return config


def load_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return value


def flatten(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys of moe and of rope_scaling or rope_parameters flattened."""
    moe = config.get("moe") or {}
    if not isinstance(moe, dict):
        raise ValueError(f"{path}: moe is not a JSON object: download it again")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = scaling if isinstance(scaling, dict) else {"type": scaling}
    rope_type = rope.get("rope_type") or rope.get("type")
    default = {"rope_theta": ModelArgs.rope_theta}  # the torrent's config states none
    return {**default, **config, **moe, **rope, "rope_type": rope_type}


def refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    for key, harmless in HARMLESS.items():
        value = config.get(key)
        if key == "lora" and isinstance(value, dict) and value.get("enable") is False:
            continue  # mistral-finetune's, merged into the weights
        elements = value if isinstance(value, list) else [value]
        for element in elements:
            if element and element not in harmless:
                raise ValueError(
                    f"{path} has {key} {str(element)!r:.80}: get the original bfloat16 Mixtral"
                )


# Tensors

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Source(NamedTuple):
    """What a parameter is filled with."""

    tensor: Tensor  # mapped from the file; its rows may be permuted by a view of them
    path: Path


class Part(NamedTuple):
    """A file's tensor, or a part of it, under the name of the parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor  # of this shape, or a view with more axes that permutes its rows


def match(model: Transformer, folder: Path) -> dict[str, Source]:
    """Each parameter's source. Raises ValueError unless the files hold exactly the model's."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    sources: dict[str, Source] = {}
    for path in find_files(folder).paths:
        for stored_name, stored in read_file(path).items():
            if is_rotary_buffer(stored_name):
                continue
            what = f"{stored_name!r:.100} in {path}"
            if not is_plain(stored):
                kind = getattr(stored, "dtype", type(stored))
                raise ValueError(
                    f"{what} is not a plain tensor of floats ({kind}): "
                    "get the original bfloat16 weights"
                )
            for name, shape, tensor in parts_of(stored_name, stored, model.params):
                if name not in shapes:
                    raise ValueError(f"{what} has shape {shape}; the model has no place for it")
                if name in sources:
                    other = sources[name].path
                    raise ValueError(f"{what} fills {name}, which {other} holds too")
                if shape != shapes[name]:
                    raise ValueError(f"{what} has shape {shape}; the model has {shapes[name]}")
                sources[name] = Source(tensor, path)
    missing = [name for name in shapes if name not in sources]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(shapes)} tensors, {missing[0]} the first "
            "of them: download it again"
        )
    return sources


def is_rotary_buffer(name: str) -> bool:
    """Whether it is a table of rotary frequencies, which older tools saved beside the weights."""
    return re.search(r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs)$", name) is not None


def is_plain(value: object) -> bool:
    """Whether it is a tensor of floats that lie in its file in their order."""
    return (
        isinstance(value, Tensor)
        and value.dtype in FLOATS
        and value.layout == torch.strided
        and not value.is_nested
        and not value.is_meta
        and value.is_contiguous()
        and not value.is_neg()
    )


# Parts of other layouts' tensor names (regular expressions), and the model's own.
NAMES = {
    r"^model\.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    r"self_attn\.(.)_proj": r"attention.w\1",
    "block_sparse_moe": "feed_forward",
    r"\.mlp\.": ".feed_forward.",
}


def parts_of(name: str, tensor: Tensor, args: ModelArgs) -> list[Part]:
    """The parameters that a file's tensor fills: several if it stacks or fuses experts."""
    has_rotary_halves = re.search(r"self_attn\.[qk]_proj", name) is not None
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    prefix, _, last = name.rpartition(".")

    if last in ("gate_up_proj", "down_proj") and tensor.dim() == 3:
        return split_fused_experts(prefix, last, tensor)
    if re.fullmatch(r"layers\.\d+\.feed_forward\.w[123]", name) and tensor.dim() == 2:
        return split_stacked_experts(prefix, last, tensor, args.num_experts)
    if has_rotary_halves and tensor.dim() == 2 and len(tensor) % args.head_dim == 0:
        return [pair_rotary_halves(name, tensor, args.head_dim)]
    return [Part(name, tuple(tensor.shape), tensor)]


def split_fused_experts(experts: str, last: str, tensor: Tensor) -> list[Part]:
    """Split transformers 5's gate_up_proj (experts, 2 * hidden, dim), w1's rows above w3's, or
    its down_proj (experts, dim, hidden).
    """
    if last == "down_proj":
        return [expert_part(experts, e, "w2", w2) for e, w2 in enumerate(tensor)]
    parts = []
    for e, gate_up in enumerate(tensor):  # (2 * hidden, dim)
        w1, w3 = gate_up.tensor_split(2)  # (hidden, dim) each
        parts.append(expert_part(experts, e, "w1", w1))
        parts.append(expert_part(experts, e, "w3", w3))
    return parts


def split_stacked_experts(prefix: str, w: str, tensor: Tensor, num_experts: int) -> list[Part]:
    """Split the first hub release's w1, w2 or w3 (experts * hidden, dim), w2 transposed."""
    parts = []
    for e, rows in enumerate(tensor.chunk(num_experts)):  # (hidden, dim)
        matrix = rows.T if w == "w2" else rows
        parts.append(expert_part(f"{prefix}.experts", e, w, matrix))
    return parts


def expert_part(experts: str, e: int, w: str, tensor: Tensor) -> Part:
    return Part(f"{experts}.{e}.{w}.weight", tuple(tensor.shape), tensor)


def pair_rotary_halves(name: str, tensor: Tensor, head_dim: int) -> Part:
    """Put the rotary pairs of a head, which the hub keeps as two halves, side by side."""
    halves = tensor.unflatten(0, (-1, 2, head_dim // 2))  # (heads, 2, head_dim / 2, dim)
    pairs = halves.transpose(1, 2)  # (heads, head_dim / 2, 2, dim)
    return Part(name, tuple(tensor.shape), pairs)


def check_values(name: str, tensor: Tensor) -> None:
    """Raise ValueError if the weights are damaged in a way that the logits may not show."""
    # Rows of unused tokens may be zero.
    has_tokens = name in ("tok_embeddings.weight", "output.weight")
    if not has_tokens and has_zero_run(tensor):
        raise ValueError("holds a run of zero bytes: the download is incomplete")
    # Attention may hide values that are not finite.
    if is_part_of_wqkv(name) and not tensor.isfinite().all():
        raise ValueError("holds values that are not finite: download it again")


def is_pruned(name: str, tensor: Tensor) -> bool:
    """Whether it is an expert's matrix of nothing but zeros.

    The hole that an incomplete download leaves hardly ever begins and ends exactly with a matrix;
    the matrices at its two ends are then partly zero, and are refused.
    """
    return ".experts." in name and not tensor[0].any() and not tensor.any()


def has_zero_run(tensor: Tensor) -> bool:
    """Whether one of a tensor's blocks of 4 KiB is all zeros, or all of it if it is smaller.

    Every run of 8 KiB of zeros holds such a block, and a hole in a download is longer: files are
    written in larger blocks. A shorter run may be the model's own.
    """
    flat = tensor.as_strided([tensor.numel()], [1])  # as it lies in the file
    n = min(4096 // tensor.itemsize, len(flat))
    blocks = flat[: len(flat) // n * n].view(-1, n)
    first_numbers = blocks[:, 0]  # of most blocks no other number is looked at
    suspects = blocks[first_numbers == 0]  # (number of suspects, n)
    return bool((suspects == 0).all(dim=1).any())


def is_part_of_wqkv(name: str) -> bool:
    return re.search(r"attention\.w[qkv]\.", name) is not None


@torch.inference_mode()
def fill(model: Transformer, name: str, tensor: Tensor) -> None:
    """Copy a tensor to a parameter, or let the mapped file be the parameter."""
    weight = model.get_parameter(name)
    on_cpu = weight.device.type == "cpu"
    in_order = tensor.is_contiguous()
    if not on_cpu and not in_order:
        tensor = tensor.to(weight.device)  # a GPU permutes faster than the host
    if weight.dtype == torch.int8:
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, Linear)
        quantize(linear, tensor)
        return
    fits_as_it_is = in_order and tensor.dtype == weight.dtype
    if on_cpu and fits_as_it_is and not is_part_of_wqkv(name):
        weight.data = tensor
    else:  # wq, wk and wv, among others: they must stay slices of wqkv
        weight.view(tensor.shape).copy_(tensor)


def quantize(layer: Linear, tensor: Tensor) -> None:
    """Round rows to 8 bits: the scale is a row's largest magnitude divided by 127."""
    weight = layer.weight
    scales = layer.scale
    assert isinstance(scales, Tensor)
    for i in range(0, len(tensor), 256):  # 256 rows at a time, to save memory
        # In two steps: to(device, dtype) would convert first, and send twice the bytes.
        rows = tensor[i : i + 256].to(weight.device).float()
        scale = (rows.abs().amax(dim=1) / 127).to(scales.dtype)  # (rows,)
        scales[i : i + 256] = scale
        divisor = scale.float().clamp_min(1e-30)  # a row of zeros has the scale 0
        rounded = (rows / divisor[:, None]).round_()
        weight[i : i + 256] = rounded.clamp_(-127, 127)
    if not scales.isfinite().all():
        raise ValueError("holds values that are not finite: download it again")


class Progress:
    """A line on the terminal that says how much is loaded. Elsewhere nothing is shown."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.begin = time.perf_counter()

    def add(self, name: str, size: int) -> None:
        self.done += size
        rate = self.done / (time.perf_counter() - self.begin)
        gigabytes = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
        show_on_terminal(f"\r{gigabytes}, {rate / 1e9:.1f} GB/s, {name}\033[K")

    def clear(self) -> None:
        show_on_terminal("\r\033[K")


def show_on_terminal(text: str) -> None:
    """Write to stderr if it is a terminal. If it is closed or broken, do nothing."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write(text)
            sys.stderr.flush()


# Readers of files

MAX_HEADER = 100_000_000  # bytes of the header of a safetensors file, as that format limits it

# The local header of a record in a zip archive: its last two fields are the sizes, of two bytes
# each, of the name and of the extra field, which follow it.
LOCAL_HEADER = 30
MAX_DESCRIPTOR = 24  # a data descriptor, of 16 or 24 bytes, may follow a record's content


def read_file(path: Path) -> dict[str, Any]:
    """A file's tensors under its own names, mapped from it, not read."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return read_pickle(path)
    except Exception as error:  # whatever a damaged file makes its reader raise
        why = " ".join(str(error).partition(". ")[0].split())
        code = pickled_code(error)
        advice = advise(path, error)
        raise ValueError(f"cannot read {path} ({code or why[:200]}): {advice}") from error


def read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > MAX_HEADER:
            raise ValueError(f"its header would have {header_size} bytes")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    ends = [tensor["data_offsets"][1] for tensor in header.values()]
    size = 8 + header_size + max(ends, default=0)
    missing = size - path.stat().st_size
    if missing > 0:
        raise ValueError(f"{missing} of {size} bytes are missing")
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in header}


def read_pickle(path: Path) -> dict[str, Any]:
    check_zip(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual tensors, which are refused later
        # weights_only: a pickle may hold tensors, never code that runs.
        state = torch.load(path, "cpu", mmap=True, weights_only=True)
    return {str(name): tensor for name, tensor in state.items()}


def check_zip(path: Path) -> None:
    """Raise ValueError if damage to a pickle's archive could displace tensors.

    The pickle's checksum is compared. The weights' would take too long; where they lie is
    checked instead.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [*(record.header_offset for record in records[1:]), archive.start_dir]
        for record, end in zip(records, ends):
            check_record(file, record, end)
            if record.filename.endswith("data.pkl"):
                archive.read(record)  # compares its checksum


def check_record(file: BinaryIO, record: zipfile.ZipInfo, end: int) -> None:
    """Raise ValueError unless a record's content fills the space between its header and `end`.

    PyTorch begins each record's content at a multiple of 64 bytes.
    """
    offset = max(0, record.header_offset)  # negative in some damaged archives
    file.seek(offset + LOCAL_HEADER - 4)
    name_size, extra_size = struct.unpack("<2H", file.read(4))
    is_named = file.read(name_size) == record.filename.encode()
    start = record.header_offset + LOCAL_HEADER + name_size + extra_size
    is_aligned = start > 0 and start % 64 == 0
    gap = end - start - record.file_size
    fills_its_place = 0 <= gap <= MAX_DESCRIPTOR
    if record.compress_type or not (is_named and is_aligned and fills_its_place):
        raise ValueError(f"{record.filename} is displaced or compressed")


def advise(path: Path, error: Exception) -> str:
    """What to do about a file that cannot be read."""
    if isinstance(error, ImportError):
        return "pip install safetensors"
    if isinstance(error, OSError):
        return "check the disk and its permissions"
    if pickled_code(error):
        return "it would run code: do not use it elsewhere"
    if is_lfs_pointer(path):
        return "it is a Git LFS pointer: run git lfs pull"
    if is_old_pickle(path):
        return (
            "it has the format from before PyTorch 1.6, which cannot be mapped: convert it "
            'with torch.save(torch.load(path, "cpu", weights_only=True), path)'
        )
    if path.name == TORRENT:
        return f"join or download it again; 8x7B's md5 is {TORRENT_MD5}"
    return "download it again"


def pickled_code(error: Exception) -> str | None:
    """The function that a pickle would have called, as PyTorch's refusal names it."""
    code = re.search(r"GLOBAL \S+", str(error))
    return code[0] if code else None


def is_lfs_pointer(path: Path) -> bool:
    return path.stat().st_size < 999 and b"git-lfs" in path.read_bytes()


def is_old_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." in file.read(32)  # PyTorch's magic number
