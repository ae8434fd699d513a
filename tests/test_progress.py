"""The line on a terminal that says how much is loaded."""

import io
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import load, refusal, tensors


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(folders, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    model = load(folders["C"])
    lines = terminal.getvalue().split("\r")[1:]
    assert len(lines) == len(list(model.parameters())) + 1
    assert all("of 0.0 GB, " in line and line.endswith("\033[K") for line in lines[:-1])
    assert lines[-1] == "\033[K"  # the line is empty in the end


def test_the_line_is_empty_before_an_error_is_shown(copy_of, monkeypatch):
    folder = copy_of("C")
    tensors("norm.weight", lambda w1: torch.zeros(32, dtype=w1.dtype))(folder)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert "run of zero bytes" in refusal(folder)
    assert " GB/s, " in terminal.getvalue()  # the norm is the last in the file
    assert terminal.getvalue().endswith("\r\033[K")


def test_no_progress_elsewhere(folders, capsys):
    load(folders["C"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stderr", ["none", "closed", "full"])
def test_progress_never_fails(folders, monkeypatch, stderr):
    stream = None
    if stderr != "none":
        stream = Path("/dev/full").open("w")  # noqa: SIM115 - its end fails, too
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    if stderr == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    load(folders["C"])
    if stderr == "full":
        with pytest.raises(OSError, match="No space left"):
            stream.close()
