"""Writes a state dict in each of the layouts that Mixtral is found in."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.reference import to_transformers
from mixtral import ModelArgs

PICKLE = "consolidated.00.pth"
ARCHIVE = "consolidated.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# A: the torrent. B: the first hub release. C: Mistral's archives. D: the hub's, by transformers.
# D2: transformers 5's own, with fused experts. bin: D's names in pickles.
LAYOUTS = ("A", "B", "C", "D", "D-sharded", "D2", "D2-sharded", "bin-sharded")


def write(folder: Path, layout: str, args: ModelArgs, state: dict[str, torch.Tensor]) -> Path:
    """Write state, the model's own tensors, to folder; D and D2 are transformers' writing."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout.startswith("D"):
        write_with_transformers(folder, layout, args, state)
    elif layout == "bin-sharded":
        write_with_transformers(folder, "D-sharded", args, state)
        turn_into_pickles(folder)
    else:
        write_params(folder, args)
        if layout == "A":
            torch.save(copies(state), folder / PICKLE)
        elif layout == "B":
            write_eight_pickles(folder, stack_experts(args, state))
        else:
            save_file(copies(state), folder / ARCHIVE)
    return folder


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A view would be saved with all of the tensor that it is part of."""
    return {name: tensor.clone() for name, tensor in state.items()}


def write_params(folder: Path, args: ModelArgs) -> None:
    sizes = "dim n_layers head_dim hidden_dim n_heads n_kv_heads norm_eps vocab_size"
    params = {name: getattr(args, name) for name in sizes.split()}
    params["moe"] = {
        "num_experts_per_tok": args.num_experts_per_tok,
        "num_experts": args.num_experts,
    }
    if args.rope_theta != ModelArgs.rope_theta:
        params["rope_theta"] = args.rope_theta
    (folder / "params.json").write_text(json.dumps(params))


def write_with_transformers(
    folder: Path, layout: str, args: ModelArgs, state: dict[str, torch.Tensor]
) -> None:
    dtype = next(iter(state.values())).dtype
    size = sum(tensor.nbytes for tensor in state.values())
    to_transformers(args, state, dtype).save_pretrained(
        folder,
        max_shard_size=size // 3 if layout.endswith("-sharded") else 2 * size,
        save_original_format=not layout.startswith("D2"),
    )
    (folder / "generation_config.json").unlink()


def turn_into_pickles(folder: Path) -> None:
    """Layout D's shards as pytorch_model-0000K-of-0000N.bin, with their index."""
    index = json.loads((folder / INDEX).read_text())
    for path in sorted(folder.glob("model-*.safetensors")):
        torch.save(load_file(path), folder / pickled_name(path.name))
        path.unlink()
    weight_map = {name: pickled_name(file) for name, file in index["weight_map"].items()}
    (folder / PICKLE_INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    (folder / INDEX).unlink()


def pickled_name(name: str) -> str:
    return re.sub(r"^model(-.*)\.safetensors$", r"pytorch_model\1.bin", name)


def write_eight_pickles(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Layout B's files, in each of which all tensors share one storage."""
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(8)]
    for i, (name, tensor) in enumerate(state.items()):
        files[i % 8][name] = tensor
    for i, tensors in enumerate(files):
        storage = torch.cat([tensor.flatten() for tensor in tensors.values()])
        parts = storage.split([tensor.numel() for tensor in tensors.values()])
        views = {}
        for (name, tensor), part in zip(tensors.items(), parts):
            views[name] = part.view(tensor.shape)
        torch.save(views, folder / f"consolidated.{i:02}.pt")


def stack_experts(args: ModelArgs, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layout B's tensors."""
    stacked = {}
    for name, tensor in state.items():
        if ".experts." not in name:
            name = name.replace("feed_forward.gate", "block_sparse_moe.gate")
            stacked[name] = tensor
    for n in range(args.n_layers):
        for w in ("w1", "w2", "w3"):
            experts = f"layers.{n}.feed_forward.experts"
            each = [state[f"{experts}.{e}.{w}.weight"] for e in range(args.num_experts)]
            if w == "w2":
                each = [tensor.T for tensor in each]
            stacked[f"layers.{n}.block_sparse_moe.{w}"] = torch.cat(each)
    return stacked
