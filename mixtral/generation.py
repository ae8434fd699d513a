"""Prompts in, text out: `Mixtral`, with the methods and results of Llama 2's `Llama`."""

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import load_checkpoint, read_params
from .devices import check_memory, find_devices
from .model import ModelArgs, Span, Transformer
from .tokenizer import Tokenizer

report = logging.getLogger(__name__).info

# Prompts are read in passes of at most so many tokens: enough to keep matrix units busy
# and few enough to bound the memory for activations.
PREFILL_TOKENS = {"cuda": 2048, "cpu": 512}


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


Dialog = Sequence[Message]


class Logprobs(TypedDict, total=False):
    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(Logprobs):
    generation: str


class ChatPrediction(Logprobs):
    generation: Message


class Mixtral:
    """A model and its tokenizer, which complete prompts one request at a time.

    A request of another thread waits until the one before has ended. Within a thread, a
    new request takes over from a stream that was left unfinished, which then raises
    RuntimeError if it is continued.
    """

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path,
        max_seq_len: int,
        max_batch_size: int,
        num_gpus: int = 2,
        seed: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        cpu_layers: int = 0,
        int8: bool = False,
    ) -> "Mixtral":
        """Load a checkpoint onto num_gpus GPUs, or for the CPU if that is 0.

        Weights are kept and computed in dtype. On the CPU bfloat16 is best, since it
        halves the bytes to read; float32 reads prompts faster on a processor without
        bfloat16 instructions. The experts of the last cpu_layers layers stay in host
        memory. If int8, all experts are rounded to 8 bits, with a scale for each row.

        Raises FileNotFoundError, ValueError or RuntimeError with a message for a
        person before any weight is read.
        """
        start_time, devices = time.time(), find_devices(num_gpus)
        good = type(seed) is int and 0 <= seed < 2**63
        require(good, f"seed must be a whole number from 0 to 2**63, not {seed!r:.40}")
        require(type(int8) is bool, f"int8 must be True or False, not {int8!r:.40}")
        tokenizer = Tokenizer(tokenizer_path)
        params = read_params(ckpt_dir, max_seq_len, max_batch_size)
        if params.vocab_size != tokenizer.n_words:
            sizes = f"{tokenizer.n_words} tokens, the checkpoint {params.vocab_size}"
            raise ValueError(f"{tokenizer_path} has {sizes}: use the one beside it")
        check_memory(params, devices, dtype, cpu_layers, int8)
        model = Transformer(params, devices, dtype, cpu_layers, int8)
        load_checkpoint(model, ckpt_dir)
        generator = Mixtral(model, tokenizer, seed)
        report(f"Loaded in {time.time() - start_time:.2f} seconds")
        return generator

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1):
        self.model = model
        self.tokenizer = tokenizer
        self.rng = torch.Generator(model.device).manual_seed(seed)
        self.cache = CacheOwner()
        model.prepare(report)

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
        log-probabilities are the model's own, before temperature and top_p, and 0 for
        a prompt's first token. Raises ValueError as check_request does, and
        RuntimeError if the logits are not finite.
        """
        check_request(prompt_tokens, self.model.params, temperature, top_p, max_gen_len)
        new = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len}
        tokens: list[list[int]] = [[] for _ in prompt_tokens]
        values: list[list[float]] = [[] for _ in prompt_tokens]
        steps = self._steps(prompt_tokens, logprobs=logprobs, echo=echo, **new)
        for row, token, value in steps:
            tokens[row].append(token)
            values[row].append(value)
        return tokens, values if logprobs else None

    @torch.inference_mode()
    def _steps(
        self,
        prompts: list[list[int]],
        logprobs: bool = False,
        echo: bool = False,
        **options: Any,
    ) -> Iterator[tuple[int, int, float]]:
        """Yield (row, token, if logprobs its log-probability) as tokens come."""
        if not prompts:
            return
        request = self.cache.take()
        try:
            logits, values = self._prefill(prompts, logprobs and echo)
            old = (
                (row, token, value)
                for row, prompt in enumerate(prompts if echo else [])
                for token, value in zip(prompt, values[row] or prompt)
            )
            new = self._decode(logits, list(map(len, prompts)), logprobs, **options)
            for step in chain(old, new):
                yield step
                self.cache.keep(request)
        finally:
            self.cache.leave(request)

    def _prefill(
        self, prompts: list[list[int]], logprobs: bool
    ) -> tuple[Tensor, list[list[float]]]:
        """Read the prompts into the cache: the logits (bsz, vocab) after each of them.

        If logprobs, also each prompt's own log-probabilities, else empty lists.
        """
        last: dict[int, Tensor] = {}
        values = [[0.0] if logprobs else [] for _ in prompts]
        for spans in passes(prompts, PREFILL_TOKENS[self.model.device.type]):
            new = [prompts[s.row][s.start : s.start + s.length] for s in spans]
            tokens = torch.tensor([token for part in new for token in part])
            logits = self.model.forward_packed(tokens, spans, last_only=not logprobs)
            check_finite(logits.sum().item())
            parts = logits.split([s.length for s in spans] if logprobs else 1)
            for (row, start, length), part in zip(spans, parts):
                last[row] = part[-1]
                if logprobs:  # those of the tokens that follow the span's
                    after = prompts[row][start + 1 : start + 1 + length]
                    targets = torch.tensor(after, dtype=torch.long).to(part.device)
                    values[row] += log_probability(part[: len(after)], targets).tolist()
        return torch.stack([last[row] for row in range(len(prompts))]), values

    def _decode(
        self,
        logits: Tensor,
        lengths: list[int],
        logprobs: bool,
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[int, int, float]]:
        """Continue rows of these lengths, given the logits (bsz, vocab) after them.

        A row that has ended leaves the batch. On a GPU the next step is launched before
        the host reads this one's tokens; work for rows that have just ended is
        discarded.
        """
        room, eos = self.model.params.max_seq_len, self.tokenizer.eos_id
        most = room if max_gen_len is None else max_gen_len
        ends = [min(length + most, room) for length in lengths]
        rows = [row for row, end in enumerate(ends) if lengths[row] < end]
        logits = logits[rows]
        while rows:
            tokens, sums = self._sample(logits, temperature, top_p), logits.sum(dim=-1)
            values = log_probability(logits, tokens) if logprobs else sums
            copies = [x.to("cpu", non_blocking=True) for x in (tokens, values, sums)]
            if logits.is_cuda:
                copied = torch.cuda.current_stream(logits.device).record_event()
            spans = [Span(row, lengths[row], 1) for row in rows]
            more = [lengths[row] + 1 < ends[row] for row in rows]
            if ahead := logits.is_cuda and any(more):
                logits = self.model.forward_packed(tokens, spans)
            if logits.is_cuda:
                copied.synchronize()
            ids, values, sums = (copy.tolist() for copy in copies)
            check_finite(sum(sums))
            for row, token, value in zip(rows, ids, values):
                if token != eos:
                    yield row, token, value
            kept = [i for i, token in enumerate(ids) if more[i] and token != eos]
            rows, spans = [rows[i] for i in kept], [spans[i] for i in kept]
            lengths = [length + 1 for length in lengths]
            if rows and not ahead:
                logits = self.model.forward_packed(tokens[kept], spans)
            elif 0 < len(kept) < len(ids):
                logits = logits[torch.tensor(kept).to(logits.device, non_blocking=True)]

    def _sample(self, logits: Tensor, temperature: float, top_p: float) -> Tensor:
        if temperature < 1e-6:  # too small to divide by
            return logits.argmax(dim=-1)
        probs = torch.softmax(logits / float(temperature), dim=-1)
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
        good = isinstance(prompts, (list, tuple))
        require(good, f"prompts must be a list, not a {type(prompts).__name__}")
        new = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len}
        tokens = [self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
        return self._predict(tokens, logprobs=logprobs, echo=echo, **new)

    def _predict(
        self, prompt_tokens: list[list[int]], **options: Any
    ) -> list[CompletionPrediction]:
        tokens, values = self.generate(prompt_tokens, **options)
        decode = self.tokenizer.decode
        results = [CompletionPrediction(generation=decode(t)) for t in tokens]
        for result, ids, logprobs in zip(results, tokens, values or []):
            result.update(tokens=[decode([i]) for i in ids], logprobs=logprobs)
        return results

    def stream_completion(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
    ) -> Iterator[str]:
        """text_completion's text for one prompt, in pieces as they come."""
        tokens = self.tokenizer.encode(prompt, bos=True, eos=False)
        new = self.stream_tokens(tokens, temperature, top_p, max_gen_len)
        return self.tokenizer.decode_stream(new)

    def stream_tokens(
        self,
        tokens: list[int],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
    ) -> Iterator[int]:
        """generate's tokens for one prompt, as they come."""
        check_request([tokens], self.model.params, temperature, top_p, max_gen_len)
        new = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len}
        return (token for _, token, _ in self._steps([tokens], **new))

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog, from an Instruct model.

        A dialog that is malformed or too long gets the answer "Error: ..." with the
        reason; the others are unaffected.
        """
        good = isinstance(dialogs, (list, tuple))
        good = good and not (dialogs and all(isinstance(d, dict) for d in dialogs))
        require(good, "dialogs must be a list of dialogs, not a single one")
        new = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len}
        prompts, answers = {}, {}
        for i, dialog in enumerate(dialogs):
            try:
                prompts[i] = self.tokenizer.encode_dialog(dialog)
                check_request([prompts[i]], self.model.params)
            except ValueError as error:
                prompts.pop(i, None)
                answers[i] = CompletionPrediction(generation=f"Error: {error}")
                if logprobs:
                    answers[i].update(tokens=[], logprobs=[])
        predictions = self._predict(list(prompts.values()), logprobs=logprobs, **new)
        answers.update(zip(prompts, predictions))
        for answer in answers.values():
            text = answer["generation"]
            answer["generation"] = Message(role="assistant", content=text)
        return [answers[i] for i in range(len(dialogs))]


class CacheOwner:
    """The request that the cache belongs to, from its prompt to its last token."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.request, self.thread = 0, None

    def take(self) -> int:
        """Begin a request, once no other thread's is under way: its number."""
        with self.changed:
            me = threading.current_thread()
            while self.thread not in (None, me) and self.thread.is_alive():
                self.changed.wait(timeout=1)
            self.request, self.thread = self.request + 1, me
            return self.request

    def keep(self, request: int) -> None:
        with self.changed:
            if request != self.request:
                raise RuntimeError("another request has the cache: finish one first")
            self.thread = threading.current_thread()  # a stream may move to another

    def leave(self, request: int) -> None:
        with self.changed:
            if request == self.request:
                self.thread = None
                self.changed.notify()


