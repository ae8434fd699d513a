"""What the published models take of each card, counted without allocating it."""

import functools
from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixtral import ModelArgs, Transformer

SIZES = {
    "8x7B": {},
    "8x22B": {"dim": 6144, "n_layers": 56, "n_heads": 48, "hidden_dim": 16384},
}
ROOM = {"max_seq_len": 4096, "max_batch_size": 4}


class Storages(TorchDispatchMode):
    """Keeps account of every storage that an operation returns, by device."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                size = tensor.untyped_storage().nbytes()
                self.seen[storage.cdata] = storage, str(tensor.device), size
        return out

    def alive(self) -> Counter:
        """Bytes per device."""
        total = Counter()
        for storage, device, size in self.seen.values():
            if not storage.expired():
                total[device] += size
        return total


class Select(TorchFunctionMode):
    """Has torch.select do x[i], which would switch to x's card, and there may be none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], int):
            return torch.select(args[0], 0, args[1])
        return func(*args, **(kwargs or {}))


@functools.cache
def place(model: str, num_gpus: int) -> tuple[Counter, Counter]:
    """Bytes per card of everything a Transformer keeps, and of its parameters."""
    args = ModelArgs(**SIZES[model], **ROOM)
    with FakeTensorMode(), Select(), Storages() as storages:
        built = Transformer(args, [f"cuda:{i}" for i in range(num_gpus)])
        everything = storages.alive()
    weights = Counter()
    for parameter in built.parameters():
        weights[str(parameter.device)] += parameter.nbytes
    return everything, weights


def expert_bytes(args: ModelArgs) -> int:
    """Of all experts of all layers, in bfloat16."""
    return args.n_layers * args.num_experts * 3 * args.dim * args.hidden_dim * 2


def other_bytes(args: ModelArgs) -> int:
    """Of all other weights, in bfloat16."""
    attention = 2 * (args.n_heads + args.n_kv_heads) * args.head_dim * args.dim
    layer = attention + args.num_experts * args.dim + 2 * args.dim
    return 2 * (args.n_layers * layer + 2 * args.vocab_size * args.dim + args.dim)


def cache_bytes(args: ModelArgs) -> int:
    """Of the keys and values, in bfloat16."""
    positions = args.max_batch_size * args.max_seq_len
    return 2 * 2 * args.n_layers * positions * args.n_kv_heads * args.head_dim


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("model", SIZES)
def test_bytes_per_card(model, num_gpus):
    everything, weights = place(model, num_gpus)
    args = ModelArgs(**SIZES[model], **ROOM)
    cards = [f"cuda:{i}" for i in range(num_gpus)]
    share = expert_bytes(args) // num_gpus

    assert set(everything) <= {*cards, "cpu"}
    assert everything["cpu"] < 1e6
    assert weights["cuda:0"] == share + other_bytes(args)
    # Beside these there are but the rotary factors, 2 MB.
    rest = everything["cuda:0"] - weights["cuda:0"] - cache_bytes(args)
    assert 0 <= rest < 4e6
    for card in cards[1:]:
        assert everything[card] == weights[card] == share


def test_total_size():
    """The published models' sizes: 93.4 GB and 281 GB."""
    assert sum(place("8x7B", 1)[1].values()) == pytest.approx(93.4e9, rel=1e-3)
    assert sum(place("8x22B", 1)[1].values()) == pytest.approx(281e9, rel=2e-3)


@pytest.mark.parametrize("num_gpus, first, others", [(2, 51, 45.1), (4, 29, 22.55)])
def test_8x7b_fits(num_gpus, first, others):
    """On two cards of 80 GB or four of 40 GB; the first has the most to hold."""
    everything, _ = place("8x7B", num_gpus)
    assert everything["cuda:0"] <= first * 1e9
    for i in range(1, num_gpus):
        assert everything[f"cuda:{i}"] == pytest.approx(others * 1e9, rel=1e-3)


def test_cards_hold_their_experts_in_order():
    with FakeTensorMode(), Select():
        model = Transformer(ModelArgs(n_layers=1), [f"cuda:{i}" for i in range(4)])
    for e, expert in enumerate(model.layers[0].feed_forward.experts):
        assert {p.device.index for p in expert.parameters()} == {e // 2}
