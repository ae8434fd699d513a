"""All that a GPU should show, in at most nine minutes: python tests/bench/gpu.py [FOLDER]

The parts run in order of importance, each as a process of its own with a time limit, so that one
that fails or hangs does not stop the rest. What they print is shown as it comes, and FOLDER (by
default the current one) receives it as a file for each part. Beside it try_dot_kernels.py
measures whether kernels that are not in use yet are faster.
"""

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from checkout import ROOT
from contenders import SIZES, Ours, draw_prompts, randomise

from mixtral import Transformer

TEST_SECONDS = 180  # for all files of tests together
GPU_TEST = re.compile(r"\bmark\.cuda\b")


class Part(NamedTuple):
    name: str
    seconds: int  # that it may take
    command: list[str]  # what Python runs
    note: str  # what to know while it runs


def plan(n_layers: int) -> list[Part]:
    """The parts for a GPU that has memory for so many layers of 8x7B."""
    benchmark = [str(ROOT / "tests/bench/benchmark.py"), "--size=8x7b", "--num-gpus=1"]
    benchmark += ["--prompts=2048", "--batches=1,4,16"]
    whole = [*benchmark, f"--layers={n_layers}", "--contexts=128,4096"]
    # Beside transformers only a third of the layers, so that both models fit and share weights.
    third = [*benchmark, f"--layers={max(1, n_layers // 3)}", "--contexts=128", "--steps=32"]
    return [
        *test_parts(),
        Part("decode", 110, [*whole, "--json=decode.json"], "the kernels are compiled first"),
        Part(
            "transformers",
            130,
            [*third, "--vs=transformers", "--json=transformers.json"],
            "a third of the layers, the same weights, A B B A",
        ),
        Part(
            "profile",
            40,
            [str(ROOT / "tests/bench/gpu.py"), "--profile", str(n_layers)],
            "the kernels of one decode step",
        ),
        Part("int8", 80, [*whole, "--int8", "--json=int8.json"], "the experts in 8 bits"),
    ]


def test_parts() -> list[Part]:
    """The files with tests that need a GPU, the kernels' first, for all else is built on them.

    Each is a process of its own, so that a file that cannot be imported does not stop the others,
    nor does a recording that fails and leaves PyTorch's random generator unusable.
    """
    files = []
    for path in (ROOT / "tests").glob("test_*.py"):
        if GPU_TEST.search(path.read_text()):
            files.append(path)
    # Single kernels, then what is compiled of them, then all that is built on them.
    files.sort(key=lambda path: (path.stem != "test_kernels", "kernels" not in path.stem, path))
    parts = []
    for path in files:
        command = ["-m", "pytest", str(path), "-m", "cuda", "-v", "--durations=5", "--tb=short"]
        note = "most of the time of the tests, about two minutes, is compiling kernels"
        parts.append(Part(path.stem, TEST_SECONDS, command, note))
    return parts


def run(part: Part, seconds: int, folder: Path) -> int:
    """Run a part for at most this many seconds. Returns its exit code, 124 if it was interrupted.

    An interrupt, unlike other signals, lets pytest show what has failed so far.
    """
    print(f"== {part.name}: at most {seconds} s; {part.note}", flush=True)
    begin = time.monotonic()
    limit = ["timeout", "-s", "INT", "-k", "10", str(seconds)]
    command = [*limit, sys.executable, "-u", *part.command]
    with (folder / f"{part.name}.txt").open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        code = process.wait()
    print(f"== {part.name}: exit code {code}, {time.monotonic() - begin:.0f} s", flush=True)
    return code


def profile(n_layers: int) -> None:
    """Print the kernels of one decode step by the time that they take."""
    args = replace(SIZES["8x7b"], n_layers=n_layers, max_batch_size=1, max_seq_len=256)
    model = Transformer(args, ["cuda:0"])
    randomise(model)
    ours = Ours(model)
    tokens = ours.prefill(draw_prompts(args, 1, 128))
    ours.decode(tokens, 128, 8)
    with torch.profiler.profile() as profiler:
        ours.decode(tokens, 136, 1)
        torch.cuda.synchronize()
    print(profiler.key_averages().table("self_device_time_total", 60, 75, 90))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A shell that runs this in the background has it ignore interrupts, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A layer has 2.91 GB of bf16 weights and, for 16 rows, 0.28 GB of cache.
    free = torch.cuda.mem_get_info()[0] / 1e9
    n_layers = min(32, int((free - 6) / 3.19))
    print(f"{n_layers} layers of 8x7B on {torch.cuda.get_device_name()}", flush=True)
    tests_left = float(TEST_SECONDS)
    codes = {}
    for part in plan(n_layers):
        if "pytest" not in part.command:
            codes[part.name] = run(part, part.seconds, folder)
            continue
        begin = time.monotonic()
        codes[part.name] = run(part, max(20, int(tests_left)), folder)
        tests_left -= time.monotonic() - begin
    print(f"Exit codes: {codes}")


if __name__ == "__main__" and not torch.cuda.is_available():
    sys.exit("tests/bench/gpu.py needs a GPU, and PyTorch finds none")
elif __name__ == "__main__" and "--profile" in sys.argv:
    profile(int(sys.argv[-1]))
elif __name__ == "__main__":
    main(Path([*sys.argv, "."][1]))
