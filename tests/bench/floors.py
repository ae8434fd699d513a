"""The least time in which a case can be done: its bytes and operations at the machine's rates."""

from typing import NamedTuple

from mixtral import ModelArgs


class Case(NamedTuple):
    """What is measured: a decode of rows after length tokens each, or their prefill."""

    kind: str  # "decode" or "prefill"
    rows: int
    length: int


class Used(NamedTuple):
    """How many experts of a layer a step uses: in all, and on the device with most of them."""

    everywhere: float
    on_the_busiest: float


class Floor(NamedTuple):
    """What a device, and the host beside it, must move and compute in one run."""

    bytes: float
    operations: float
    host_bytes: float

    def seconds(self, device_bytes: float, device_ops: float, host_bytes: float) -> float:
        """At these rates, all per second: the device's two at once, then the host's."""
        device = max(self.bytes / device_bytes, self.operations / device_ops)
        return device + self.host_bytes / host_bytes


def used_by_chance(args: ModelArgs, tokens: int, n_devices: int) -> Used:
    """How many experts have a token, if each token chooses at random."""
    unused = (1 - args.num_experts_per_tok / args.num_experts) ** tokens
    everywhere = args.num_experts * (1 - unused)
    return Used(everywhere, everywhere / n_devices)


def floor_of(
    case: Case, args: ModelArgs, used: Used, steps: int, n_devices: int, cpu_layers: int, int8: bool
) -> Floor:
    """The least that one run of a case moves and computes; a decode is of so many steps.

    The other devices wait for the one with most of the chosen experts. Logits are wanted after
    each row's last token only.
    """
    if case.kind == "decode":
        passes = steps
        context = case.length + (steps - 1) // 2  # before the middle one of the steps
        new = 1  # tokens of a row in each pass
    else:
        passes = 1
        context = 0
        new = case.length
    tokens = case.rows * new
    # Numbers of weights.
    attention = 2 * args.dim * args.head_dim * (args.n_heads + args.n_kv_heads)
    gate = args.dim * args.num_experts
    norms = 2 * args.dim
    output = args.dim * args.vocab_size
    expert = 3 * args.dim * args.hidden_dim
    expert_bytes = 2 * expert
    if int8:  # a byte per weight, and a scale in bf16 per row of w1, w2 and w3
        expert_bytes = expert + 2 * (2 * args.hidden_dim + args.dim)
    # Numbers that are read or written in bf16, in all but the experts.
    cache = case.rows * (context + new) * 2 * args.n_kv_heads * args.head_dim
    numbers = args.n_layers * (attention + gate + norms + cache) + output
    numbers += args.dim * (1 + tokens)  # the last norm, and the embeddings
    layers_on_devices = args.n_layers - cpu_layers
    experts = layers_on_devices * used.on_the_busiest * expert_bytes
    # Products of two numbers, each with its sum: two operations.
    active = layers_on_devices * args.num_experts_per_tok * expert / n_devices
    products = tokens * (args.n_layers * (attention + gate) + active) + case.rows * output
    pairs = args.n_layers * tokens * (context + (new + 1) / 2)  # of a query and a key
    products += 2 * pairs * args.n_heads * args.head_dim
    return Floor(
        bytes=passes * (2 * numbers + experts),
        operations=passes * 2 * products,
        host_bytes=passes * cpu_layers * used.everywhere * expert_bytes,
    )
