"""Prompts in, text out: `Mixtral`, with the methods and results of Llama 2's `Llama`."""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import load_checkpoint, read_eos_ids, read_params
from .devices import check_memory, find_devices
from .model import ModelArgs, Span, Transformer, has_amx, send
from .tokenizer import Dialog, Message, Tokenizer

logger = logging.getLogger(__name__)


class Logprobs(TypedDict, total=False):
    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(Logprobs):
    generation: str


class ChatPrediction(Logprobs):
    generation: Message


class Sampling(NamedTuple):
    """How tokens are drawn, and how many at most for each row."""

    temperature: float
    top_p: float
    max_gen_len: int | None


class Step(NamedTuple):
    """A token of a row, and its log-probability, which is 0 if that is not wanted."""

    row: int
    token: int
    logprob: float


@dataclass
class Row:
    """A row of the cache that is continued until it has `end` tokens."""

    index: int
    length: int
    end: int


class Mixtral:
    """A model and its tokenizer, which complete prompts one request at a time.

    A request from another thread waits until the current one has ended. Within a thread, a new
    request takes the cache from a stream that was left unfinished; continuing that stream then
    raises RuntimeError.
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

        Weights are kept and computed in dtype. On the CPU bfloat16 is best, since it halves the
        bytes to read; float32 reads prompts faster on a processor without bfloat16 instructions.
        The experts of the last cpu_layers layers stay in host memory. If int8, all experts are
        rounded to 8 bits, with a scale for each row.

        Raises FileNotFoundError, ValueError or RuntimeError with a readable message: before any
        weight is read, unless it is the weights themselves that are damaged.
        """
        begin = time.time()
        devices = find_devices(num_gpus)
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(
                f"seed must be a whole number, 0 or more and below 2**63, not {seed!r:.40}"
            )
        if type(int8) is not bool:
            raise ValueError(f"int8 must be True or False, not {int8!r:.40}")
        tokenizer = Tokenizer(tokenizer_path)
        params = read_params(ckpt_dir, max_seq_len, max_batch_size)
        eos_ids = read_eos_ids(ckpt_dir) | tokenizer.eos_ids()
        check_vocabulary(tokenizer_path, tokenizer, params.vocab_size)
        check_memory(params, devices, dtype, cpu_layers, int8)
        model = Transformer(params, devices, dtype, cpu_layers, int8)
        load_checkpoint(model, ckpt_dir)
        generator = Mixtral(model, tokenizer, seed, eos_ids)
        logger.info("Loaded in %.2f seconds", time.time() - begin)
        return generator

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        seed: int = 1,
        eos_ids: Collection[int] = (),
    ):
        """A text ends before the tokenizer's eos, and before any token of eos_ids."""
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = {tokenizer.eos_id, *eos_ids}
        self.rng = torch.Generator(model.device).manual_seed(seed)
        self.owner = CacheOwner()
        self.first_row = FirstRow()
        attach_decoder(model)

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Return each prompt's continuation, and its log-probabilities if asked for, else None.

        With echo, the prompt comes before its continuation. A row ends before a token of stop_ids,
        after max_gen_len tokens if given, or at max_seq_len. The log-probabilities are the model's
        own, before temperature and top_p, and 0 for a prompt's first token. Raises ValueError as
        check_request does, and RuntimeError if the logits are not finite.
        """
        check_request(prompt_tokens, self.model.params, temperature, top_p, max_gen_len)
        sampling = Sampling(temperature, top_p, max_gen_len)
        tokens: list[list[int]] = [[] for _ in prompt_tokens]
        token_logprobs: list[list[float]] = [[] for _ in prompt_tokens]
        for step in self._steps(prompt_tokens, sampling, logprobs, echo):
            tokens[step.row].append(step.token)
            token_logprobs[step.row].append(step.logprob)
        if not logprobs:
            return tokens, None
        return tokens, token_logprobs

    @torch.inference_mode()
    def _steps(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Iterator[Step]:
        """Yield the tokens of all rows as they come; with echo, the prompts' tokens come first."""
        if not prompts:
            return
        request = self.owner.take()
        try:
            logits, token_logprobs = self._prefill(prompts, logprobs and echo)
            if echo:
                for row, prompt in enumerate(prompts):
                    for token, logprob in zip(prompt, token_logprobs[row]):
                        yield Step(row, token, logprob)
            lengths = [len(prompt) for prompt in prompts]
            yield from self._decode(request, logits, lengths, sampling, logprobs)
        finally:
            self.owner.release(request)

    def _prefill(
        self, prompts: list[list[int]], logprobs: bool
    ) -> tuple[Tensor, list[list[float]]]:
        """Read the prompts into the cache.

        Returns the logits (bsz, vocab) after each prompt, and the log-probability of each of
        its tokens, or zeros if these are not wanted.
        """
        last: dict[int, Tensor] = {}  # (vocab,) after what has been read of each row
        token_logprobs = [[0.0] * len(prompt) for prompt in prompts]
        start = 0
        if len(prompts) == 1 and not logprobs:
            start = self.first_row.known_prefix(self.model, prompts[0])
        for spans in passes(prompts, prefill_tokens(self.model.device), start):
            tokens: list[int] = []
            for span in spans:
                tokens += prompts[span.row][span.start : span.start + span.length]
            logits = self._forward(
                torch.tensor(tokens, device="cpu"), spans, last_only=not logprobs
            )
            check_finite(logits.sum().item())
            self.first_row.after_pass(spans, tokens)
            lengths = [1] * len(spans)  # only each span's last token has logits
            if logprobs:
                lengths = [span.length for span in spans]
            for span, part in zip(spans, logits.split(lengths)):
                last[span.row] = part[-1].clone()  # a view would keep the logits of all the pass
                if logprobs:
                    begin = span.start + 1  # logits are about the token after
                    following = prompts[span.row][begin : begin + span.length]
                    token_logprobs[span.row][begin : begin + span.length] = log_probabilities(
                        part[: len(following)], following
                    )
        return torch.stack([last[row] for row in range(len(prompts))]), token_logprobs

    def _decode(
        self, request: int, logits: Tensor, lengths: list[int], sampling: Sampling, logprobs: bool
    ) -> Iterator[Step]:
        """Continue a request's rows of these lengths, given the logits (bsz, vocab) after them.

        A row that has ended leaves the batch. A CPU waits for a step's tokens, then runs the rows
        that go on. A GPU is given the next step first; what it computes for rows that turn out to
        have ended is thrown away.
        """
        rows = unfinished_rows(lengths, sampling.max_gen_len, self.model.params.max_seq_len)
        logits = logits[[row.index for row in rows]]
        while rows:
            # Here logits[i] are those of rows[i].
            tokens = self._sample(logits, sampling)  # (len(rows),)
            # A row's sum tells whether all of its logits are finite.
            on_device = {"tokens": tokens, "sums": logits.sum(dim=-1)}
            if logprobs:
                on_device["logprobs"] = log_probability(logits, tokens)
            wait = start_copies(on_device)
            spans = [Span(row.index, row.length, 1) for row in rows]
            for row in rows:
                row.length += 1
            ran_ahead = logits.is_cuda and any(row.length < row.end for row in rows)
            if ran_ahead:
                self._check_cache(request)
                logits = self._forward(tokens, spans)

            on_host = wait()
            check_finite(sum(on_host["sums"]))
            if ran_ahead:  # the cache has these tokens now, those of ended rows too
                self.first_row.after_pass(spans, on_host["tokens"])
            going_on: list[int] = []  # indices into rows
            for i, (row, token) in enumerate(zip(rows, on_host["tokens"])):
                if token in self.stop_ids:
                    continue
                yield Step(row.index, token, on_host["logprobs"][i] if logprobs else 0.0)
                if row.length < row.end:
                    going_on.append(i)

            if not going_on:
                return
            if not ran_ahead:  # a CPU runs only the rows that go on
                self._check_cache(request)
                spans = [spans[i] for i in going_on]
                logits = self._forward(tokens[going_on], spans)
                self.first_row.after_pass(spans, [on_host["tokens"][i] for i in going_on])
            elif len(going_on) < len(rows):  # a GPU has run all rows: drop those that have ended
                logits = logits[send(torch.tensor(going_on, device="cpu"), logits.device)]
            rows = [rows[i] for i in going_on]

    def _check_cache(self, request: int) -> None:
        """Raise RuntimeError if the cache is no longer this request's."""
        self.owner.check(request)
        if self.model.n_passes != self.first_row.n_passes:
            raise RuntimeError("the model was used between two tokens of this request")

    def _forward(self, tokens: Tensor, spans: list[Span], last_only: bool = False) -> Tensor:
        """model.forward_packed. The caller tells first_row.after_pass the tokens, once known."""
        self.first_row.before_pass(self.model, spans)
        logits = self.model.forward_packed(tokens, spans, last_only=last_only)
        self.first_row.n_passes = self.model.n_passes
        return logits

    def _sample(self, logits: Tensor, sampling: Sampling) -> Tensor:
        if sampling.temperature < 1e-6:  # too small to divide by
            return logits.argmax(dim=-1)
        probs = torch.softmax(logits / float(sampling.temperature), dim=-1)
        return sample_top_p(probs, sampling.top_p, self.rng)

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
        if not isinstance(prompts, (list, tuple)):
            raise ValueError(f"prompts must be a list, not a {type(prompts).__name__}")
        bos = self.tokenizer.add_bos
        tokens = [self.tokenizer.encode(prompt, bos, eos=False) for prompt in prompts]
        return self._predict(tokens, max_gen_len, temperature, top_p, logprobs, echo)

    def _predict(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        tokens, token_logprobs = self.generate(
            prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo
        )
        predictions: list[CompletionPrediction] = []
        for row, ids in enumerate(tokens):
            prediction = CompletionPrediction(generation=self.tokenizer.decode(ids))
            if token_logprobs is not None:
                prediction["tokens"] = [self.tokenizer.decode([token]) for token in ids]
                prediction["logprobs"] = token_logprobs[row]
            predictions.append(prediction)
        return predictions

    def stream_completion(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
    ) -> Iterator[str]:
        """text_completion's text for one prompt, in pieces as they come."""
        tokens = self.tokenizer.encode(prompt, self.tokenizer.add_bos, eos=False)
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
        steps = self._steps([tokens], Sampling(temperature, top_p, max_gen_len))
        return (step.token for step in steps)

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog, from an Instruct model.

        A dialog that is malformed or too long gets the answer "Error: ..." with the reason; the
        others are unaffected.
        """
        if not isinstance(dialogs, (list, tuple)) or is_dialog(dialogs):
            raise ValueError("dialogs must be a list of dialogs, not a single one")
        answers: dict[int, ChatPrediction] = {}
        prompts: dict[int, list[int]] = {}
        for i, dialog in enumerate(dialogs):
            try:
                tokens = self.tokenizer.encode_dialog(dialog)
                check_prompt("the dialog", tokens, self.model.params)
            except ValueError as error:
                refusal = CompletionPrediction(generation=f"Error: {error}")
                if logprobs:
                    refusal["tokens"] = []
                    refusal["logprobs"] = []
                answers[i] = chat_prediction(refusal)
            else:
                prompts[i] = tokens
        predictions = self._predict(
            list(prompts.values()), max_gen_len, temperature, top_p, logprobs
        )
        for i, prediction in zip(prompts, predictions):
            answers[i] = chat_prediction(prediction)
        return [answers[i] for i in range(len(dialogs))]


class FirstRow:
    """The tokens in row 0 of the cache, so that a conversation's next turn reads only what is new.

    tokens[p] is the token at position p. It holds while n_passes is the model's own count: if they
    differ, something else has run the model, and the contents of the row are unknown.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.n_passes = 0

    def known_prefix(self, model: Transformer, prompt: list[int]) -> int:
        """The number of tokens at the prompt's start that need not be read again.

        Its last token is not among them, since the logits after it are wanted.
        """
        if model.n_passes != self.n_passes:
            return 0
        length = 0
        for known, token in zip(self.tokens, prompt[:-1]):
            if known != token:
                break
            length += 1
        return length

    def before_pass(self, model: Transformer, spans: list[Span]) -> None:
        """Forget what the pass will overwrite, or everything if something else ran the model."""
        if model.n_passes != self.n_passes:
            self.tokens.clear()
        for span in spans:
            if span.row == 0:
                del self.tokens[span.start :]

    def after_pass(self, spans: list[Span], tokens: list[int]) -> None:
        """Remember what a pass has written to row 0. Only its first span can be of that row."""
        first = spans[0]
        if first.row == 0 and first.start == len(self.tokens):
            self.tokens += tokens[: first.length]


class CacheOwner:
    """The request that the cache belongs to, from its prompt to its last token."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.request = 0
        self.thread: threading.Thread | None = None

    def take(self) -> int:
        """Wait until no other thread has a request under way, begin one, and return its number."""
        with self.changed:
            me = threading.current_thread()
            while self.thread not in (None, me) and self.thread.is_alive():
                self.changed.wait(timeout=1)  # a thread that dies notifies nobody
            self.request += 1
            self.thread = me
            return self.request

    def check(self, request: int) -> None:
        """Raise RuntimeError if another request has taken the cache."""
        with self.changed:
            if request != self.request:
                raise RuntimeError("another request has taken the cache: this one cannot go on")
            self.thread = threading.current_thread()  # a stream may go on in another

    def release(self, request: int) -> None:
        with self.changed:
            if request == self.request:
                self.thread = None
                self.changed.notify()


def attach_decoder(model: Transformer) -> None:
    """On GPUs, give the model its fast decode step (see decode.py), before the first prompt.

    If that fails, the reason is logged, and decoding runs in plain PyTorch.
    """
    if model.device.type != "cuda" or model.decoder is not None:
        return
    try:
        from .decode import Decoder  # imports Triton

        model.decoder = Decoder(model)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        why = str(error).partition("\n")[0]
        logger.warning("decoding without fast kernels, slower: %s", why)


def prefill_tokens(device: torch.device) -> int:
    """The most prompt tokens that one pass reads.

    That is enough to keep matrix units busy, and few enough to bound the memory for activations.
    On an Intel Xeon with AMX, a model of 790 M parameters reads 1.07 times as fast in passes of
    2048 tokens as of 1024; two layers of 8x7B read 481, 697 and 696 tokens per second in passes
    of 512, 1024 and 2048.
    """
    return 2048 if device.type == "cuda" or has_amx() else 512


def check_vocabulary(tokenizer_path: str | Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer cannot belong to a checkpoint with this vocabulary."""
    n_words = tokenizer.n_words
    if n_words > vocab_size == tokenizer.sp_model.vocab_size():
        # Some fine-tunes add a token for padding, which the model never sees.
        logger.warning(
            "%s names tokens that the model does not have, %d of them: they cannot be used",
            tokenizer_path,
            n_words - vocab_size,
        )
        return
    # Some checkpoints round the number of their tokens up to a multiple of 64 or 128.
    if not 0 <= vocab_size - n_words < 128:
        raise ValueError(
            f"{tokenizer_path} has {n_words} tokens, the checkpoint {vocab_size}: "
            "use the checkpoint's own tokenizer"
        )
    if vocab_size > n_words and vocab_size % 64:
        logger.warning(
            "the last %d tokens have no name: is added_tokens.json missing beside %s?",
            vocab_size - n_words,
            tokenizer_path,
        )


def check_request(
    prompt_tokens: list[list[int]],
    args: ModelArgs,
    temperature: float = 0,
    top_p: float = 1,
    max_gen_len: int | None = None,
) -> None:
    """Raise ValueError unless the prompts fit into the cache and the options make sense."""
    if not isinstance(prompt_tokens, (list, tuple)):
        raise ValueError(f"prompts must be a list, not a {type(prompt_tokens).__name__}")
    count = len(prompt_tokens)
    if count > args.max_batch_size:
        raise ValueError(f"{count} prompts: raise max_batch_size, which is {args.max_batch_size}")
    for i, tokens in enumerate(prompt_tokens, 1):
        check_prompt(f"prompt {i}", tokens, args)
    if type(temperature) not in (int, float) or not 0 <= temperature < 1e300:
        raise ValueError(f"temperature must be 0 (greedy) or above, not {temperature!r}")
    if type(top_p) not in (int, float) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p!r}")
    if max_gen_len is not None and (type(max_gen_len) is not int or max_gen_len < 0):
        raise ValueError(f"max_gen_len must be a whole number, 0 or more, not {max_gen_len!r}")


