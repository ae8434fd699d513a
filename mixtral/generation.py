"""Prompts in, text out: the class `Mixtral`, with the methods, arguments and results of Llama 2's `Llama`."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_memory, load_checkpoint, read_params
from .model import Span, Transformer
from .tokenizer import Tokenizer

PREFILL_TOKENS = 2048  # in one forward: enough to keep a card's matrix units busy, and a bound on activation memory


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
    tokens: list[str]  # with logprobs only
    logprobs: list[float]  # with logprobs only


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
        """Load a checkpoint onto num_gpus GPUs, or the CPU for 0.

        Raises FileNotFoundError, ValueError or RuntimeError with a message for a person, wherever possible before
        a weight is read.
        """
        start_time = time.time()
        devices = find_devices(num_gpus)
        tokenizer = Tokenizer(tokenizer_path)
        params = read_params(ckpt_dir, max_seq_len, max_batch_size)
        if params.vocab_size != tokenizer.n_words:
            raise ValueError(
                f"the checkpoint has a vocabulary of {params.vocab_size} and the tokenizer one of {tokenizer.n_words}: "
                f"{tokenizer_path} is not the tokenizer of {ckpt_dir}"
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

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Each prompt's continuation, after the prompt itself with echo, and the log-probability of each token.

        A row ends at eos, which is not part of it, after max_gen_len tokens, or at max_seq_len. Log-probabilities
        are the model's own, before temperature and top_p; the first token of a prompt has 0.
        """
        check_request(prompt_tokens, self.model.params, temperature, top_p)
        if not prompt_tokens:
            return [], [] if logprobs else None
        logits, prompt_logprobs = self.prefill(prompt_tokens, logprobs and echo)
        tokens = [list(prompt) if echo else [] for prompt in prompt_tokens]
        lengths = [len(prompt) for prompt in prompt_tokens]
        for row, token, logprob in self.decode(
            logits, lengths, max_gen_len, temperature, top_p, logprobs
        ):
            tokens[row].append(token)
            prompt_logprobs[row].append(logprob)
        return tokens, prompt_logprobs if logprobs else None

    @torch.inference_mode()
    def prefill(
        self, prompts: list[list[int]], logprobs: bool = False
    ) -> tuple[Tensor, list[list[float]]]:
        """Fill the cache with the prompts; the logits (bsz, vocab) after each, and with logprobs its own, else []."""
        last: list[Tensor] = [torch.empty(0)] * len(prompts)
        values: list[list[float]] = [[0.0] if logprobs else [] for _ in prompts]
        done = [0] * len(prompts)
        while any(done[row] < len(prompt) for row, prompt in enumerate(prompts)):
            spans, room = [], PREFILL_TOKENS
            for row, prompt in enumerate(prompts):
                length = min(room, len(prompt) - done[row])
                if length:
                    spans.append(Span(row, done[row], length))
                    done[row] += length
                    room -= length
            tokens = torch.tensor(
                [
                    t
                    for row, start, length in spans
                    for t in prompts[row][start : start + length]
                ]
            )
            logits = self.model.forward_packed(tokens, spans, last_only=not logprobs)
            for (row, start, length), part in zip(
                spans, logits.split([s.length for s in spans] if logprobs else 1)
            ):
                last[row] = part[-1]
                if logprobs:
                    targets = torch.tensor(
                        prompts[row][start + 1 : start + length + 1],
                        device=part.device,
                        dtype=torch.long,
                    )
                    values[row] += (
                        -F.cross_entropy(
                            part[: len(targets)], targets, reduction="none"
                        )
                    ).tolist()
        return torch.stack(last), values

    @torch.inference_mode()
    def decode(
        self,
        logits: Tensor,
        starts: list[int],
        max_gen_len: int,
        temperature: float,
        top_p: float,
        logprobs: bool = False,
    ) -> Iterator[tuple[int, int, float]]:
        """Yield (row, token, its log-probability) as tokens come.

        logits (bsz, vocab) are those after each row's starts tokens. A row that has
        ended leaves the batch.
        """
        room, eos = self.model.params.max_seq_len, self.tokenizer.eos_id
        ends = [min(start + max_gen_len, room) for start in starts]
        live = [row for row, end in enumerate(ends) if starts[row] < end]
        logits, step = logits[live], 0
        while live:
            tokens = self.sample(logits, temperature, top_p)
            values = (
                -F.cross_entropy(logits, tokens, reduction="none")
                if logprobs
                else tokens
            )
            spans = [Span(row, starts[row] + step, 1) for row in live]
            ids, values = (t.to("cpu", non_blocking=True) for t in (tokens, values))
            if ahead := logits.is_cuda:
                # A GPU is given the next step before the host looks at this one, lest it
                # wait; where a row turns out to have ended, that row of it is for nothing.
                copied = torch.cuda.Event()
                copied.record()
                logits = self.model.forward_packed(tokens, spans)
                copied.synchronize()
            ids, values, step = ids.tolist(), values.tolist(), step + 1
            for row, token, value in zip(live, ids, values):
                if token != eos:
                    yield row, token, value
            on = [
                i
                for i, row in enumerate(live)
                if ids[i] != eos and starts[row] + step < ends[row]
            ]
            if not ahead and on:
                logits = self.model.forward_packed(tokens[on], [spans[i] for i in on])
            elif len(on) < len(live):
                logits = logits[on]
            live = [live[i] for i in on]

    def sample(self, logits: Tensor, temperature: float, top_p: float) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        return sample_top_p(
            torch.softmax(logits / temperature, dim=-1), top_p, self.rng
        ).flatten()

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Complete each prompt; with max_gen_len None as far as max_seq_len. See generate()."""
        prompt_tokens = [self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
        return self.predict(
            prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo
        )

    def predict(
        self, prompt_tokens: list[list[int]], max_gen_len: int | None, *options
    ) -> list[CompletionPrediction]:
        if max_gen_len is None:
            max_gen_len = self.model.params.max_seq_len - 1
        tokens, values = self.generate(prompt_tokens, max_gen_len, *options)
        texts = [self.tokenizer.decode(t) for t in tokens]
        if values is None:
            return [{"generation": text} for text in texts]
        return [
            {
                "generation": text,
                "tokens": [self.tokenizer.decode([x]) for x in t],
                "logprobs": v,
            }
            for text, t, v in zip(texts, tokens, values)
        ]

    def stream_completion(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
    ) -> Iterator[str]:
        """The text that text_completion would give for one prompt, piece by piece as it comes."""
        if max_gen_len is None:
            max_gen_len = self.model.params.max_seq_len - 1
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
        answers |= zip(
            prompts, self.predict([*prompts.values()], max_gen_len, *options)
        )
        return [
            {
                **answers[i],
                "generation": {
                    "role": "assistant",
                    "content": answers[i]["generation"],
                },
            }
            for i in range(len(dialogs))
        ]


def find_devices(num_gpus: int) -> list[str]:
    """The devices to spread experts over. Raises ValueError where there are not as many GPUs."""
    if num_gpus not in (0, 1, 2, 4, 8):
        raise ValueError(f"--num-gpus is 0 (the CPU), 1, 2, 4 or 8, not {num_gpus}")
    visible = torch.cuda.device_count()
    if num_gpus > visible:
        raise ValueError(
            f"--num-gpus {num_gpus}, but {visible} GPUs are visible: ask for fewer, or 0 to use the CPU"
        )
    return [f"cuda:{i}" for i in range(num_gpus)] or ["cpu"]


def check_request(
    prompt_tokens: list[list[int]], params, temperature: float, top_p: float
) -> None:
    """Raise ValueError where prompts do not fit the cache, or a sampling parameter has no meaning.

    params is anything with max_batch_size and max_seq_len.
    """
    if len(prompt_tokens) > params.max_batch_size:
        raise ValueError(
            f"{len(prompt_tokens)} prompts are more than max_batch_size, {params.max_batch_size}: raise it"
        )
    for i, tokens in enumerate(prompt_tokens, 1):
        if not tokens:
            raise ValueError(f"prompt {i} has no tokens: begin it with bos")
        if len(tokens) > params.max_seq_len:
            raise ValueError(
                f"prompt {i} is {len(tokens)} tokens long, over max_seq_len, {params.max_seq_len}: raise it or shorten"
            )
    if not temperature >= 0:
        raise ValueError(f"temperature is 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is above 0 and at most 1, not {top_p}")


def sample_top_p(
    probs: Tensor, p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token a row, (bsz, 1), from the fewest likeliest ones whose probabilities (bsz, vocab) add up to p.

    Nucleus sampling: Holtzman et al., https://arxiv.org/abs/1904.09751. The draw is an exponential race, which
    unlike torch.multinomial never makes the host wait for a GPU: the least E_i / p_i is token i with probability p_i.
    """
    if p < 1:
        ordered, indices = probs.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered > p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, indices, ordered)
    race = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / race).argmax(dim=-1, keepdim=True)
