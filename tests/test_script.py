"""example_text_completion.py: what it prints, and how it refuses what cannot work."""

import json
import os
import pickle
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
    code: int | None
    out: str
    err: str


@pytest.fixture
def run(script, monkeypatch, capfd):
    """Runs the script as a program would be, in this process: an import takes seconds.

    Warnings, which pytest else keeps to itself, count as lines of stderr.
    """

    def run(*args) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        capfd.readouterr()
        code = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as exit:
                code = exit.code
        out, err = capfd.readouterr()
        if isinstance(code, str):  # as Python does for a message
            code, err = 1, f"{err}{code}\n"
        return Outcome(code, out, err + "".join(f"{w.message}\n" for w in caught))

    return run


def start(script: Path, *args) -> subprocess.Popen:
    """The script as a program, where no GPU can be seen."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=script.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def assert_refused(outcome: Outcome, *patterns: str):
    """One line that says all of this, and nothing else."""
    assert outcome.out == ""
    assert outcome.err.endswith("\n") and outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err), outcome.err
    assert outcome.code == 1


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def unread(copy) -> Path:
    """A checkpoint that is refused as soon as its weights are looked at.

    So a complaint about anything else comes before loading.
    """
    (copy / "consolidated.00.pth").write_bytes(b"not to be opened" * 100)
    return copy


# What it prints


def test_stdout(run, script, checkpoint):
    """The prompts, their completions and rules between them, and nothing else."""
    tokenizer = checkpoint / "tokenizer.model"
    options = ("--temperature", "0", "--max-gen-len", "5", *CPU)
    outcome = run(checkpoint, tokenizer, *options)
    assert outcome.code == 0

    prompts = runpy.run_path(str(script))["PROMPTS"]
    assert len(prompts) == 4
    generator = Mixtral.build(checkpoint, tokenizer, 128, 4, num_gpus=0)
    results = generator.text_completion(prompts, temperature=0, max_gen_len=5)
    assert outcome.out == "".join(
        f"{prompt}\n> {result['generation']}\n{RULE}"
        for prompt, result in zip(prompts, results)
    )


def test_demo(script, demo):
    """The README's command."""
    folder = demo.relative_to(script.parent)
    process = start(script, folder, folder / "tokenizer.model", *CPU)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "Warning" not in err
    *completions, rest = out.split(RULE)
    prompts = runpy.run_path(str(script))["PROMPTS"]
    assert rest == "" and len(completions) == len(prompts)
    for prompt, completion in zip(prompts, completions):
        assert completion.startswith(f"{prompt}\n> ") and completion.endswith("\n")
        assert completion[len(f"{prompt}\n> ") :].strip()


@pytest.mark.parametrize(
    "prompt",
    [
        "Wherefore, behold",
        "1984",
        "1e3",
        "None",
        "[1, 2]",
        "{'a': 1}",
        '"quoted"',
        "",
        " ",
        "- an item",
        "-1",
        "two\nlines  ",
        "naïve 🙂 词",
    ],
)
def test_prompt_is_taken_literally(run, checkpoint, prompt):
    args = (checkpoint, checkpoint / "tokenizer.model", "--max-gen-len", "2", *CPU)
    outcome = run(*args, "--prompt", prompt)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{prompt}\n> ")
    assert outcome.out.endswith(f"\n{RULE}")
    assert outcome.out.count(RULE) == 1


def test_no_room_for_tokens(run, checkpoint):
    """A prompt that fills the cache to the last position is complete as it is."""
    args = (checkpoint, checkpoint / "tokenizer.model", *CPU)
    # "Hello" is one piece, and bos stands before it.
    outcome = run(*args, "--prompt", "Hello", "--max-seq-len", "2")
    assert outcome.code == 0
    assert outcome.out == f"Hello\n> \n{RULE}"


# Options that make no sense