def require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def check_request(
    prompt_tokens: list[list[int]],
    room: ModelArgs,
    temperature: float = 0,
    top_p: float = 1,
    max_gen_len: int | None = None,
) -> None:
    """Raise ValueError unless the prompts fit into room's max_batch_size rows of
    max_seq_len tokens and all other arguments make sense."""
    rows, length = room.max_batch_size, room.max_seq_len
    good = isinstance(prompt_tokens, (list, tuple))
    require(good, f"prompts must be a list, not a {type(prompt_tokens).__name__}")
    count = len(prompt_tokens)
    require(count <= rows, f"{count} prompts: raise max_batch_size, which is {rows}")
    for i, tokens in enumerate(prompt_tokens, 1):
        good = isinstance(tokens, (list, tuple))
        kind = type(tokens).__name__
        require(good, f"prompt {i} must be a list of token ids, not of type {kind}")
        require(len(tokens) > 0, f"prompt {i} has no tokens: begin it with bos")
        long = f"prompt {i} has {len(tokens)} tokens, max_seq_len is {length}: raise it"
        require(len(tokens) <= length, f"{long} or shorten the prompt")
        for token in tokens:
            good = type(token) is int and 0 <= token < room.vocab_size
            what = f"{str(token)!r:.40} is no token id of this vocabulary"
            require(good, f"prompt {i}: {what}")
    good = type(temperature) in (int, float) and 0 <= temperature < 1e300
    require(good, f"temperature must be 0 (greedy) or above, not {temperature!r}")
    good = type(top_p) in (int, float) and 0 < top_p <= 1
    require(good, f"top_p must be above 0 and at most 1, not {top_p!r}")
    good = max_gen_len is None or (type(max_gen_len) is int and max_gen_len >= 0)
    require(good, f"max_gen_len must be a whole number, 0 or more, not {max_gen_len!r}")


