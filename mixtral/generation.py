"""Prompts in, text out: `Mixtral`, with the methods and results of Llama 2's `Llama`."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_memory, load_checkpoint, read_params
from .model import ModelArgs, Span, Transformer
from .tokenizer import Tokenizer

# Prompts are read so many tokens at a time: enough to keep matrix units busy, and a
# bound on the memory for activations.
PREFILL_TOKENS = {"cuda": 2048, "cpu": 512}


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


Dialog = Sequence[Message]


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs only
    logprobs: list[float]  # with logprobs only


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]
    logprobs: list[float]


class Mixtral:
    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path,
        max_seq_len: int,
        max_batch_size: int,
        num_gpus: int = 2,
        seed: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "Mixtral":
        """Load a checkpoint onto num_gpus GPUs, or for the CPU with 0.

        dtype is what weights are kept and computed in. On the CPU bfloat16 is best, for
        half the bytes are read; float32 answers prompts faster on a processor without
        bfloat16 instructions, and where the file is float32 needs no copy of it.

        Raises FileNotFoundError, ValueError or RuntimeError with a message for a
        person, before a weight is read.
        """
        start_time = time.time()
        devices = find_devices(num_gpus)
        tokenizer = Tokenizer(tokenizer_path)
        params = read_params(ckpt_dir, max_seq_len, max_batch_size)
        if params.vocab_size != tokenizer.n_words:
            raise ValueError(
                f"{tokenizer_path} has a vocabulary of {tokenizer.n_words}, the "
                f"checkpoint one of {params.vocab_size}: use the tokenizer beside it"
            )
        check_memory(params, devices, dtype.itemsize)
        model = Transformer(params, devices, dtype)
        load_checkpoint(model, ckpt_dir)
        print(f"Loaded in {time.time() - start_time:.2f} seconds", file=sys.stderr)
        return Mixtral(model, tokenizer, seed)

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1):
        self.model = model
        self.tokenizer = tokenizer
        self.rng = torch.Generator(model.device).manual_seed(seed)
        self.request = 0  # the one that has the cache

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Each prompt's continuation, with echo after the prompt, and log-probabilities.

        A row ends before eos, after max_gen_len tokens if given, or at max_seq_len. The
        log-probabilities are the model's own, of before temperature and top_p, and 0
        for a prompt's first token. Raises ValueError as check_request does.
        """
        check_request(prompt_tokens, self.model.params, temperature, top_p)
        if not prompt_tokens:
            return [], [] if logprobs else None
        logits, values = self.prefill(prompt_tokens, logprobs and echo)
        tokens = [list(prompt) if echo else [] for prompt in prompt_tokens]
        starts = [len(prompt) for prompt in prompt_tokens]
        options = max_gen_len, temperature, top_p, logprobs
        for row, token, value in self.decode(logits, starts, *options):
            tokens[row].append(token)
            values[row].append(value)
        return tokens, values if logprobs else None

    @torch.inference_mode()
    def prefill(
        self, prompts: list[list[int]], logprobs: bool = False
    ) -> tuple[Tensor, list[list[float]]]:
        """Read the prompts into the cache: the logits (bsz, vocab) after each of them.

        With logprobs also each prompt's own log-probabilities, else empty lists.
        """
        self.request += 1
        chunks, most = [[]], PREFILL_TOKENS[self.model.device.type]
        room = most
        for row, prompt in enumerate(prompts):
            start = 0
            while start < len(prompt):
                if room == 0:
                    chunks.append([])
                    room = most
                span = Span(row, start, min(room, len(prompt) - start))
                chunks[-1].append(span)
                start, room = start + span.length, room - span.length
        last: dict[int, Tensor] = {}
        values = [[0.0] if logprobs else [] for _ in prompts]
        for spans in chunks:
            new = [prompts[row][start : start + n] for row, start, n in spans]
            tokens = torch.tensor([token for tokens in new for token in tokens])
            logits = self.model.forward_packed(tokens, spans, last_only=not logprobs)
            parts = logits.split([span.length for span in spans] if logprobs else 1)
            for (row, start, n), part in zip(spans, parts):
                last[row] = part[-1]
                targets = prompts[row][start + 1 : start + 1 + n]
                if logprobs and targets:
                    targets = torch.tensor(targets, device=part.device)
                    part = part[: len(targets)]
                    values[row] += log_probability(part, targets).tolist()
        return torch.stack([last[row] for row in range(len(prompts))]), values

    @torch.inference_mode()
    def decode(
        self,
        logits: Tensor,
        starts: list[int],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool = False,
    ) -> Iterator[tuple[int, int, float]]:
        """Yield (row, token, its log-probability) as tokens come.

        logits (bsz, vocab) are those after each row's starts tokens. A row that has
        ended leaves the batch.
        """
        room, eos = self.model.params.max_seq_len, self.tokenizer.eos_id
        most = room if max_gen_len is None else max_gen_len
        ends = [min(start + most, room) for start in starts]
        live = [row for row, end in enumerate(ends) if starts[row] < end]
        logits, step, request = logits[live], 0, self.request
        while live:
            if request != self.request:
                raise RuntimeError(
                    "another request has taken the cache: finish one first"
                )
            tokens = self.sample(logits, temperature, top_p)
            values = log_probability(logits, tokens) if logprobs else tokens
            spans = [Span(row, starts[row] + step, 1) for row in live]
            ids, values = (t.to("cpu", non_blocking=True) for t in (tokens, values))
            if ahead := logits.is_cuda:
                # A GPU is given the next step before the host looks at this one, lest it
                # wait; where a row turns out to have ended, its part is for nothing.
                with torch.cuda.device_of(logits):
                    copied = torch.cuda.Event()
                    copied.record()
                if any(starts[row] + step + 1 < ends[row] for row in live):
                    logits = self.model.forward_packed(tokens, spans)
                copied.synchronize()
            ids, values, step = ids.tolist(), values.tolist(), step + 1
            for row, token, value in zip(live, ids, values):
                if token != eos:
                    yield row, token, value
            done = (starts[row] + step == ends[row] for row in live)
            on = [i for i, end in enumerate(done) if not end and ids[i] != eos]
            if not ahead and on:
                logits = self.model.forward_packed(tokens[on], [spans[i] for i in on])
            elif 0 < len(on) < len(live):
                kept = torch.tensor(on).to(logits.device, non_blocking=True)
                logits = logits[kept]
            live = [live[i] for i in on]

    def sample(self, logits: Tensor, temperature: float, top_p: float) -> Tensor:
        if temperature < 1e-6:  # by which logits cannot be divided
            return logits.argmax(dim=-1)
        probs = torch.softmax(logits / temperature, dim=-1)
        return sample_top_p(probs, top_p, self.rng).flatten()

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Complete each prompt as generate() does, by default as far as there is room."""
        tokens = [self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
        options = temperature, top_p, logprobs, echo
        return self.predict(tokens, max_gen_len, *options)

    def predict(
        self, prompt_tokens: list[list[int]], max_gen_len: int | None, *options
    ) -> list[CompletionPrediction]:
        tokens, values = self.generate(prompt_tokens, max_gen_len, *options)
        decode = self.tokenizer.decode
        results = [{"generation": decode(t)} for t in tokens]
        for result, t, logprobs in zip(results, tokens, values or []):
            result |= {"tokens": [decode([x]) for x in t], "logprobs": logprobs}
        return results

    def stream_completion(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
    ) -> Iterator[str]:
        """text_completion's text for one prompt, piece by piece as it comes."""
        tokens = self.tokenizer.encode(prompt, bos=True, eos=False)
        check_request([tokens], self.model.params, temperature, top_p)
        logits, _ = self.prefill([tokens])
        steps = self.decode(logits, [len(tokens)], max_gen_len, temperature, top_p)
        yield from self.tokenizer.decode_stream(token for _, token, _ in steps)

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog, of an Instruct model.

        A dialog that Tokenizer.encode_dialog refuses is answered with the reason, as
        "Error: ...", and the others as if it were not there.
        """
        prompts, answers = {}, {}
        for i, dialog in enumerate(dialogs):
            try:
                prompts[i] = self.tokenizer.encode_dialog(dialog)
            except ValueError as error:
                answers[i] = {"generation": f"Error: {error}"}
                if logprobs:
                    answers[i] |= {"tokens": [], "logprobs": []}
        options = temperature, top_p, logprobs, False
        predictions = self.predict([*prompts.values()], max_gen_len, *options)
        answers |= zip(prompts, predictions)
        for answer in answers.values():
            text = answer["generation"]
            answer["generation"] = {"role": "assistant", "content": text}
        return [answers[i] for i in range(len(dialogs))]


def find_devices(num_gpus: int) -> list[str]:
    """The devices to spread experts over. Raises ValueError where they are too few."""
    if num_gpus not in (0, 1, 2, 4, 8):
        raise ValueError(f"--num-gpus is 0 (the CPU), 1, 2, 4 or 8, not {num_gpus!r}")
    visible = torch.cuda.device_count()
    if num_gpus > visible:
        raise ValueError(
            f"--num-gpus {num_gpus}, but {visible} GPUs are visible: "
            f"ask for fewer, or use the CPU with --num-gpus 0"
        )
    return [f"cuda:{i}" for i in range(num_gpus)] or ["cpu"]


def check_request(
    prompt_tokens: list[list[int]], room: ModelArgs, temperature: float, top_p: float
) -> None:
    """Raise ValueError where prompts do not fit into room's max_batch_size rows of
    max_seq_len tokens, or a sampling parameter has no meaning."""
    rows, length = room.max_batch_size, room.max_seq_len
    if len(prompt_tokens) > rows:
        raise ValueError(f"{len(prompt_tokens)} prompts: raise max_batch_size, {rows}")
    for i, tokens in enumerate(prompt_tokens, 1):
        if not tokens:
            raise ValueError(f"prompt {i} has no tokens: begin it with bos")
        if len(tokens) > length:
            raise ValueError(
                f"prompt {i} has {len(tokens)} tokens, max_seq_len is {length}: "
                f"raise that or shorten the prompt"
            )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is 0 (greedy) or above, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is above 0 and at most 1, not {top_p}")


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    return -F.cross_entropy(logits, tokens, reduction="none")


def sample_top_p(
    probs: Tensor, p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a token for each row, (bsz, 1), from the likeliest that together have p.

    Nucleus sampling (https://arxiv.org/abs/1904.09751) of probs (bsz, vocab). The draw
    is a race of exponential clocks, token i first with probability p_i, for which a
    GPU, unlike for torch.multinomial, is not waited for.
    """
    if p < 1:
        ordered, indices = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered > p
        probs = probs.scatter(-1, indices, ordered.masked_fill(beyond, 0.0))
    clocks = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / clocks).argmax(dim=-1, keepdim=True)
