"""Runs example_text_completion.py, in this process or in one of its own."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

RULE = "\n==================================\n\n"
CPU = ("--num-gpus", "0")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def run_here(script: Path, monkeypatch, capfd, *args) -> Outcome:
    """Run the script in this process, because importing PyTorch takes seconds.

    Warnings, which pytest would keep to itself, count as lines of stderr.
    """
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(script), run_name="__main__")
    out, err = capfd.readouterr()
    err += "".join(f"{warning.message}\n" for warning in caught)
    return Outcome(exit.value.code, out, err)


def start(script: Path, *args, shell: str = 'exec "$@"', **env) -> subprocess.Popen:
    """The script as a process of its own, started by a line of Bash."""
    command = [sys.executable, str(script), *map(str, args), *CPU]
    return subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=script.parent,
        # Outputs are buffered, as they are for users.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **env},
    )


def assert_refused(outcome: Outcome, *patterns: str):
    """One line on stderr that matches all patterns, and nothing else."""
    assert (outcome.code, outcome.out) == (1, ""), outcome
    assert outcome.err.startswith("error: "), outcome.err
    assert outcome.err.endswith("\n") and outcome.err.count("\n") == 1, outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err.strip()), outcome.err


def unreadable(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose weights are refused as soon as they are read.

    So a complaint about anything else is made before loading.
    """
    folder = Path(shutil.copytree(checkpoint, tmp_path / "unread"))
    (folder / "consolidated.00.pth").write_bytes(b"not to be opened" * 100)
    return folder