def passes(prompts: list[list[int]], size: int) -> Iterator[list[Span]]:
    """The prompts, laid end to end, as the spans of passes of size tokens."""
    firsts = list(accumulate(map(len, prompts), initial=0))
    for begin in range(0, firsts[-1], size):
        ends = [min(begin + size, end) for end in firsts[1:]]
        starts = [max(begin, first) for first in firsts]
        cuts = [(row, starts[row], end) for row, end in enumerate(ends)]
        yield [Span(row, a - firsts[row], b - a) for row, a, b in cuts if a < b]


def check_finite(total: float) -> None:
    if not math.isfinite(total):
        raise RuntimeError("the logits are not finite: the weights are damaged")


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    return -F.cross_entropy(logits, tokens, reduction="none")


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token for each row, (bsz, 1), from the likeliest that together have p.

    Nucleus sampling (https://arxiv.org/abs/1904.09751) from probs (bsz, vocab). The
    draw is a race of exponential clocks, which token i wins with probability p_i.
    Unlike torch.multinomial it does not make the host wait for a GPU.
    """
    if p < 1:
        ordered, indices = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered > p
        probs = probs.scatter(-1, indices, ordered.masked_fill(beyond, 0.0))
    clocks = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / clocks).argmax(dim=-1, keepdim=True)