def check_prompt(name: str, tokens: list[int], args: ModelArgs) -> None:
    if not isinstance(tokens, (list, tuple)):
        raise ValueError(f"{name} must be a list of token ids, not a {type(tokens).__name__}")
    if not tokens:
        raise ValueError(f"{name} has no tokens: give it at least one, such as bos")
    if len(tokens) > args.max_seq_len:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, max_seq_len is {args.max_seq_len}: "
            "raise max_seq_len or shorten the prompt"
        )
    for token in tokens:
        if type(token) is not int or not 0 <= token < args.vocab_size:
            raise ValueError(f"{name}: {str(token)!r:.40} is not a token id of this vocabulary")


def is_dialog(messages: Sequence) -> bool:
    return bool(messages) and all(isinstance(message, dict) for message in messages)


def chat_prediction(prediction: CompletionPrediction) -> ChatPrediction:
    """The same prediction, its text as a message of the assistant."""
    message = Message(role="assistant", content=prediction["generation"])
    answer = ChatPrediction(generation=message)
    if "tokens" in prediction:
        answer["tokens"] = prediction["tokens"]
        answer["logprobs"] = prediction["logprobs"]
    return answer


def passes(prompts: list[list[int]], size: int, start: int = 0) -> Iterator[list[Span]]:
    """Lay the prompts, each from token `start` on, end to end in passes of `size` tokens."""
    spans: list[Span] = []
    room = size
    for row, prompt in enumerate(prompts):
        position = start
        while position < len(prompt):
            length = min(len(prompt) - position, room)
            spans.append(Span(row, position, length))
            position += length
            room -= length
            if room == 0:
                yield spans
                spans = []
                room = size
    if spans:
        yield spans


