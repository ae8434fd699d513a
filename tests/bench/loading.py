"""How long a checkpoint takes to load, in each layout that Mixtral was published in."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import peers
import torch
from checkout import ROOT
from measuring import figures, peak_of, ratios, seconds_of

from mixtral import ModelArgs, Transformer
from mixtral.checkpoint import load_checkpoint, read_params

UNITS = {"peak": " GB", "kept": " GB"}  # all else is seconds


@dataclass
class Loaded:
    """The figures of a layout, by their names: cat, load, peak, kept, first, second."""

    layout: str
    figures: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        times = figures(ratios(self.figures["load"], self.figures["cat"]), "x")
        parts = []
        for name, values in self.figures.items():
            parts.append(f"{name} {figures(values, UNITS.get(name, ' s'))}")
        return f"layout {self.layout}: {times} cat's time; {', '.join(parts)}"


def empty_model(
    args: ModelArgs, devices: Sequence[str], options: argparse.Namespace
) -> Transformer:
    return Transformer(args, devices, cpu_layers=options.cpu_layers, int8=options.int8)


def time_layout(layout: str, model: Transformer, options: argparse.Namespace) -> Loaded:
    """Write the model in this layout, and load it in fresh processes, each beside cat."""
    from helpers.layouts import write  # imports transformers

    command = [sys.executable, str(ROOT / "tests/bench/benchmark.py"), "load_once"]
    command += [f"--num-gpus={options.num_gpus}", f"--cpu-layers={options.cpu_layers}"]
    if options.int8:
        command.append("--int8")
    loaded = Loaded(layout)
    with tempfile.TemporaryDirectory() as folder:
        with peers.uninitialised():
            write(Path(folder), layout, model.params, model.state_dict())
        cat = partial(subprocess.run, f"cat {folder}/* >/dev/null", shell=True, check=True)
        cat()  # from here on all of it is in the page cache
        for _ in range(options.repeats):
            run = {"cat": seconds_of(cat)}
            run |= json.loads(subprocess.check_output([*command, f"--folder={folder}"]))
            for name, value in run.items():
                loaded.figures.setdefault(name, []).append(value)
    return loaded


def load_once(devices: Sequence[str], options: argparse.Namespace) -> dict[str, float]:
    """Load a folder: the seconds, the GB of host memory, and the seconds of two passes after it."""
    models = []

    def work() -> None:
        params = read_params(options.folder, 64, 1)
        models.append(empty_model(params, devices, options))
        load_checkpoint(models[0], options.folder)

    peak = peak_of(work, "cpu")
    tokens = torch.arange(8)[None]
    return {
        "load": peak.seconds,
        "peak": peak.peak,
        "kept": peak.kept,
        "first": seconds_of(lambda: models[0](tokens)),
        "second": seconds_of(lambda: models[0](tokens)),
    }