@pytest.mark.parametrize(
    "option, value",
    [
        ("temperature", "-1"),
        ("temperature", "-0.001"),
        ("temperature", "nan"),
        ("temperature", "warm"),
        ("temperature", "True"),
        ("temperature", "[1]"),
        ("top_p", "0"),
        ("top_p", "-0.5"),
        ("top_p", "1.0001"),
        ("top_p", "nan"),
        ("top_p", "most"),
        ("max_gen_len", "0"),
        ("max_gen_len", "-3"),
        ("max_gen_len", "1.5"),
        ("max_gen_len", "many"),
        ("max_seq_len", "0"),
        ("max_seq_len", "None"),
        ("max_batch_size", "0"),
        ("max_batch_size", "-1"),
        ("max_batch_size", "False"),
        ("num_gpus", "3"),
        ("num_gpus", "-1"),
        ("num_gpus", "16"),
        ("num_gpus", "abc"),
        ("num_gpus", "0.0"),
        ("num_gpus", "nan"),
        ("num_gpus", "None"),
        ("num_gpus", "[0]"),
    ],
)
def test_value_out_of_range(run, unread, option, value):
    option_as_typed = f"--{option.replace('_', '-')}"
    cpu = () if option == "num_gpus" else CPU
    args = (unread, unread / "tokenizer.model", *cpu)
    outcome = run(*args, f"{option_as_typed}={value}")
    assert_refused(outcome, option.replace("_", "[-_]"), re.escape(value))


@pytest.mark.parametrize("args", [["--frobnicate", "1"], ["--temprature", "0.5"]])
def test_unknown_option(run, unread, args):
    outcome = run(unread, unread / "tokenizer.model", *CPU, *args)
    assert_refused(outcome, args[0], "--help")


@pytest.mark.parametrize("visible, asked", [(0, 1), (0, 2), (1, 2), (2, 8)])
def test_too_few_gpus(run, unread, monkeypatch, visible, asked):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    outcome = run(unread, unread / "tokenizer.model", "--num-gpus", asked)
    assert_refused(
        outcome, f"--num-gpus {asked}\\b", f"\\b{visible} GPU", "--num-gpus 0\\b", "CPU"
    )


def test_two_gpus_are_the_default(run, unread, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = run(unread, unread / "tokenizer.model")
    assert_refused(outcome, "--num-gpus 2", "--num-gpus 0", "CPU")


def test_prompt_too_long(run, unread):
    args = (unread, unread / "tokenizer.model", *CPU, "--prompt", "Hello there you")
    # Three pieces, with bos four tokens.
    assert_refused(run(*args, "--max-seq-len", "3"), r"\b4 tokens", "max.seq.len", "3")


def test_too_many_prompts(run, unread):
    args = (unread, unread / "tokenizer.model", *CPU, "--max-batch-size", "3")
    assert_refused(run(*args), r"\b4 prompts", "max.batch.size", "3")


# Files that are not there, or not what they should be


def test_no_folder(run, tmp_path, v1):
    assert_refused(run(tmp_path / "absent", v1, *CPU), "absent", "folder")


def test_folder_without_checkpoint(run, unread):
    (unread / "consolidated.00.pth").unlink()
    outcome = run(unread, unread / "tokenizer.model", *CPU)
    assert_refused(outcome, re.escape(str(unread)), "consolidated")


def test_no_params(run, unread):
    (unread / "params.json").unlink()
    outcome = run(unread, unread / "tokenizer.model", *CPU)
    assert_refused(outcome, "no params.json")


@pytest.mark.parametrize(
    "content", [b"", b"{'dim': 16}", b"[16]", b"\xff\xfe{}", b'{"dim": 16'], ids=repr
)
def test_params_not_json(run, unread, content):
    (unread / "params.json").write_bytes(content)
    assert_refused(run(unread, unread / "tokenizer.model", *CPU), "params.json.*JSON")


def change_params(folder: Path, **changes):
    """Set keys of params.json, or with None remove them."""
    params = json.loads((folder / "params.json").read_text()) | changes
    params = {key: value for key, value in params.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize(
    "key", ["dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size"]
)
@pytest.mark.parametrize("value", [None, "16", -16, [16], {}], ids=repr)
def test_params_without_a_usable_key(run, unread, key, value):
    change_params(unread, **{key: value})
    outcome = run(unread, unread / "tokenizer.model", *CPU)
    assert_refused(outcome, "params.json", f"\\b{key}\\b")


@pytest.mark.parametrize("moe", [None, {}, 8, {"num_experts": 8}], ids=repr)
def test_params_of_another_model(run, unread, moe):
    """A dense one, as Mistral 7B, has no "moe"."""
    change_params(unread, moe=moe)
    assert_refused(run(unread, unread / "tokenizer.model", *CPU), "params.json")


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000])
def test_no_tokenizer(run, unread, content):
    path = unread / "other.model"
    if content is not None:
        path.write_bytes(content)
    assert_refused(run(unread, path, *CPU), "other.model")
    assert_refused(run(unread, unread, *CPU), "tokenizer")  # the folder itself


