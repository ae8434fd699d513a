"""Train the small Mixtral of this folder on the King James Bible, and measure it.

    python tests/demo/train.py [--out DIR] [--epochs N] [--evaluate]

Needs Debian's bible-kjv, and torch, transformers and sentencepiece; no GPU. It writes
consolidated.00.pth, params.json and tokenizer.model, in the layout of the Mixtral 8x7B
torrent, and heldout.txt, the text that training never sees.
"""

import argparse
import io
import json
import lzma
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor as Tokenizer
from sentencepiece import SentencePieceTrainer
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

PARAMS = {
    "dim": 160,
    "n_layers": 4,
    "head_dim": 32,
    "hidden_dim": 240,
    "n_heads": 6,
    "n_kv_heads": 2,
    "norm_eps": 1e-05,
    "vocab_size": 2048,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}
HELD_OUT_EVERY = 47  # one chapter in 47 is held out
CONTEXT = 512  # half of it in the first epochs, which is faster
BATCH_TOKENS = 4096
LR, WARMUP, WEIGHT_DECAY, BALANCE = 5e-3, 100, 0.1, 0.02
EXPERTS, TOP_K = PARAMS["moe"]["num_experts"], PARAMS["moe"]["num_experts_per_tok"]
PROMPTS = ("And it came to pass in those days, that", "Psalms 151\n", "The LORD is my")


