"""The programs in tests/bench, as far as they need no GPU: that they run, and what they count."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from mixtral import ModelArgs

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "bench"))  # the programs import one another by name
benchmark = importlib.import_module("benchmark")
ceilings = importlib.import_module("ceilings")
contenders = importlib.import_module("contenders")
floors = importlib.import_module("floors")
gpu = importlib.import_module("gpu")


class FakeCeilings(ceilings.Ceilings):
    """A machine whose rates, in bytes and operations per second, are given."""

    rates_to_come: list[float]

    def __init__(self, device: str):
        self.device = device
        self.sheet = None
        self.rates = {"read": []}
        self.bytes = []
        self.ops = []

    def measure(self) -> None:
        rate = self.rates_to_come.pop(0) if self.rates_to_come else 1e10
        self.rates["read"].append(rate)
        self.bytes.append(rate)
        self.ops.append(100 * rate)


def run_benchmark(monkeypatch, rates: list[float], *argv: str):
    """The benchmark after it ran on the CPU with tiny sizes, on a machine of these rates."""
    monkeypatch.setattr(FakeCeilings, "rates_to_come", rates, raising=False)
    monkeypatch.setattr(benchmark, "Ceilings", FakeCeilings)
    tiny = ["--size=demo", "--layers=1", "--num-gpus=0", "--steps=2", "--contexts=4"]
    options = benchmark.make_parser().parse_args([*argv, *tiny])
    program = benchmark.Benchmark(options)
    getattr(program, options.command)()
    assert not program.failures
    return program


def test_old_and_new_run_side_by_side(monkeypatch, tmp_path, capsys):
    file = tmp_path / "results.json"
    argv = [f"--old={ROOT}", "--batches=1,3", "--prompts=5", "--repeats=2", f"--json={file}"]
    program = run_benchmark(monkeypatch, [], *argv)
    old = sys.modules["old_mixtral"]
    assert old.Transformer is not sys.modules["mixtral"].Transformer
    for result in program.results:
        assert [len(seconds) for seconds in result.seconds.values()] == [2, 2]
        assert result.first["old"] == result.first["mixtral"]
        assert set(result.generate) == (
            {"mixtral", "old"} if result.case.kind == "decode" else set()
        )
    saved = json.loads(file.read_text())
    assert [result["case"] for result in saved["results"]] == [
        ["decode", 1, 4],
        ["decode", 3, 4],
        ["prefill", 1, 5],
    ]
    assert "old: 5 of 5 first tokens are mixtral's" in capsys.readouterr().out


def test_rounds_in_which_the_machine_changed_are_left_out(monkeypatch, capsys):
    # Before the first round and after each: the second and the fourth moved, and are made up for.
    rates = [1e10, 1.4e10, 3e10, 3e10, 1.9e10, 2e10]
    program = run_benchmark(monkeypatch, rates, "--batches=", "--prompts=5", "--repeats=3")
    (result,) = program.results
    assert result.rounds == 5
    assert result.left_out == 2
    assert len(result.seconds["mixtral"]) == len(result.floors) == 3
    assert "2 of 5 rounds left out" in capsys.readouterr().out


def test_generate_is_timed_from_the_first_step_on(monkeypatch):
    args = contenders.SIZES["demo"]
    model = contenders.Transformer(args)
    contenders.randomise(model)
    ours = contenders.Ours(model)
    clock = iter(range(100))
    monkeypatch.setattr(contenders.time, "perf_counter", lambda: next(clock))
    passes = []
    forward_packed = model.forward_packed

    def counted(tokens, spans, last_only=False):
        passes.append(contenders.time.perf_counter())
        return forward_packed(tokens, spans, last_only)

    monkeypatch.setattr(model, "forward_packed", counted)
    seconds = ours.seconds_to_generate([[5, 6, 7], [8, 9, 10]], 4)
    # Every pass ticks once, the first of them for the prompts; the timer ticks before the second
    # and after the last one.
    assert passes == [0, 2, 3, 4, 5]
    assert seconds == 6 - 1
    assert model.forward_packed is counted


def test_experts_of_a_step_are_counted(monkeypatch):
    """Two rows, two steps: 3, then 4 experts; on three devices at most 2, then 3 of them."""
    chosen = [[0, 1], [0, 2], [1, 3], [2, 1]]  # of row 0's steps, then of row 1's
    logits = torch.zeros(4, 8)
    for token, experts in enumerate(chosen):
        logits[token, experts] = 1.0

    @contextlib.contextmanager
    def gate_logits(model):
        yield [[logits], [logits]]

    monkeypatch.setattr(contenders, "gate_logits", gate_logits)
    model = contenders.Transformer(contenders.SIZES["demo"])
    ours = contenders.Ours(model)
    monkeypatch.setattr(model, "forward_packed", lambda *args, **options: None)
    monkeypatch.setattr(model, "devices", ["cpu"] * 3)  # of 3, 3 and 2 experts
    # Step 0: row 0 chooses 0 and 1, row 1 chooses 1 and 3. Step 1: 0 and 2, then 2 and 1.
    everywhere, busiest = ours.experts(torch.zeros(2, 2, dtype=torch.long), 0)
    assert everywhere == (3 + 3) / 2
    assert busiest == (2 + 3) / 2


def test_floor_of_the_real_model():
    """One token of 8x7B reads 25.5 GB: 12.75 billion weights, each times 2 operations."""
    used = floors.Used(2, 2)
    case = floors.Case("decode", 1, 1)
    floor = floors.floor_of(case, ModelArgs(), used, 1, 1, 0, False)
    assert floor.bytes == pytest.approx(25.5e9, rel=0.002)
    assert floor.operations == pytest.approx(2 * 12.75e9, rel=0.002)
    assert floor.host_bytes == 0
    on_host = floors.floor_of(case, ModelArgs(), used, 1, 1, 32, False)
    assert on_host.host_bytes == 32 * 2 * 3 * 4096 * 14336 * 2
    assert on_host.bytes + on_host.host_bytes == floor.bytes
    in_8_bits = floors.floor_of(case, ModelArgs(), used, 1, 1, 0, True)
    assert in_8_bits.bytes == pytest.approx(floor.bytes - 32 * 2 * 3 * 4096 * 14336, rel=0.001)


def test_the_processors_features_are_named(monkeypatch):
    flags = {"flags": "fpu avx2 avx512f avx512_bf16 amx_bf16 amx_int8"}
    monkeypatch.setattr(ceilings, "cpuinfo", lambda key: flags[key])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    text = ceilings.processor_features()
    assert text.startswith("AMX bf16 + AMX int8 + AVX-512 bf16 + AVX-512 + AVX2 (")
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE" in text


# gpu.py


def test_the_plan_for_a_gpu():
    parts = gpu.plan(24)
    tests = [part for part in parts if "pytest" in part.command]
    programs = [part for part in parts if "pytest" not in part.command]
    files = [Path(part.command[2]).name for part in tests]
    # What the others are built on comes first, and this file has no test for a GPU.
    assert files[:2] == ["test_kernels.py", "test_compiled_kernels.py"]
    assert {"test_assembled_step.py", "test_card.py"} <= set(files[2:])
    assert Path(__file__).name not in files
    assert all((ROOT / "tests" / file).is_file() for file in files)
    assert gpu.TEST_SECONDS + sum(part.seconds for part in programs) <= 9 * 60
    layers = {}
    for part in programs:
        if "benchmark.py" in part.command[0]:
            options = benchmark.make_parser().parse_args(part.command[1:])
            layers[part.name] = options.layers
            assert benchmark.cases_of(options)
    assert layers == {"decode": 24, "transformers": 8, "int8": 24}


HANGS = """
import time

print("begun")
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_part_that_hangs_shows_what_it_found(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(HANGS)
    part = gpu.Part("hangs", 3, [str(script)], "it sleeps")
    assert gpu.run(part, part.seconds, tmp_path) == 124
    assert (tmp_path / "hangs.txt").read_text() == "begun\ninterrupted\n"
    assert "begun\ninterrupted\n" in capsys.readouterr().out


def test_prompts_of_rounds_differ():
    """A known beginning would not be read again, and that would be measured as speed."""
    firsts = [contenders.draw_prompts(ModelArgs(), 1, 64, seed)[0][:4] for seed in range(5)]
    assert len({tuple(first) for first in firsts}) == 5
