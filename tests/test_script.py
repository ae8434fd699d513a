"""example_text_completion.py: what it prints, and how it ends."""

import functools
import io
import re
import runpy
import shlex
import signal
import sys
import time
from xml.etree import ElementTree

import pytest
from helpers.script import CPU, RULE, assert_refused, run_here, start

from mixtral import Mixtral


@pytest.fixture
def run(script, monkeypatch, capfd):
    return functools.partial(run_here, script, monkeypatch, capfd)


@pytest.fixture
def prompts(script) -> list[str]:
    return runpy.run_path(str(script))["PROMPTS"]


# What it prints


@pytest.mark.parametrize("batch", ["4", "1"])
@pytest.mark.parametrize("stream", [(), ("--stream",), ("--stream=True",)])
def test_stdout(run, checkpoint, prompts, stream, batch):
    """The prompts, their completions and rules between them, and nothing else.

    A stream has one prompt at a time and so needs room for one only.
    """
    paths = checkpoint, checkpoint / "tokenizer.model"
    args = ("--temperature", "0", "--max-gen-len", "5", "--max-batch-size", batch)
    outcome = run(*paths, *args, *stream, *CPU)
    assert len(prompts) == 4
    if batch == "1" and not stream:
        assert_refused(outcome, r"\b4 prompts", "max.batch.size")
        return
    generator = Mixtral.build(*paths, max_seq_len=128, max_batch_size=4, num_gpus=0)
    together = [[prompt] for prompt in prompts] if stream else [prompts]
    assert outcome.code == 0, outcome.err
    assert outcome.out == "".join(
        f"{prompt}\n> {result['generation']}\n{RULE}"
        for some in together
        for prompt, result in zip(
            some, generator.text_completion(some, temperature=0, max_gen_len=5)
        )
    )


def test_experts(run, checkpoint, monkeypatch, tmp_path):
    """In the terminal, in a picture, or both: those of the prompt and of its completion."""
    paths = checkpoint, checkpoint / "tokenizer.model"
    args = (*paths, "--prompt", "Hi", "--temperature", "0", "--max-gen-len", "5", *CPU)
    plain = run(*args).out
    picture = tmp_path / "a.svg"
    assert run(*args, "--experts-svg", picture).out == plain
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    for stream in ("--stream=False", "--stream"):
        shown = run(*args, "--experts", stream).out
        assert shown.startswith(plain.removesuffix(f"\n{RULE}")) and shown.endswith(RULE)
        assert re.findall("Layer (.):", shown) == ["0", "1"]
    completion = plain.removeprefix("Hi\n> ").removesuffix(f"\n{RULE}")
    assert f"Hi {completion}" in "".join(root.itertext())  # a completion loses its first space


def test_readme(script):
    """Its first command prints exactly what stands under it."""
    readme = (script.parent / "README.md").read_text(encoding="utf-8")
    command = re.search(r"&& python example_text_completion.py (.*)", readme)[1]
    printed = re.search(r"prints this.*?```\n(.*?)```", readme, re.DOTALL)[1]
    process = start(script, *shlex.split(command.replace("--num-gpus 0", "")))  # start adds it
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert re.fullmatch(r"Loaded in .* seconds\n", err)
    assert out == printed


def test_demo(script, demo, prompts):
    """Without a prompt, those of the script are completed."""
    folder = demo.relative_to(script.parent)
    process = start(script, folder, folder / "tokenizer.model")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "Warning" not in err
    assert re.search(r"^warning: .*\b165 would", err, flags=re.MULTILINE)  # 101 tokens and 64
    *completions, rest = out.split(RULE)
    assert rest == "" and len(completions) == len(prompts)
    for prompt, completion in zip(prompts, completions):
        assert completion.startswith(f"{prompt}\n> ") and completion.endswith("\n")
        assert completion[len(f"{prompt}\n> ") :].strip()


# How it ends


@pytest.mark.parametrize(
    "error, code, err",
    [
        (KeyboardInterrupt(), 130, "\n"),
        (RuntimeError("two\nlines"), 1, "error: two lines\n"),
    ],
)
def test_end_while_loading(run, checkpoint, monkeypatch, error, code, err):
    def build(*args, **kwargs):
        raise error

    monkeypatch.setattr(Mixtral, "build", build)
    outcome = run(checkpoint, checkpoint / "tokenizer.model", *CPU)
    assert outcome == (code, "", err)


class NotebookOutput:
    """Standard output in a notebook: text goes to the page; there is no file beneath it."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@pytest.mark.parametrize("args, code", [((), 0), (("--top-p", "2"), 1), (("--help",), 0)])
def test_notebook(run, checkpoint, monkeypatch, args, code):
    paths = checkpoint, checkpoint / "tokenizer.model"
    args += ("--prompt", "é", "--max-gen-len", "3", "--temperature", "0", *CPU)
    want = run(*paths, *args)
    page = NotebookOutput()
    monkeypatch.setattr(sys, "stdout", page)
    assert run(*paths, *args)[:2] == (code, "")
    assert (want.code, want.out) == (code, page.text)


def test_interrupt(script, checkpoint):
    """Ctrl-C ends it quietly, with the code that shells give for it."""
    long = ("--max-seq-len", "200000", "--max-gen-len", "190000", "--temperature", "0")
    # A program started by one that ignores the signal would ignore it as well.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(script, checkpoint, checkpoint / "tokenizer.model", *long)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert "Loaded" in process.stderr.readline()
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out.strip() == "" and "Traceback" not in err


@pytest.mark.parametrize(
    "shell, code, printed",
    [
        ('"$@" --prompt é', 0, "\\xe9\n> "),  # to a terminal that has no é
        ('"$@" --prompt é 2>&-', 0, "\\xe9\n> "),
        ('"$@" --prompt é 2> >(exit)', 0, "\\xe9\n> "),
        ('"$@" --prompt é >&-', 0, ""),
        ('"$@" --prompt é >&- 2>&-', 0, ""),
        ('"$@" --prompt é | exit; exit ${PIPESTATUS[0]}', 0, ""),
        ('"$@" --stream | head -n 1; exit ${PIPESTATUS[0]}', 0, "Mistral.ai is"),
        ('"$@" -h | exit; exit ${PIPESTATUS[0]}', 0, ""),
        ('"$@" --prompt é >/dev/full', 1, ""),
        ('"$@" --prompt 2>&-', 1, ""),
        ('"$@" --prompt 2> >(exit)', 1, ""),
    ],
)
def test_closed_outputs(script, checkpoint, shell, code, printed):
    args = (script, checkpoint, checkpoint / "tokenizer.model", "--max-gen-len", "5")
    process = start(*args, shell=shell, PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert out.startswith(printed) and bool(out) == bool(printed)
    assert re.fullmatch(r"((Load|error: ).*\n)*", err), err
