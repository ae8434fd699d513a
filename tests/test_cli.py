"""The command line: how options are read, and how it refuses what cannot work."""

import functools
import inspect
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.script import CPU, RULE, assert_refused, run_here, unreadable

from mixtral import Mixtral, Tokenizer


@pytest.fixture
def run(script, monkeypatch, capfd):
    return functools.partial(run_here, script, monkeypatch, capfd)


@pytest.fixture
def options(script) -> dict[str, object]:
    """Every option's default."""
    parameters = inspect.signature(runpy.run_path(str(script))["main"]).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    del defaults["ckpt_dir"], defaults["tokenizer_path"]
    return defaults


@pytest.fixture
def unread(checkpoint, tmp_path) -> Path:
    return unreadable(checkpoint, tmp_path)


# How options are read


PLAIN = ["Wherefore, behold", "1984", "1e3", "None", "True", "[1, 2]", "{'a': 1}"]
PLAIN += ['"quoted"', "'quoted'", "", " ", "- an item", "-1", "-x", "a=b", "{{text}}"]
PLAIN += ["two\nlines  ", "naïve 🙂 词"]
DASHES = ["--text", "--", "-h", "--help", "--stream", "--prompt=a"]


@pytest.mark.parametrize(
    "prompt, args",
    [(text, ["--prompt", text]) for text in [*PLAIN, "-h"]]
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


def test_prompt_from_standard_input(run, checkpoint, monkeypatch):
    """It may be longer than an argument, 128 KiB. The newline at its end does not count."""
    text = "two\nlines "
    paths = checkpoint, checkpoint / "tokenizer.model"
    args = (*paths, "--max-gen-len", "2", "--temperature", "0", *CPU)
    want = run(*args, "--prompt", text)
    for typed in (["--prompt", "-"], ["--prompt=-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n"))
        assert run(*args, *typed).out == want.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("é " * 2**17))
    assert_refused(run(*args, "--prompt", "-"), r"\b\d{6} tokens", "max.seq.len")
    windows = io.TextIOWrapper(io.BytesIO(b"two\r\nlines \r\n"), newline="\n")
    monkeypatch.setattr(sys, "stdin", windows)
    assert run(*args, "--prompt", "-").out == want.out
    for chat in ("--chat", "--chat=False"):
        latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", latin)
        assert_refused(run(*args, "--prompt", "-", chat), "Unicode", r"caf\\udce9")
    monkeypatch.setattr(sys, "stdin", None)  # closed when Python started
    assert_refused(run(*args, "--prompt", "-"), "standard input is closed")
    assert_refused(run(*args, "--chat"), "standard input is closed")


