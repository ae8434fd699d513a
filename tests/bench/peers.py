"""Other programs that run Mixtral, as contenders in the benchmark."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from checkout import ROOT  # noqa: F401 - first, since it makes mixtral importable
from gguf_file import write_gguf
from torch import Tensor

from mixtral import Transformer


class Transformers:
    """transformers' model with one of its ways through the experts."""

    def __init__(self, model: Any, experts: str):
        self.model = model
        self.experts = experts
        self.cache: Any = None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.model.set_experts_implementation(self.experts)
        self.cache = None
        return self.forward(torch.tensor(prompts))

    def decode(self, tokens: Tensor, start: int, steps: int) -> None:
        self.model.set_experts_implementation(self.experts)
        self.cache.crop(start - self.cache.get_seq_length())
        for _ in range(steps):
            tokens = self.forward(tokens[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        """The likeliest token (rows,) after each row of tokens (rows, length)."""
        out = self.model(
            tokens.to(self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        return out.logits[:, -1].argmax(-1)


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
    """transformers' model with these weights, once for each of its two expert implementations.

    If fill is given, model and state are on the device "meta": transformers' model is then made on
    the GPU, and fill gives it weights.
    """
    from helpers.reference import to_transformers

    with uninitialised(), model.device:
        peer = to_transformers(model.params, state, torch.bfloat16)
        # Its conversion to bf16 has rounded the rotary frequencies, too.
        peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config)
    if fill:
        with uninitialised(), torch.device("cuda"):
            peer = type(peer)(peer.config).eval()
        fill(peer)
    return {
        "transformers eager": Transformers(peer, "eager"),
        "transformers grouped_mm": Transformers(peer, "grouped_mm"),
    }


def llama_cpp(model: Transformer, state: dict[str, Tensor], int8: bool) -> dict[str, "LlamaCpp"]:
    name = "llama.cpp with experts in Q8_0" if int8 else "llama.cpp"
    return {name: LlamaCpp(model, state, int8)}


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF of the same weights."""

    def __init__(self, model: Transformer, state: dict[str, Tensor], int8: bool):
        import llama_cpp as api

        self.api = api
        self.vocab_size = model.params.vocab_size
        self.logger = api.llama_log_callback(lambda *_: None)  # it must stay referenced
        api.llama_log_set(self.logger, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, model.params, state, int8)
            options = api.llama_model_default_params()
            options.n_gpu_layers = 0 if model.device.type == "cpu" else 999
            weights = api.llama_model_load_from_file(bytes(path), options)  # it is mapped
        options = api.llama_context_default_params()
        options.n_seq_max = model.params.max_batch_size
        options.n_ctx = model.params.max_batch_size * model.params.max_seq_len
        options.n_batch = options.n_ctx
        options.n_threads = torch.get_num_threads()
        options.n_threads_batch = torch.get_num_threads()
        self.context = weights and api.llama_init_from_model(weights, options)
        if not self.context:
            raise RuntimeError("llama.cpp refuses the model")
        self.memory = api.llama_get_memory(self.context)
        self.batch = api.llama_batch_init(options.n_batch, 0, 1)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.api.llama_memory_clear(self.memory, False)
        return torch.tensor(self.forward(prompts, 0))

    def decode(self, tokens: Tensor, start: int, steps: int) -> None:
        for row in range(len(tokens)):
            self.api.llama_memory_seq_rm(self.memory, row, start, -1)
        each = tokens.tolist()
        for position in range(start, start + steps):
            each = self.forward([[token] for token in each], position)

    def forward(self, rows: Sequence[Sequence[int]], start: int) -> list[int]:
        """The likeliest token after each row's tokens, the first of which is at start."""
        from numpy.ctypeslib import as_array

        batch = self.batch
        ends = []
        i = 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, start):
                batch.token[i] = token
                batch.pos[i] = position
                batch.logits[i] = 0
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = row
                i += 1
            batch.logits[i - 1] = 1
            ends.append(i - 1)
        batch.n_tokens = i
        if error := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returns {error}")
        likeliest = []
        for end in ends:
            logits = self.api.llama_get_logits_ith(self.context, end)
            likeliest.append(int(as_array(logits, (self.vocab_size,)).argmax()))
        return likeliest