def chapters() -> list[str]:
    """Each chapter as its heading ("Genesis 1") and its verses, unnumbered, one a line."""
    try:
        printed = subprocess.check_output(["bible", "gen1:1-rev22:21"], text=True)
    except FileNotFoundError:
        sys.exit("train.py needs Debian's bible command: apt install bible-kjv")
    blocks = [block for block in printed.split("\n\n") if block.strip()]
    texts = []
    for heading, body in zip(blocks[::2], blocks[1::2], strict=True):
        lines = [heading, *re.split(r"^ +\d+ ", body, flags=re.MULTILINE)[1:]]
        texts.append("".join(" ".join(line.split()) + "\n" for line in lines))
    return texts


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece BPE model with Mistral's settings: a newline is a byte piece.

    The zero put before each line stands for that newline. Digits are pieces of their
    own, so the word after it is learnt as it begins a line, with no space before it.
    """
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=("0" + line for text in texts for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PARAMS["vocab_size"],
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    tokenizer = Tokenizer(model_proto=model.getvalue())
    for text in (*texts, " a\nb  c\n\n 2024 \N{GRINNING FACE} \u00e9\t", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    return model.getvalue()


def build() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=PARAMS["vocab_size"],
        hidden_size=PARAMS["dim"],
        intermediate_size=PARAMS["hidden_dim"],
        num_hidden_layers=PARAMS["n_layers"],
        num_attention_heads=PARAMS["n_heads"],
        num_key_value_heads=PARAMS["n_kv_heads"],
        head_dim=PARAMS["head_dim"],
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        rms_norm_eps=PARAMS["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        output_router_logits=True,
        initializer_range=0.03,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def epoch(documents: list[list[int]], bos: int, context: int) -> Iterator[torch.Tensor]:
    """Batches of rows: shuffled chapters end to end, cut, and bos put before each cut."""
    order = random.sample(documents, len(documents))
    stream = torch.tensor([token for document in order for token in document])
    rows = stream[: len(stream) // (context - 1) * (context - 1)].view(-1, context - 1)
    rows = F.pad(rows, (1, 0), value=bos)[torch.randperm(len(rows))]
    yield from rows.split(BATCH_TOKENS // context)


def train(texts: list[str], tokenizer: Tokenizer, epochs: int) -> MixtralForCausalLM:
    random.seed(0)
    torch.manual_seed(0)
    model = build().train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    documents = [[bos, *tokenizer.encode(text), eos] for text in texts]
    tokens = sum(map(len, documents))
    contexts = [CONTEXT // (2 if 5 * n < 3 * epochs else 1) for n in range(epochs)]
    steps = sum(math.ceil(tokens // (c - 1) / (BATCH_TOKENS // c)) for c in contexts)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {tokens} tokens, {epochs} epochs, {steps} steps")
    start = time.time()
    batches = (rows for context in contexts for rows in epoch(documents, bos, context))
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * cosine
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=rows, use_cache=False)
        logits = out.logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(logits, rows[:, 1:].flatten())
        # The model's own aux_loss pools the layers, so that one layer's imbalance can
        # make up for another's. Here each layer is balanced by itself: 1 is even.
        balance = [
            load_balancing_loss_func((gate,), EXPERTS, TOP_K) / TOP_K for gate in out.router_logits
        ]
        (loss + BALANCE * sum(balance)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            seconds, worst = time.time() - start, max(balance).item()
            print(f"step {step} loss {loss:.3f} balance {worst:.3f} {seconds:.0f} s")
    return model.eval()


def torrent_views(model: MixtralForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights under the torrent's names: views to read and write them by.

    Per head, transformers keeps the first halves of all rotary pairs before the second
    halves, the torrent each pair together: so wq and wk are seen as (heads, pairs, 2, dim).
    """
    state = model.state_dict()
    old = {"tok_embeddings": "embed_tokens", "norm": "norm"}
    for n in range(PARAMS["n_layers"]):
        layer = f"layers.{n}"
        for x in "qkvo":
            old[f"{layer}.attention.w{x}"] = f"{layer}.self_attn.{x}_proj"
        old[f"{layer}.attention_norm"] = f"{layer}.input_layernorm"
        old[f"{layer}.ffn_norm"] = f"{layer}.post_attention_layernorm"
        old[f"{layer}.feed_forward.gate"] = f"{layer}.mlp.gate"
    views = {name: state[f"model.{old[name]}.weight"] for name in old}
    views["output"] = state["lm_head.weight"]
    for n in range(PARAMS["n_layers"]):
        for name in (f"layers.{n}.attention.wq", f"layers.{n}.attention.wk"):
            halves = views[name].unflatten(0, (-1, 2, PARAMS["head_dim"] // 2))
            views[name] = halves.transpose(1, 2)
        for m in range(EXPERTS):
            up = state[f"model.layers.{n}.mlp.experts.gate_up_proj"][m]
            down = state[f"model.layers.{n}.mlp.experts.down_proj"][m]
            expert = f"layers.{n}.feed_forward.experts.{m}"
            views[f"{expert}.w1"], views[f"{expert}.w3"] = up.chunk(2)
            views[f"{expert}.w2"] = down
    return {f"{name}.weight": view for name, view in views.items()}


def export(model: MixtralForCausalLM, folder: Path) -> None:
    weights = {}
    for name, view in torrent_views(model).items():
        weight = view.flatten(0, -2) if view.ndim > 2 else view
        weights[name] = weight.to(torch.bfloat16, copy=True).contiguous()
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")


def load(folder: Path) -> MixtralForCausalLM:
    """Read what export wrote back into transformers' model, in float32."""
    weights = torch.load(folder / "consolidated.00.pth", mmap=True, weights_only=True)
    model = build().eval()
    views = torrent_views(model)
    assert views.keys() == weights.keys()
    for name, view in views.items():
        view.copy_(weights[name].view(view.shape))
    return model


@torch.inference_mode()
def evaluate(
    model: MixtralForCausalLM, tokenizer: Tokenizer, texts: list[str]
) -> tuple[float, torch.Tensor]:
    """The bits the model needs for the texts, and the experts' shares in each layer.

    A window is bos and at most 511 tokens: all windows of a text but the first use their
    first half only as context. The eos that ends a text is paid for too: it stands for
    the empty line between two chapters of heldout.txt.
    """
    bits, half = 0.0, CONTEXT // 2
    counts = torch.zeros(PARAMS["n_layers"], EXPERTS)
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id()]
        for start in range(0, len(ids), half):
            scored = len(ids[start : start + half])
            context = ids[max(0, start - half + 1) : start + half]
            window = torch.tensor([[tokenizer.bos_id(), *context]])
            out = model(input_ids=window[:, :-1], use_cache=False)
            targets = window[0, -scored:]
            loss = F.cross_entropy(out.logits[0, -scored:], targets, reduction="sum")
            bits += loss.item() / math.log(2)
            for layer, logits in enumerate(out.router_logits):
                chosen = logits[-scored:].topk(TOP_K).indices.flatten()
                counts[layer] += chosen.bincount(minlength=EXPERTS)
    return bits, counts / counts.sum(dim=1, keepdim=True)


def report(folder: Path, training: list[str], held: list[str]) -> None:
    tokenizer = Tokenizer(model_file=str(folder / "tokenizer.model"))
    model = load(folder)
    bits, shares = evaluate(model, tokenizer, held)
    before, text = "\n".join(training).encode() + b"\n", "\n".join(held).encode()
    alone, both, first = (
        len(lzma.compress(data, preset=9)) for data in (text, before + text, before)
    )
    size = len(text)
    print(f"held out: {len(held)} chapters, {size} bytes; bits per byte:")
    print(f"  model, bfloat16 weights, {CONTEXT}-token windows: {bits / size:.4f}")
    print(f"  xz -9 of the held-out text alone: {8 * alone / size:.4f}")
    print(f"  xz -9 of both texts less training's: {8 * (both - first) / size:.4f}")
    print("percent of the held-out token slots, by expert:")
    for layer, row in enumerate(100 * shares):
        cells = " ".join(f"{share:5.1f}" for share in row.tolist())
        print(f"  layer {layer}: {cells}   min {row.min():.1f} max {row.max():.1f}")
    for name in ("consolidated.00.pth", "tokenizer.model"):
        print(f"{name}: {(folder / name).stat().st_size} bytes")
    for prompt in PROMPTS:
        ids = torch.tensor([[tokenizer.bos_id(), *tokenizer.encode(prompt)]])
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, max_new_tokens=80)
        print(f"greedily: {tokenizer.decode(ids[0].tolist())!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the small Mixtral.")
    folder = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--evaluate", action="store_true", help="only measure --out")
    args = parser.parse_args()
    torch.set_num_threads(2)
    sys.stdout.reconfigure(line_buffering=True)
    texts = chapters()
    held = texts[HELD_OUT_EVERY // 2 + 1 :: HELD_OUT_EVERY]
    training = [text for text in texts if text not in held]
    if not args.evaluate:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "heldout.txt").write_text("\n".join(held))
        pieces = train_tokenizer(training)
        (args.out / "tokenizer.model").write_bytes(pieces)
        export(train(training, Tokenizer(model_proto=pieces), args.epochs), args.out)
    report(args.out, training, held)


if __name__ == "__main__":
    main()
