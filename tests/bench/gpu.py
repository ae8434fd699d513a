"""All that a GPU should show, in at most nine minutes: python tests/bench/gpu.py [FOLDER]

The parts run in order of importance, each as a process of its own with a time limit, so
that one that fails or hangs does not stop the rest. FOLDER receives their output.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from benchmark import ROOT, SIZES, Ours, Transformer, draw_prompts, randomise


def profile(layers: int) -> None:
    """Print the kernels of one decode step by the time that they take."""
    args = replace(SIZES["8x7b"], n_layers=layers, max_batch_size=1, max_seq_len=256)
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
    # A layer has 2.91 GB of bf16 weights and, for 16 rows, 0.28 GB of cache.
    layers = min(32, int((torch.cuda.mem_get_info()[0] / 1e9 - 6) / 3.19))
    print(f"{layers} layers of 8x7B on {torch.cuda.get_device_name()}", flush=True)
    run = [ROOT / "tests/bench/benchmark.py", "--size=8x7b", f"--layers={layers}"]
    run += ["--num-gpus=1", "--prompts=2048", "--batches=1,4,16"]
    far, peer = ["--contexts=128,4096"], ["--vs=transformers", "--contexts=128"]
    parts = {  # the seconds that each may take, and what Python runs
        "tests": (170, ["-m", "pytest", ROOT / "tests", "-m", "cuda", "-q"]),
        "decode": (110, [*run, *far, "--json=decode.json"]),
        "transformers": (130, [*run, *peer, "--steps=32", "--json=transformers.json"]),
        "profile": (40, [__file__, "--profile", f"{layers}"]),
        "int8": (80, [*run, *far, "--int8", "--json=int8.json"]),
    }
    begin = time.monotonic()
    for name, (limit, command) in parts.items():
        command = ["timeout", "-k", "1", f"{limit}", sys.executable, "-u", *command]
        with (folder / f"{name}.txt").open("w") as out:
            code = subprocess.call(command, stdout=out, stderr=out, cwd=folder)
        print((folder / f"{name}.txt").read_text())
        print(f"{name}: exit code {code}, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__" and not torch.cuda.is_available():
    sys.exit("tests/bench/gpu.py needs a GPU, and PyTorch finds none")
elif __name__ == "__main__" and "--profile" in sys.argv:
    profile(int(sys.argv[-1]))
elif __name__ == "__main__":
    main(Path([*sys.argv, "."][1]))
