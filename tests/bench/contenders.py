"""This code as a contender in the benchmark: random models, and what is done with them.

The package is an argument, so that an older checkout can run beside this one.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from checkout import ROOT  # noqa: F401 - first, since it makes mixtral importable
from torch import Tensor, nn

import mixtral
from mixtral import ModelArgs, Transformer
from mixtral.model import deal
from mixtral.routing import gate_logits

SIZES = {
    "demo": ModelArgs(160, 4, 32, 240, 6, 2, vocab_size=2048),
    "mid": ModelArgs(1024, 8, 128, 3584, 8, 2, vocab_size=32000),
    "8x7b": ModelArgs(),
}


@torch.inference_mode()
def randomise(model: nn.Module) -> None:
    """Weights that keep activations, and the gates' logits, at about unit size."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.int8:
            parameter.random_(-127, 128)
        else:
            parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
        if parameter.dim() == 1:
            parameter.add_(1)
    for name, scale in model.named_buffers():
        if name.endswith(".scale"):  # uniform integers deviate by 127 / sqrt(3)
            weight = model.get_parameter(name.removesuffix("scale") + "weight")
            scale.fill_(3**0.5 / 127 * weight.shape[-1] ** -0.5)


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """The state dict in bf16: 8-bit weights are multiplied by their scales."""
    scales = dict(model.named_buffers())
    state = {}
    for name, weight in model.state_dict().items():
        if weight.dtype == torch.int8:
            scale = scales[name.removesuffix("weight") + "scale"].view(-1, 1)
            weight = (weight * scale).bfloat16()
        state[name] = weight
    return state


def draw_prompts(args: ModelArgs, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    # A CPU generator uses only 32 bits of its seed.
    generator = torch.Generator().manual_seed(1_000_003 * seed + length)
    drawn = torch.randint(3, args.vocab_size, (rows, length), generator=generator)
    return drawn.tolist()


@torch.inference_mode()
def rebuild(package: ModuleType, model: Transformer, **options: Any) -> Any:
    """The package's own Transformer with the sizes, the devices and the weights of model."""
    known = {field.name for field in fields(package.ModelArgs)}
    sizes = {name: value for name, value in asdict(model.params).items() if name in known}
    other = package.Transformer(package.ModelArgs(**sizes), model.devices, **options)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, parameter in other.named_parameters():
        parameter.copy_(weights[name])
    for name, buffer in other.named_buffers():
        if name.endswith(".scale"):
            buffer.copy_(weights[name])
    return other


class Ours:
    """A package's Mixtral through its public methods."""

    def __init__(self, model: Transformer, package: ModuleType = mixtral):
        self.model = model
        self.args = model.params
        self.span = package.model.Span
        no_end = SimpleNamespace(eos_id=-1)  # every row runs to max_gen_len
        self.generate = package.Mixtral(model, no_end).generate

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """The first token after each prompt."""
        tokens, _ = self.generate(prompts, 1, 0)
        return torch.tensor(tokens).flatten()

    def decode(self, tokens: Tensor, start: int, steps: int) -> Tensor:
        """The tokens given to each step, (steps, batch), the first of them tokens."""
        tokens = tokens.to(self.model.device)
        given = []
        for position in range(start, start + steps):
            given.append(tokens)
            spans = [self.span(row, position, 1) for row in range(len(tokens))]
            tokens = self.model.forward_packed(tokens, spans).argmax(-1)
        return torch.stack(given)

    def seconds_to_generate(self, prompts: list[list[int]], steps: int) -> float:
        """The time that generate takes for this many steps, once the prompts are read.

        Unlike decode, it includes sampling and the host's wait for each token.
        """
        begins = []
        forward_packed = self.model.forward_packed

        def noting(tokens: Tensor, spans: Sequence, *args: Any, **options: Any) -> Tensor:
            if spans[0].start == len(prompts[0]):  # the first step after the prompts
                begins.append(time.perf_counter())
            return forward_packed(tokens, spans, *args, **options)

        with mock.patch.object(self.model, "forward_packed", noting):
            self.generate(prompts, steps + 1, 0)  # the first token comes from the prompts' logits
            return time.perf_counter() - begins[0]

    def experts(self, given: Tensor, start: int) -> tuple[float, float]:
        """How many experts of a layer a step used: in all, and on the device with most."""
        steps, rows = given.shape
        spans = [self.span(row, start, steps) for row in range(rows)]
        n_experts = self.args.num_experts
        shares = deal(n_experts, len(self.model.devices))
        with gate_logits(self.model) as logits_by_layer:
            self.model.forward_packed(given.T.flatten(), spans, last_only=True)
        everywhere = []
        on_the_busiest = []
        for (logits,) in logits_by_layer:  # (rows * steps, experts), of the only pass
            chosen = logits.topk(self.args.num_experts_per_tok).indices
            used = F.one_hot(chosen, n_experts).sum(1).view(rows, steps, -1).any(0)
            by_device = [part.sum(1) for part in used.split(shares, dim=1)]  # each (steps,)
            everywhere.append(used.sum(1).float().mean().item())
            on_the_busiest.append(torch.stack(by_device).amax(0).float().mean().item())
        n_layers = len(everywhere)
        return sum(everywhere) / n_layers, sum(on_the_busiest) / n_layers
