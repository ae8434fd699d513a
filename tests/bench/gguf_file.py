"""Writes the weights in llama.cpp's format, GGUF."""

from pathlib import Path

import torch
from torch import Tensor

from mixtral import ModelArgs

# GGUFWriter's methods, each for a size of ours.
SIZES = {
    "add_vocab_size": "vocab_size",
    "add_context_length": "max_seq_len",
    "add_embedding_length": "dim",
    "add_block_count": "n_layers",
    "add_feed_forward_length": "hidden_dim",
    "add_head_count": "n_heads",
    "add_head_count_kv": "n_kv_heads",
    "add_key_length": "head_dim",
    "add_value_length": "head_dim",
    "add_rope_dimension_count": "head_dim",
    "add_rope_freq_base": "rope_theta",
    "add_expert_count": "num_experts",
    "add_expert_used_count": "num_experts_per_tok",
    "add_layer_norm_rms_eps": "norm_eps",
}
FIRST = ".experts.0."


def write_gguf(path: Path, args: ModelArgs, state: dict[str, Tensor], int8: bool) -> None:
    """Write the weights in bf16; with int8, the experts in Q8_0."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    for method, size in SIZES.items():
        getattr(writer, method)(getattr(args, size))
    renamed = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    for name, tensor in state.items():
        kind = kinds.BF16
        if FIRST in name:  # the experts of a layer are one tensor
            each = [name.replace(FIRST, f".experts.{e}.") for e in range(args.num_experts)]
            tensor = torch.stack([state[expert] for expert in each])
            kind = kinds.Q8_0 if int8 else kinds.BF16
        elif ".experts." in name:
            continue
        if tensor.dim() == 1 or "gate" in name:
            kind = kinds.F32
        if kind == kinds.BF16:
            array = tensor.cpu().view(torch.uint8).numpy()
        else:
            array = gguf.quants.quantize(tensor.cpu().float().numpy(), kind)
        theirs = renamed.get_name(name.replace(FIRST, ".experts."), [".weight"])
        writer.add_tensor(theirs, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