def unfinished_rows(lengths: list[int], max_gen_len: int | None, max_seq_len: int) -> list[Row]:
    """The rows that have room for another token."""
    rows: list[Row] = []
    for i, length in enumerate(lengths):
        end = max_seq_len
        if max_gen_len is not None:
            end = min(length + max_gen_len, max_seq_len)
        if length < end:
            rows.append(Row(i, length, end))
    return rows


def start_copies(tensors: dict[str, Tensor]) -> Callable[[], dict[str, list]]:
    """Start to copy tensors of one device to the host; the returned function waits for them."""
    copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    device = next(iter(tensors.values())).device
    copied = None
    if device.type == "cuda":
        copied = torch.cuda.current_stream(device).record_event()

    def wait() -> dict[str, list]:
        if copied is not None:
            copied.synchronize()
        return {name: copy.tolist() for name, copy in copies.items()}

    return wait


def check_finite(total: float) -> None:
    if not math.isfinite(total):
        raise RuntimeError(
            "the logits are not finite: the weights are damaged, or too large for float16"
        )


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each row's token (bsz,), given its logits (bsz, vocab)."""
    return -F.cross_entropy(logits, tokens, reduction="none")


def log_probabilities(logits: Tensor, tokens: list[int]) -> list[float]:
    """log_probability of tokens that are on the host."""
    targets = torch.tensor(tokens, dtype=torch.long, device="cpu")
    return log_probability(logits, targets.to(logits.device)).tolist()


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Draw a token for each row, (bsz,), from the likeliest tokens, as many as it takes to reach p.

    Nucleus sampling (https://arxiv.org/abs/1904.09751) from probs (bsz, vocab). Each token has an
    exponential clock of rate probs[i], and the first one to ring is drawn. Unlike
    torch.multinomial this does not make the host wait for a GPU.
    """
    if p < 1:
        ordered, indices = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered > p
        probs = probs.scatter(-1, indices, ordered.masked_fill(beyond, 0.0))
    clocks = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / clocks).argmax(dim=-1)