def test_another_models_tokenizer(run, unread, v3):
    assert_refused(run(unread, v3, *CPU), r"\b32000\b", r"\b32768\b", "tokenizer")


# Weights that are not what they should be


@pytest.mark.parametrize("kept", [0, 1, 1000, 0.5, 0.999])
def test_truncated_weights(run, copy, kept):
    path = copy / "consolidated.00.pth"
    content = path.read_bytes()
    path.write_bytes(
        content[: kept if isinstance(kept, int) else int(kept * len(content))]
    )
    outcome = run(copy, copy / "tokenizer.model", *CPU)
    assert_refused(outcome, "consolidated.00.pth", "download")


def test_garbage_weights(run, unread):
    outcome = run(unread, unread / "tokenizer.model", *CPU)
    assert_refused(outcome, "consolidated.00.pth", "download")


def resave(folder: Path, change):
    """Save what change() makes of the tensors."""
    path = folder / "consolidated.00.pth"
    torch.save(change(torch.load(path)), path)


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda t: t.pop("norm.weight"), "norm.weight"),
        (
            lambda t: t.pop("layers.1.feed_forward.experts.7.w2.weight"),
            "layers.1.feed_forward.experts.7.w2.weight",
        ),
        (lambda t: t.update({"extra.weight": torch.ones(1)}), "extra.weight"),
        (
            lambda t: t.update({"layers.2.ffn_norm.weight": torch.ones(16)}),
            "layers.2.ffn_norm.weight",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(17)}), "norm.weight.*17"),
        (
            lambda t: t.update({"output.weight": t["output.weight"].T.clone()}),
            "output.weight.*16, 32000",
        ),
        (lambda t: t.update({"norm.weight": "sixteen ones"}), "norm.weight"),
    ],
    ids=["lacks one", "lacks a w2", "extra", "layer", "shape", "turned", "no tensor"],
)
def test_tensors_that_do_not_match(run, copy, change, names):
    resave(copy, lambda tensors: (change(tensors), tensors)[1])
    assert_refused(run(copy, copy / "tokenizer.model", *CPU), names)


@pytest.mark.parametrize(
    "content", [[], {}, torch.ones(3), {"model": {"norm.weight": torch.ones(16)}}]
)
def test_another_kind_of_pickle(run, copy, content):
    resave(copy, lambda tensors: content)
    assert_refused(run(copy, copy / "tokenizer.model", *CPU), re.escape(str(copy)))


class Attack:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("kind", ["beside", "alone", "old format", "bare pickle"])
def test_pickle_that_runs_code(run, copy, tmp_path, kind):
    path, written = copy / "consolidated.00.pth", tmp_path / "written"
    tensors = torch.load(path)
    attack = Attack(written)
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(attack))
    elif kind == "old format":
        content = {**tensors, "x": attack}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(attack if kind == "alone" else {**tensors, "x": attack}, path)
    assert_refused(run(copy, copy / "tokenizer.model", *CPU), "consolidated.00.pth")
    assert not written.exists()
    if kind == "bare pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert written.exists()  # an attack it was


# As a program


def test_refusal_as_a_program(script, checkpoint, tmp_path):
    process = start(script, checkpoint, tmp_path / "absent.model", *CPU)
    out, err = process.communicate(timeout=300)
    assert_refused(Outcome(process.returncode, out, err), "absent.model")


def test_interrupt(script, checkpoint):
    """Ctrl-C ends it quietly, with the code that shells give for it."""
    long = ("--max-seq-len", "200000", "--max-gen-len", "200000", "--temperature", "0")
    # A program started where the signal is ignored would ignore it as well.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(script, checkpoint, checkpoint / "tokenizer.model", *CPU, *long)
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
