"""example_text_completion.py: what it prints, and how it refuses what cannot work."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mixtral import Mixtral

RULE = "\n==================================\n\n"
CPU = ("--num-gpus", "0")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(script, monkeypatch, capfd):
    """Runs the script in this process, because importing PyTorch takes seconds.

    Warnings, which pytest would keep to itself, count as lines of stderr.
    """

    def run(*args) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as exit:
                runpy.run_path(str(script), run_name="__main__")
        out, err = capfd.readouterr()
        err += "".join(f"{warning.message}\n" for warning in caught)
        return Outcome(exit.value.code, out, err)

    return run


@pytest.fixture
def options(script) -> dict[str, object]:
    """Every option's default."""
    main = runpy.run_path(str(script))["main"]
    names = list(main.__annotations__)[-len(main.__defaults__) :]
    return dict(zip(names, main.__defaults__, strict=True))


@pytest.fixture
def prompts(script) -> list[str]:
    return runpy.run_path(str(script))["PROMPTS"]


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


@pytest.fixture
def unread(checkpoint, tmp_path) -> Path:
    """A checkpoint whose weights are refused as soon as they are read.

    So a complaint about anything else is made before loading.
    """
    folder = Path(shutil.copytree(checkpoint, tmp_path / "unread"))
    (folder / "consolidated.00.pth").write_bytes(b"not to be opened" * 100)
    return folder


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


def test_demo(script, demo, prompts):
    """The README's command."""
    folder = demo.relative_to(script.parent)
    process = start(script, folder, folder / "tokenizer.model")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "Warning" not in err
    *completions, rest = out.split(RULE)
    assert rest == "" and len(completions) == len(prompts)
    for prompt, completion in zip(prompts, completions):
        assert completion.startswith(f"{prompt}\n> ") and completion.endswith("\n")
        assert completion[len(f"{prompt}\n> ") :].strip()


PLAIN = ["Wherefore, behold", "1984", "1e3", "None", "True", "[1, 2]", "{'a': 1}"]
PLAIN += ['"quoted"', "'quoted'", "", " ", "- an item", "-1", "-x", "a=b", "{{text}}"]
PLAIN += ["two\nlines  ", "naïve 🙂 词"]
DASHES = ["--text", "--", "-", "-h", "--help", "--stream", "--prompt=a"]


@pytest.mark.parametrize(
    "prompt, args",
    [(text, ["--prompt", text]) for text in PLAIN]
    + [(text, [f"--prompt={text}"]) for text in PLAIN + DASHES],
)
def test_prompt_is_taken_literally(run, checkpoint, prompt, args):
    paths = checkpoint, checkpoint / "tokenizer.model"
    outcome = run(*args, *paths, "--max-gen-len", "2", *CPU)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{prompt}\n> ")
    assert outcome.out.endswith(f"\n{RULE}")
    assert outcome.out.count(RULE) == 1


@pytest.mark.parametrize("temperature", ["1e20", "1" * 30, "1", ".5", "+1e-30"])
def test_any_temperature(run, checkpoint, temperature):
    """And a prompt that fills the cache to the last position is complete as it is."""
    args = ("--temperature", temperature, "--prompt", "Hello", "--max_seq_len")
    paths = checkpoint, checkpoint / "tokenizer.model"
    assert run(*paths, *args, "3", *CPU).code == 0
    # "Hello" is one piece, and bos stands before it.
    assert run(*paths, *args, "2", *CPU)[:2] == (0, f"Hello\n> \n{RULE}")


def test_file_names_that_are_not_utf8(run, checkpoint, tmp_path):
    path = tmp_path / "\udcff.model"
    shutil.copy(checkpoint / "tokenizer.model", path)
    assert run(checkpoint, path, "--prompt", "Hi", *CPU).code == 0
    assert_refused(run(tmp_path / "\udcfe", path, *CPU), "folder")


@pytest.mark.parametrize(
    "args", ["-h", "--help", "a b c --help", "--prompt -h", "--no --help", "-- -h"]
)
def test_help(run, options, args):
    code, out, err = run(*args.split())
    assert (code, err) == (0, "")
    assert "CKPT_DIR TOKENIZER_PATH" in out
    shown = dict(re.findall(r"^  --(\S+) +(\S+) +\S", out, flags=re.MULTILINE))
    shown = {name.replace("-", "_"): default for name, default in shown.items()}
    assert shown == {name: str(default) for name, default in options.items()}


# What is refused


