"""The independent implementation that the tests compare with: transformers' Mixtral on the same weights."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixtral import ModelArgs, Transformer

RENAMED = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.w": "self_attn.",
    "feed_forward.gate": "mlp.gate",
    "output": "lm_head",
}


def random_transformer(
    args: ModelArgs, devices=("cpu",), dtype=torch.float32, seed: int = 0
) -> Transformer:
    """A Transformer whose random weights give logits of about unit size and a gate that chooses clearly."""
    model = Transformer(args, devices, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        values = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            values = 1 + 0.1 * values
        elif name != "tok_embeddings.weight":
            values = values * p.shape[1] ** -0.5
        p.copy_(values)
    return model


def to_transformers(
    args: ModelArgs, state: dict[str, torch.Tensor], dtype=torch.float32
) -> MixtralForCausalLM:
    """transformers' model on layout A's tensors."""
    config = MixtralConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        num_local_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        max_position_embeddings=max(args.max_seq_len, 2048),
    )
    hub = {}
    for name, tensor in state.items():
        if ".experts." in name:
            continue
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        if name.endswith(
            ("self_attn.q.weight", "self_attn.k.weight")
        ):  # pairs: interleaved -> halves
            tensor = (
                tensor.unflatten(0, (-1, args.head_dim // 2, 2))
                .transpose(1, 2)
                .flatten(0, 2)
            )
        for letter in "qkvo":
            name = name.replace(f"self_attn.{letter}.", f"self_attn.{letter}_proj.")
        hub["model.norm.weight" if name == "norm.weight" else name] = tensor
    for layer in range(args.n_layers):
        w1, w2, w3 = (
            [
                state[f"layers.{layer}.feed_forward.experts.{e}.{w}.weight"]
                for e in range(args.num_experts)
            ]
            for w in ("w1", "w2", "w3")
        )
        experts = f"model.layers.{layer}.mlp.experts."
        hub[experts + "gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(w1, w3)]
        )
        hub[experts + "down_proj"] = torch.stack(w2)
    model = MixtralForCausalLM(config).to(dtype)
    model.load_state_dict(hub, strict=True)
    return model.eval()
