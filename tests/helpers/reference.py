"""What the tests compare with: transformers' Mixtral on the same weights."""

import re

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixtral import ModelArgs, Transformer

RENAMED = {
    r"^tok_embeddings": "model.embed_tokens",
    r"^layers": "model.layers",
    r"^norm": "model.norm",
    r"^output": "lm_head",
    r"attention_norm": "input_layernorm",
    r"ffn_norm": "post_attention_layernorm",
    r"attention\.w([qkvo])": r"self_attn.\1_proj",
    r"feed_forward\.gate": "mlp.gate",
}
W123 = ("w1", "w2", "w3")


def random_transformer(
    args: ModelArgs, devices=("cpu",), dtype=torch.float32, seed: int = 0, **options
) -> Transformer:
    """A model with random weights: its logits are about 1, its gates choose clearly."""
    model = Transformer(args, devices, dtype, **options)
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
    """transformers' model with the torrent's tensors."""
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
        if re.search(r"\.w[qk]\.", name):  # rotary pairs: interleaved to halves
            pairs = tensor.unflatten(0, (-1, args.head_dim // 2, 2))
            tensor = pairs.transpose(1, 2).flatten(0, 2)
        for ours, theirs in RENAMED.items():
            name = re.sub(ours, theirs, name)
        hub[name] = tensor
    for n in range(args.n_layers):
        experts = [
            [state[f"layers.{n}.feed_forward.experts.{e}.{w}.weight"] for w in W123]
            for e in range(args.num_experts)
        ]
        w1, w2, w3 = map(torch.stack, zip(*experts))
        hub[f"model.layers.{n}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), dim=1)
        hub[f"model.layers.{n}.mlp.experts.down_proj"] = w2
    model = MixtralForCausalLM(config).to(dtype)
    model.load_state_dict(hub, strict=True)
    return model.eval()


def reference_logits(model: MixtralForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, float32 (len(tokens), vocab)."""
    # A loop over experts: transformers' grouped products refuse odd sizes.
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()