COMMANDS = {
    "one two --prompt": "--prompt=VALUE",
    "--prompt --stream one two": "--prompt=VALUE",
    "one two --prompt --text": "--prompt=VALUE",
    "one two --prompt -": "--prompt=VALUE",
    "one two --prompt -- text": "--prompt=VALUE",
    "one two --temperature --stream": "--temperature=VALUE",
    "one two --": "no option --:",
    "one two -- --prompt text": "no option --:",
    "one two -": "no option -:",
    "one two -1": "no option -1:",
    "one two -t 1": "no option -t:",
    "one two -prompt=text": "no option -prompt:",
    "one two --temprature 0.5": "no option --temprature:",
    "one two --a=b": "no option --a:",
    "one two --nostream": "no option --nostream:",
    "one two three": "two paths.*one two three$",
    "one two --prompt In 0.5": "two paths.*one two 0.5$",
    "one two --stream True": "two paths.*one two True$",
    "one two --ckpt-dir three": "two paths",
    "one": "two paths.*one$",
    "--tokenizer-path two": "two paths",
    "": "two paths",
    "one two --prompt a --prompt=b": "--prompt is given twice",
    "one two --top-p=1 --top_p 1": "--top_p is given twice",
    "one two --stream=yes": "stream must be True or False",
    "one two --int8 8": "two paths.*one two 8$",
    "one two --experts three": "two paths.*one two three$",
    "one two --experts=three.png": "experts must name .*svg.*'three.png'",
    "one two --experts=": "experts must name .*svg",
    "one two --experts absent/three.svg": "experts must name .*'absent/three.svg'",
    "one two --experts --prompt": "--prompt=VALUE",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_line(run, command):
    """Nothing is looked at before the command makes sense, not even the paths."""
    assert_refused(run(*command.split()), COMMANDS[command])


NO_SIZES = ["0", "-3", "1.5", "1e3", "many", "None", "False", "[1]", "", "1" * 30]
REFUSED = {
    "temperature": ["-1", "-0.001", "nan", "inf", "warm", "True", "[1]", "{{temp}}"],
    "top_p": ["0", "-0.5", "1.0001", "nan", "most", "None"],
    "max_seq_len": NO_SIZES,
    "max_gen_len": NO_SIZES,
    "max_batch_size": NO_SIZES,
    "cpu_layers": ["-1", "1.5", "many", "999", "1" * 30],
    "num_gpus": ["3", "-1", "16", "abc", "0.0", "nan", "None", "[0]", "1" * 30],
}


@pytest.mark.parametrize(
    "option, value",
    [(option, value) for option in REFUSED for value in REFUSED[option]],
)
def test_value_out_of_range(run, unread, option, value):
    cpu = () if option == "num_gpus" else CPU
    typed = f"--{option.replace('_', '-')}={value}"
    outcome = run(unread, unread / "tokenizer.model", *cpu, typed)
    assert_refused(outcome, option.replace("_", "[-_]"), re.escape(value))


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_prompt_that_cannot_be_completed(run, unread, stream):
    args = (unread, unread / "tokenizer.model", *CPU, "--max-seq-len", "3", *stream)
    # Three pieces, with bos four tokens.
    outcome = run(*args, "--prompt", "Hello there you")
    assert_refused(outcome, r"\b4 tokens", "max.seq.len", r"\b3\b")
    assert_refused(run(*args, "--prompt", "a\udcff"), "Unicode", r"'a\\udcff'")


@pytest.mark.parametrize("visible, wanted", [(0, 1), (1, None), (2, 8)])
def test_too_few_gpus(run, unread, monkeypatch, visible, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    args = ("--num-gpus", wanted) if wanted else ()
    outcome = run(unread, unread / "tokenizer.model", *args)
    assert_refused(outcome, rf"\b{wanted or 2}\b", rf"\b{visible} GPU", "CPU")


def test_refusals_of_the_library(run, unread, v3):
    """They arrive as one line; test_checkpoint.py has the rest of them."""
    outcome = run(unread, unread / "tokenizer.model", *CPU)
    assert_refused(outcome, "consolidated.00.pth", "download")
    outcome = run(unread, v3, "--prompt", "梦", *CPU)  # v3's last token
    assert_refused(outcome, r"\b32000\b", r"\b32768\b", "tokenizer")
    assert_refused(run(unread, unread, *CPU), "no tokenizer")
    assert_refused(run(v3.parent / "absent", v3, *CPU), "absent", "folder")


@pytest.mark.parametrize(
    "args, experts",
    [
        ("--experts one two", True),
        ("one two --experts", True),
        ("one --experts --prompt=a.svg two", True),
        ("one two --experts a.svg", "a.svg"),
        ("--experts=./a.svg one two", "./a.svg"),
    ],
)
def test_value_of_experts(script, args, experts):
    script = runpy.run_path(str(script))
    arguments = script["normalize"](args.split())
    (value,) = (a.partition("=")[2] for a in arguments if a.startswith("--experts="))
    assert script["read"]("experts", value) == experts


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


def test_a_picture_that_cannot_be_written(run, checkpoint, monkeypatch, tmp_path):
    """It is noticed before loading."""
    monkeypatch.setattr(Mixtral, "build", None)
    (tmp_path / "folder.svg").mkdir()
    args = ("--prompt", "Hi", "--experts", tmp_path / "folder.svg", *CPU)
    outcome = run(checkpoint, checkpoint / "tokenizer.model", *args)
    assert_refused(outcome, "folder.svg")


def test_arguments_of_build(run, checkpoint, monkeypatch):
    def build(*args, **kwargs):
        raise ValueError(f"{list(kwargs.values())}")

    monkeypatch.setattr(Mixtral, "build", build)
    args = ("--cpu-layers", "3", "--int8", "--max-seq-len", "99", *CPU)
    outcome = run(checkpoint, checkpoint / "tokenizer.model", *args)
    assert_refused(outcome, r"\[99, 4, 0, 3, True\]")


def test_interrupt(script, checkpoint):
    """Ctrl-C ends it quietly, with the code that shells give for it."""
    long = ("--max-seq-len", "200000", "--max-gen-len", "200000", "--temperature", "0")
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