def test_home_folder(run, checkpoint, monkeypatch, tmp_path):
    """No shell replaces the ~ of --ckpt-dir=~/x, nor of a line in a notebook."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(checkpoint, tmp_path / "model")
    args = ("--tokenizer-path=~/model/tokenizer.model", "--experts-svg", "~/picture.svg")
    outcome = run("~/model", *args, "--prompt", "~", *CPU)
    assert outcome.code == 0 and outcome.out.startswith("~\n> ")
    assert (tmp_path / "picture.svg").read_text().startswith("<svg")


def test_seed(run, checkpoint, monkeypatch):
    """Without it, every run draws the same."""
    args = (checkpoint, checkpoint / "tokenizer.model", "--prompt", "Hi", *CPU)
    args += ("--temperature", "1", "--max-gen-len", "9")
    generator = Mixtral.build(*args[:2], 128, 1, num_gpus=0, seed=2**62)
    (result,) = generator.text_completion(["Hi"], temperature=1, max_gen_len=9)
    drawn = run(*args, "--seed", 2**62).out
    assert drawn == f"Hi\n> {result['generation']}\n{RULE}"
    assert run(*args).out == run(*args, "--seed=1").out != drawn


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(run, checkpoint, monkeypatch, dtype):
    def build(*args, **kwargs):
        raise ValueError(f"{args[6]}")

    monkeypatch.setattr(Mixtral, "build", build)
    outcome = run(checkpoint, checkpoint / "tokenizer.model", "--dtype", dtype, *CPU)
    assert_refused(outcome, f"^error: torch.{dtype}$")


def test_arguments_of_build(run, checkpoint, monkeypatch):
    given = []

    def build(*args, **kwargs):
        given.append(inspect.signature(real).bind(*args, **kwargs).arguments)
        raise ValueError("enough")

    real = Mixtral.build
    monkeypatch.setattr(Mixtral, "build", build)
    args = ("--cpu-layers", "3", "--int8", "--max-seq-len", "299", "--seed", "5", *CPU)
    paths = str(checkpoint), str(checkpoint / "tokenizer.model")
    assert_refused(run(*paths, *args), "enough")
    sizes = {"max_seq_len": 299, "max_batch_size": 4, "num_gpus": 0, "seed": 5}
    kinds = {"dtype": torch.bfloat16, "cpu_layers": 3, "int8": True}
    assert given == [dict(zip(("ckpt_dir", "tokenizer_path"), paths)) | sizes | kinds]


@pytest.mark.parametrize(
    "args, rows",
    [("", 4), ("--prompt a", 1), ("--stream", 1), ("--chat --prompt a", 1), ("--chat", 1)],
)
def test_rows_of_the_cache(run, checkpoint, monkeypatch, args, rows):
    """As many as prompts are completed together: a row of 32,768 tokens of 8x7B takes 4.3 GB."""

    def build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, *args):
        raise ValueError(f"{max_batch_size} rows")

    monkeypatch.setattr(Mixtral, "build", build)
    args = ("--max-batch-size", "9", *args.split(), *CPU)
    outcome = run(checkpoint, checkpoint / "tokenizer.model", *args)
    assert_refused(outcome, f"error: {rows} rows")


def test_quick_answers_import_no_pytorch(script):
    """Importing it takes seconds, and fire a fraction of one."""
    code = """if True:
        import runpy, sys
        sys.argv = ["script", *sys.argv[2:]]
        try:
            runpy.run_path(%r, run_name="__main__")
        finally:
            assert not {"torch", "fire"} & sys.modules.keys(), "slow"
    """
    command = [sys.executable, "-c", code % str(script), "script"]
    for args, code in (["--help"], 0), (["one"], 1), (["one", "two", "--promt", "a"], 1):
        ended = subprocess.run([*command, *args], capture_output=True, cwd=script.parent)
        assert ended.returncode == code and b"slow" not in ended.stderr, ended.stderr


def test_pytorch_without_numpy(script):
    """Its complaint about that is not shown."""
    code = "import sys; sys.modules['numpy'] = None; from mixtral import *; Mixtral.build"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=script.parent)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_file_names_that_are_not_utf8(run, checkpoint, tmp_path):
    path = tmp_path / "\udcff.model"
    shutil.copy(checkpoint / "tokenizer.model", path)
    assert run(checkpoint, path, "--prompt", "Hi", *CPU).code == 0
    assert_refused(run(tmp_path / "\udcfe", path, *CPU), "folder")


@pytest.mark.parametrize(
    "args",
    ["-h", "--help", "a b --stream -h", "--prompt --help", "--no --help", "-- -h", "prompt -h"],
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
    "one two --prompt -- text": "--prompt=VALUE",
    "one two --temperature -": "temperature must be a number, not '-'",
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
    "one two --ckpt-dir three": "two paths.*three one two$",
    "one": "two paths.*one$",
    "--tokenizer-path two": "two paths.*not two$",
    "": "two paths",
    "one two --prompt a --prompt=b": "--prompt is given twice",
    "one two --top-p=1 --top_p 1": "--top_p is given twice",
    "one two --stream=yes": "stream must be True or False",
    "one two --int8 8": "two paths.*one two 8$",
    "one two --experts three": "two paths.*one two three$",
    "one two --experts=a.svg": "experts must be True or False",
    "one two --experts-svg": "--experts-svg=VALUE",
    "one two --experts-svg --stream": "--experts-svg=VALUE",
    "one two --prompt a --experts-svg=three.png": "experts_svg must name .*svg.*'three.png'",
    "one two --prompt a --experts-svg=": "experts_svg must name .*svg",
    "one two --prompt a --experts-svg absent/three.svg": "experts_svg .*'absent/three.svg'",
    "one two --experts-svg three.svg": "experts_svg draws a single text.*--prompt",
    "one two --chat --prompt a --experts-svg three.svg": "experts_svg.*chat",
    "one two --dtype int8": "dtype must be one of bfloat16, float16, float32, not 'int8'",
    "one two --dtype=": "dtype must be",
    "one two --chat=yes": "chat must be True or False",
    "one --tokenizer-path=": "two paths",
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
    "seed": ["-1", "1.5", "many", "None", str(2**63), "1" * 30],
    "cpu_layers": ["-1", "1.5", "many", "999", "1" * 30],
    "num_gpus": ["-1", "16", "abc", "0.0", "nan", "None", "[0]", "1" * 30],
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


def test_a_picture_that_cannot_be_written(run, checkpoint, monkeypatch, tmp_path):
    """It is noticed before loading."""
    monkeypatch.setattr(Mixtral, "build", None)
    (tmp_path / "folder.svg").mkdir()
    os.mkfifo(tmp_path / "pipe.svg")  # opening it would wait for a reader
    (tmp_path / "locked.svg").touch()
    locked = (str(tmp_path), str(tmp_path / "locked.svg"))  # To root they would be open.
    monkeypatch.setattr(os, "access", lambda path, mode: path not in locked)
    for name in ("folder.svg", "pipe.svg", "locked.svg", "new.svg"):
        args = ("--prompt", "Hi", "--experts-svg", tmp_path / name, *CPU)
        outcome = run(checkpoint, checkpoint / "tokenizer.model", *args)
        assert_refused(outcome, name if name != "new.svg" else re.escape(str(tmp_path)))


def test_a_refused_run_leaves_no_picture(run, unread, tmp_path):
    picture = tmp_path / "new.svg"
    args = ("--prompt", "Hi", "--experts-svg", picture, *CPU)
    assert_refused(run(unread, unread / "tokenizer.model", *args), "consolidated")
    assert not picture.exists()


# What is said before it starts


@pytest.mark.parametrize("chat", [(), ("--chat",)])
@pytest.mark.parametrize("spare, said", [(0, ""), (-1, "fits"), (-9, "cut")])
def test_a_completion_that_max_seq_len_cuts(run, checkpoint, v1, chat, spare, said):
    """A line says so, with the value that would hold all; and that value does."""
    tokenizer = Tokenizer(v1)
    tokens = tokenizer.encode("Hello there", bos=True, eos=False)
    if chat:
        tokens = tokenizer.encode_dialog([{"role": "user", "content": "Hello there"}])
    enough = len(tokens) + 9
    args = ("--prompt", "Hello there", "--max-gen-len", "9", "--temperature", "0", *chat, *CPU)
    paths = checkpoint, checkpoint / "tokenizer.model"
    code, out, err = run(*paths, *args, "--max-seq-len", enough + spare)
    assert code == (1 if chat and spare == -9 else 0)
    warnings = re.findall("^warning: only .*", err, flags=re.MULTILINE)
    assert len(warnings) == (1 if spare else 0)
    for warning in warnings:
        assert re.search(rf"max_seq_len {enough + spare}\b.*\b{enough} would", warning)
    # The random model never says eos.
    assert bool(said) == (out != run(*paths, *args, "--max-seq-len", enough + 5).out)


def test_the_longest_prompt_counts(run, checkpoint, script, v1):
    prompts = runpy.run_path(str(script))["PROMPTS"]
    longest = max(len(Tokenizer(v1).encode(text, bos=True, eos=False)) for text in prompts)
    args = (checkpoint, checkpoint / "tokenizer.model", "--max-gen-len", "2", *CPU)
    assert "warning" not in run(*args, "--max-seq-len", longest + 2).err
    assert f"{longest + 2} would" in run(*args, "--max-seq-len", longest + 1).err


def test_a_chat_prompt_in_letters(run, checkpoint, monkeypatch):
    """The tokenizer's hint is a line on stderr, but for a chat, where it is mere text."""

    def chat_hint(tokenizer: Tokenizer, text: str) -> str | None:
        return "use --chat for 100%" if "[INST]" in text else None

    monkeypatch.setattr(Tokenizer, "chat_hint", chat_hint, raising=False)
    args = (checkpoint, checkpoint / "tokenizer.model", "--max-gen-len", "2", *CPU)
    assert "warning: use --chat for 100%\n" in run(*args, "--prompt", "[INST] Hi [/INST]").err
    assert "warning" not in run(*args, "--prompt", "Hi").err
    assert "--chat" not in run(*args, "--prompt", "[INST]", "--chat").err
