"""Other programs that run Mixtral, for tests/benchmark.py."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mixtral import ModelArgs, Transformer


class Transformers:
    """transformers' model with one of its ways through the experts."""

    def __init__(self, model: nn.Module, experts: str):
        self.model, self.experts, self.cache = model, experts, None

    def forward(self, tokens: Tensor) -> Tensor:
        options = {"past_key_values": self.cache, "logits_to_keep": 1}
        out = self.model(tokens.to(self.model.device), use_cache=True, **options)
        self.cache = out.past_key_values
        return out.logits[:, -1].argmax(-1)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.model.set_experts_implementation(self.experts)
        self.cache = None
        return self.forward(torch.tensor(prompts))

    def decode(self, tokens: Tensor, start: int, steps: int) -> None:
        self.model.set_experts_implementation(self.experts)
        self.cache.crop(start - self.cache.get_seq_length())
        for _ in range(steps):
            tokens = self.forward(tokens[:, None])


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Has transformers make models in bf16, and draw no weights for them."""
    from transformers.initialization import no_init_weights

    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def transformers(
    model: Transformer, state: dict[str, Tensor], fill: Callable | None = None
) -> dict[str, Transformers]:
    """transformers on these weights, or on a GPU with such as fill gives it.

    Then the model and the state are on meta.
    """
    from reference import to_transformers

    with uninitialised(), model.device:
        peer = to_transformers(model.params, state, torch.bfloat16)
        # Its conversion to bf16 has rounded the rotary frequencies, too.
        peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config)
    if fill:
        with uninitialised(), torch.device("cuda"):
            peer = type(peer)(peer.config).eval()
        fill(peer)
    ways = ("eager", "grouped_mm")
    return {f"transformers {way}": Transformers(peer, way) for way in ways}


def llama_cpp(model: Transformer, state: dict[str, Tensor], int8: bool) -> dict[str, "LlamaCpp"]:
    name = "llama.cpp" + " with experts in Q8_0" * int8
    return {name: LlamaCpp(model, state, int8)}


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF of the same weights."""

    def __init__(self, model: Transformer, state: dict, int8: bool):
        import llama_cpp as api

        self.api, self.vocab_size = api, model.params.vocab_size
        self.logger = api.llama_log_callback(lambda *_: None)  # it must stay referenced
        api.llama_log_set(self.logger, None)
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0 if model.device.type == "cpu" else 999
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, model.params, state, int8)
            weights = api.llama_model_load_from_file(bytes(path), options)  # mapped
        options = api.llama_context_default_params()
        rows, length = model.params.max_batch_size, model.params.max_seq_len
        options.n_seq_max, options.n_ctx = rows, rows * length
        options.n_batch = options.n_ctx
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = weights and api.llama_init_from_model(weights, options)
        if not self.context:
            raise RuntimeError("llama.cpp refuses the model")
        self.memory = api.llama_get_memory(self.context)
        self.batch = api.llama_batch_init(options.n_batch, 0, 1)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.api.llama_memory_clear(self.memory, False)
        return torch.tensor(self.forward(prompts, 0))

    def forward(self, rows: Sequence[Sequence[int]], start: int) -> list[int]:
        from numpy.ctypeslib import as_array

        batch, ends, i = self.batch, [], 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, start):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, 0
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                i += 1
            batch.logits[i - 1] = 1
            ends.append(i - 1)
        batch.n_tokens, shape = i, (self.vocab_size,)
        if error := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returns {error}")
        logits = (self.api.llama_get_logits_ith(self.context, end) for end in ends)
        return [int(as_array(x, shape).argmax()) for x in logits]

    def decode(self, tokens: Tensor, start: int, steps: int) -> None:
        for row in range(len(tokens)):
            self.api.llama_memory_seq_rm(self.memory, row, start, -1)
        each = tokens.tolist()
        for i in range(start, start + steps):
            each = self.forward([[token] for token in each], i)


def write_gguf(path: Path, args: ModelArgs, state: dict, int8: bool) -> None:
    """Write the weights for llama.cpp; with int8, the experts in Q8_0."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    sizes = """vocab_size=vocab_size context_length=max_seq_len embedding_length=dim
        block_count=n_layers feed_forward_length=hidden_dim head_count=n_heads
        head_count_kv=n_kv_heads key_length=head_dim value_length=head_dim
        rope_dimension_count=head_dim rope_freq_base=rope_theta expert_count=num_experts
        expert_used_count=num_experts_per_tok layer_norm_rms_eps=norm_eps"""
    for theirs, ours in (pair.split("=") for pair in sizes.split()):
        getattr(writer, f"add_{theirs}")(getattr(args, ours))
    renamed = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    for name, tensor in state.items():
        kind, first = gguf.GGMLQuantizationType.BF16, ".experts.0."
        if first in name:
            each = [name.replace(first, f".experts.{e}.") for e in range(args.num_experts)]
            tensor = torch.stack([state[expert] for expert in each])
            kind = gguf.GGMLQuantizationType.Q8_0 if int8 else kind
        elif ".experts." in name:
            continue
        if tensor.dim() == 1 or "gate" in name:
            kind = gguf.GGMLQuantizationType.F32
        theirs = renamed.get_name(name.replace(first, ".experts."), [".weight"])
        tensor = tensor.cpu()
        if kind == gguf.GGMLQuantizationType.BF16:
            array = tensor.view(torch.uint8).numpy()
        else:
            array = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(theirs, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
