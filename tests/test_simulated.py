"""The simulated devices compute what the CPU does, and notice what a GPU would."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from simulated.cuda import active, simulated_cuda
from torch import nn

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
OUT, IN = ("cuda:0", "cpu", 16), ("cpu", "cuda:0", 16)
COUNTED = [  # what is done with a on the device and c on the host, waits, copies
    (lambda a, c: (a[0].item(), int(a[1]), bool(a[2] > 0)), 3, []),
    (lambda a, c: (a.tolist(), c.copy_(a)), 2, [OUT, OUT]),
    (lambda a, c: (a.cpu(), a.to("cpu", non_blocking=True)), 1, [OUT, OUT]),
    (lambda a, c: a.to("cuda:1"), 0, [("cuda:0", "cuda:1", 16)]),
    (lambda a, c: (a.to("cuda"), a.half()), 0, []),
    (lambda a, c: (a.nonzero(), torch.where(a > 0)), 2, []),
    (lambda a, c: a.__setitem__(a > 0, a[a > 0]), 2, []),
    (lambda a, c: (a.copy_(c), a[torch.tensor([0, 1])]), 0, [IN, IN]),
    (lambda a, c: (a.unique(), a.long().bincount()), 2, []),
    (lambda a, c: a.repeat_interleave(a.int()), 1, []),
    (lambda a, c: (F.one_hot(a.long(), 2), F.one_hot(a.long())), 1, []),
]


def mixture(device: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = nn.Parameter(torch.ones(2, 16, 16, device=device)[1], requires_grad=False)
    weight.copy_(torch.linspace(-1, 1, 256).view(16, 16))
    q = F.rms_norm(F.linear(x, weight), (16,)).view(1, 6, 2, 8).transpose(1, 2)
    h = F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], enable_gqa=True)
    share, chosen = (h := h.transpose(1, 2).reshape(6, 16)).mean(-1).topk(3)
    h.index_add_(0, chosen, F.silu(x[chosen]) * share[:, None])[h > 2] = 0.5
    return weight, h, x.softmax(-1).multinomial(2, generator=torch.Generator(device))


@MODES
def test_values_are_those_of_the_cpu(mode) -> None:
    x = torch.randn(6, 16)
    with mode(), simulated_cuda(2) as sim:
        found = mixture("cuda:1", x.to("cuda:1"))
        assert {str(t.device) for t in found} == set(sim.launches) == {"cuda:1"}
        for ours, theirs in zip(found, mixture("cpu", x), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@MODES
def test_what_a_gpu_would_notice(mode) -> None:
    for act, waits, copies in COUNTED:
        with simulated_cuda(2) as sim, mode():
            act(torch.ones(4, device="cuda"), torch.ones(4))
            assert (len(sim.syncs), sim.copies) == (waits, copies)


@MODES
def test_devices_do_not_mix(mode) -> None:
    with simulated_cuda(2), mode():
        a, b, c = (torch.ones(4, device=d) for d in ("cuda:0", "cuda:1", "cpu"))
        for mix in (lambda: a + b, lambda: a @ c, lambda: c[a.long()]):
            with pytest.raises(RuntimeError, match="one device in .*cuda:0"):
                mix()
        assert (a + torch.tensor(2.0)).device == a.device  # a scalar may come along


def test_memory_is_that_of_live_storages() -> None:
    with simulated_cuda(2, memory=1000) as sim:
        rows = [nn.Parameter(r, False) for r in torch.empty(4, 8, device="cuda:1")]
        assert torch.cuda.mem_get_info(1) == (1000 - 128, 1000) and not sim.launches
        del rows[1:]
        assert sim.bytes("cuda:1") == 128  # one view keeps it all
        assert rows[0].zero_().view(2, 4).is_cuda and sim.launches == {"cuda:1": 1}
        rows.clear()
        assert not sim.bytes("cuda:1")


@contextlib.contextmanager
def recorded(graph, pool=None) -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(pool)
        yield
        graph.capture_end()


def test_a_graph_repeats_what_it_recorded() -> None:
    with torch.inference_mode(), simulated_cuda(2) as sim:
        x, graph = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
        with recorded(graph):
            twice = x + x
            lost = twice.inner  # is no longer used when its memory is given away
            square = (twice := twice * twice) + 0
            del twice
            total = square.sum() + x
        x.fill_(3)
        graph.replay()
        assert total.tolist() == [75, 75] and lost.isnan().all()
        assert sim.replays == ["cuda:0"]
        del x
        with pytest.raises(RuntimeError, match="freed"):
            graph.replay()


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda a: a.tolist(), "the host waits|a copy to cpu"),
        (lambda a: a.nonzero(), "the host waits"),
        (lambda a: torch.empty(2, device="cuda:1"), "another device is recorded"),
        (lambda a: torch.cuda.CUDAGraph().capture_begin(), "one at a time"),
        (lambda a: torch.cuda.synchronize(), "the host waits"),
    ],
)
def test_what_a_recording_refuses(act, message) -> None:
    with torch.inference_mode(), simulated_cuda(2):
        a = torch.ones(2, device="cuda")
        with (
            pytest.raises(RuntimeError, match=message),
            recorded(torch.cuda.CUDAGraph()),
        ):
            act(a)


def test_streams_are_ordered_by_nothing_but_waits() -> None:
    found = set()
    with torch.inference_mode(), simulated_cuda(2) as sim:
        for seed in range(40):
            a, b = (torch.zeros(1, device=f"cuda:{i}") for i in range(2))
            graph = torch.cuda.CUDAGraph()
            with recorded(graph):
                a.add_(1)
            sim.schedule(seed, ("destination", 0) if seed % 2 else None)
            graph.replay()
            b.copy_(a)
            found.add((seed % 2, b.item()))
    assert found == {(0, 2), (1, 0), (1, 2)}


def test_nothing_stays_patched() -> None:
    before = vars(torch.cuda).copy(), dict(vars(torch.Tensor)), torch.Generator
    with pytest.raises(ZeroDivisionError), simulated_cuda(2):
        torch.ones(2, device="cuda") * (1 // 0)
    assert before == (vars(torch.cuda), vars(torch.Tensor), torch.Generator)
    assert not torch._C._only_lift_cpu_tensors() and not active
