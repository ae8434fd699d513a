"""Writes a state dict in each of the layouts that Mixtral was published in."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.reference import to_transformers
from mixtral import ModelArgs

LAYOUTS = ("A", "B", "C", "D", "D-sharded")


def write(folder: Path, layout: str, args: ModelArgs, state: dict) -> Path:
    """Write state, the model's own tensors, to folder; D is transformers' writing."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout.startswith("D"):
        dtype = next(iter(state.values())).dtype
        size = sum(tensor.nbytes for tensor in state.values())
        shard = size // 3 if layout == "D-sharded" else 2 * size
        model = to_transformers(args, state, dtype)
        model.save_pretrained(folder, max_shard_size=shard)
        (folder / "generation_config.json").unlink()
        return folder
    moe = {"num_experts_per_tok": args.num_experts_per_tok}
    moe["num_experts"] = args.num_experts
    sizes = "dim n_layers head_dim hidden_dim n_heads n_kv_heads norm_eps vocab_size"
    params = {name: getattr(args, name) for name in sizes.split()} | {"moe": moe}
    if args.rope_theta != ModelArgs.rope_theta:
        params["rope_theta"] = args.rope_theta
    (folder / "params.json").write_text(json.dumps(params))
    if layout == "A":
        torch.save({k: v.clone() for k, v in state.items()}, folder / PICKLE)
    elif layout == "C":
        whole = {k: v.clone() for k, v in state.items()}
        save_file(whole, folder / "consolidated.safetensors")
    else:
        files = [{} for _ in range(8)]
        for i, (name, tensor) in enumerate(stack_experts(args, state).items()):
            files[i % 8][name] = tensor
        for i, tensors in enumerate(files):
            flat = torch.cat([t.flatten() for t in tensors.values()])  # one storage
            parts = flat.split([t.numel() for t in tensors.values()])
            shapes = [t.shape for t in tensors.values()]
            views = (part.view(shape) for part, shape in zip(parts, shapes))
            file = dict(zip(tensors, views))
            torch.save(file, folder / f"consolidated.{i:02}.pt")
    return folder


PICKLE = "consolidated.00.pth"


def stack_experts(args: ModelArgs, state: dict) -> dict:
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
            each = [tensor.T for tensor in each] if w == "w2" else each
            stacked[f"layers.{n}.block_sparse_moe.{w}"] = torch.cat(each)
    return stacked
