"""--chat: an answer to one prompt, and conversations at a terminal or from standard input."""

import contextlib
import fcntl
import functools
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from helpers.reference import random_transformer
from helpers.script import CPU, assert_refused, run_here, unreadable
from helpers.templates import ZEPHYR

from mixtral import Mixtral, ModelArgs, Tokenizer, Transformer

GREEDY = ("--temperature", "0", "--max-gen-len", "6", *CPU)
LONG = (*GREEDY, "--max-seq-len", "300")


@pytest.fixture
def run(script, monkeypatch, capfd):
    return functools.partial(run_here, script, monkeypatch, capfd)


@pytest.fixture
def unread(checkpoint, tmp_path) -> Path:
    return unreadable(checkpoint, tmp_path)


@pytest.fixture(scope="module")
def v3_checkpoint(tmp_path_factory, v3) -> Path:
    """As the checkpoint, but with 8x22B's tokenizer, whose chat format has control tokens."""
    folder = tmp_path_factory.mktemp("v3")
    sizes = {"dim": 16, "n_layers": 2, "head_dim": 8, "hidden_dim": 32, "vocab_size": 32768}
    sizes |= {"n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    state = random_transformer(ModelArgs(**sizes, max_seq_len=1, max_batch_size=1)).state_dict()
    tensors = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save(tensors, folder / "consolidated.00.pth")
    moe = {"num_experts_per_tok": 2, "num_experts": 8}
    (folder / "params.json").write_text(json.dumps(sizes | {"moe": moe}))
    shutil.copy(v3, folder / "tokenizer.model")
    return folder


@pytest.fixture(params=["checkpoint", "v3_checkpoint"])
def paths(request) -> tuple[Path, Path]:
    folder = request.getfixturevalue(request.param)
    return folder, folder / "tokenizer.model"


class Terminal(io.StringIO):
    """What a person types: input() reads it, and a line "^C" is Ctrl-C."""

    def isatty(self) -> bool:
        return True

    def readline(self, *args) -> str:
        line = super().readline(*args)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def answers(paths: tuple[Path, Path], questions: list[str]) -> list[str]:
    """What is said to each question after those before it, each dialog read anew."""
    generator = Mixtral.build(*paths, max_seq_len=600, max_batch_size=1, num_gpus=0)
    dialog = []
    for question in questions:
        dialog.append({"role": "user", "content": question})
        tokens = generator.tokenizer.encode_dialog(dialog)
        (new,), _ = generator.generate([tokens], max_gen_len=6, temperature=0)
        dialog.append({"role": "assistant", "content": generator.tokenizer.decode(new)})
    return [message["content"] for message in dialog[1::2]]


QUESTIONS = ["Bonjour", "Who are you? ", "-x", "é 🙂", "What did I ask first?"]


def test_answer_to_a_prompt(run, paths):
    (answer,) = answers(paths, ["Bonjour"])
    outcome = run(*paths, "--chat", "--prompt", "Bonjour", *LONG)
    assert outcome[:2] == (0, f"{answer}\n")
    assert "only" not in outcome.err


def test_an_answer_that_max_gen_len_cuts(run, checkpoint, monkeypatch):
    """It is said once. An answer that ends by itself is not cut."""
    paths = checkpoint, checkpoint / "tokenizer.model"
    monkeypatch.setattr(sys, "stdin", Terminal("Bonjour\nWho?\n"))
    assert run(*paths, "--chat", *LONG).err.count("warning: the answer stops at max_gen_len 6") == 1
    monkeypatch.setattr(Mixtral, "stream_tokens", lambda *args: iter([1000] * 5))
    monkeypatch.setattr(sys, "stdin", Terminal("Bonjour\n"))
    assert "warning" not in run(*paths, "--chat", *LONG).err


def test_no_question(run, unread, checkpoint, monkeypatch):
    """Not a success without a word; a blank prompt is refused before loading."""
    for typed in ("--prompt=", "--prompt=  ", "--prompt=-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        outcome = run(unread, unread / "tokenizer.model", "--chat", typed, *LONG)
        assert_refused(outcome, "no question")
    for lines in ("", "\n  \n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code, out, err = run(checkpoint, checkpoint / "tokenizer.model", "--chat", *LONG)
        assert (code, out) == (1, "") and "\nerror: there is no question" in err


@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_lines_of_standard_input(run, paths, monkeypatch, options):
    """Each is a turn; what is printed is what a terminal would show."""
    lines = "\n".join(["", *QUESTIONS[:2], "  ", *QUESTIONS[2:]])  # the last is not ended
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    outcome = run(*paths, "--chat", *LONG, *options)
    said = zip(QUESTIONS, answers(paths, QUESTIONS), strict=True)
    assert outcome[:2] == (0, "".join(f"> {asked}\n{answer}\n" for asked, answer in said))


def test_at_a_terminal(run, paths, monkeypatch):
    """An empty line is asked again, and Ctrl-D ends it, on a line of its own."""
    lines = "\n".join([*QUESTIONS[:2], "", " ", *QUESTIONS[2:], ""])
    monkeypatch.setattr(sys, "stdin", Terminal(lines))
    outcome = run(*paths, "--chat", *LONG)
    said = [f"> {answer}\n" for answer in answers(paths, QUESTIONS)]
    assert outcome[:2] == (0, "".join([*said[:2], "> > ", *said[2:], "> \n"]))


def test_ten_turns_of_a_chat_template(run, checkpoint, tmp_path, monkeypatch):
    """Each turn reads only what is new, and answers as if the dialog were read anew."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "tuned"))
    (folder / "chat_template.jinja").write_text(ZEPHYR)
    paths = folder, folder / "tokenizer.model"
    questions = [f"{question} {turn}" for turn in "12" for question in QUESTIONS]
    read: list[int] = []
    forward = Transformer.forward_packed

    def counted(model, tokens, *args, **options):
        read.append(len(tokens))
        return forward(model, tokens, *args, **options)

    options = (*GREEDY, "--max-seq-len", "600")
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join([*questions, ""])))
    with monkeypatch.context() as context:
        context.setattr(Transformer, "forward_packed", counted)
        outcome = run(*paths, "--chat", *options)
    said = [f"> {answer}\n" for answer in answers(paths, questions)]
    assert outcome[:2] == (0, "".join([*said, "> \n"]))
    assert max(read) < 40 < sum(read)


def test_a_chat_template_is_tried_before_loading(run, unread, monkeypatch):
    """Also if nothing has been asked yet."""
    (unread / "chat_template.jinja").write_text("{{ raise_exception('Not\\nfor chat') }}")
    monkeypatch.setattr(sys, "stdin", Terminal("Bonjour\n"))
    outcome = run(unread, unread / "tokenizer.model", "--chat", *LONG)
    assert_refused(outcome, r"chat_template.jinja: .* refuses the dialog: Not for chat$")


def test_a_line_that_is_not_unicode(run, checkpoint, monkeypatch):
    """One wrong key: the line is asked again, and the conversation goes on."""
    paths = checkpoint, checkpoint / "tokenizer.model"
    monkeypatch.setattr(sys, "stdin", Terminal("caf\udce9\nBonjour\n"))
    code, out, err = run(*paths, "--chat", *LONG)
    (answer,) = answers(paths, ["Bonjour"])
    assert (code, out) == (0, f"> > {answer}\n> \n")
    assert "error: a text must be a string of valid Unicode, not 'caf\\udce9'\n" in err


def test_experts_of_each_answer(run, paths, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("Bonjour\nWho?\n"))
    plain = run(*paths, "--chat", *LONG).out
    monkeypatch.setattr(sys, "stdin", Terminal("Bonjour\nWho?\n"))
    code, out, _ = run(*paths, "--chat", "--experts", *LONG)
    assert code == 0 and out.count("Layer 1:") == 2
    # Routing writes to the cache that the answers are made with: they are the same.
    shown, _, rest = out.partition("\n\nLayer 0")
    assert plain.startswith(shown)
    assert rest.partition("> ")[2].partition("\n\nLayer 0")[0] in plain


class Interrupted:
    """stream_tokens, whose first answer Ctrl-C ends after three tokens. Keeps the prompts."""

    def __init__(self, monkeypatch):
        self.prompts: list[list[int]] = []
        real = Mixtral.stream_tokens

        def stream_tokens(generator, tokens, *args):
            self.prompts.append(tokens)
            stream = real(generator, tokens, *args)
            if len(self.prompts) > 1:
                yield from stream
                return
            for _ in range(3):
                yield next(stream)
            raise KeyboardInterrupt

        monkeypatch.setattr(Mixtral, "stream_tokens", stream_tokens)


def test_ctrl_c_ends_an_answer(run, paths, monkeypatch):
    """What has come of it stays in the dialog; at the next question Ctrl-C ends the program."""
    interrupted = Interrupted(monkeypatch)
    monkeypatch.setattr(sys, "stdin", Terminal("Bonjour\nWho?\n^C\n"))
    code, out, err = run(*paths, "--chat", *LONG)
    assert code == 130 and "Traceback" not in err
    first, second = interrupted.prompts
    tokenizer = Tokenizer(paths[1])
    generator = Mixtral.build(*paths, max_seq_len=300, max_batch_size=1, num_gpus=0)
    (new,), _ = generator.generate([first], max_gen_len=3, temperature=0)
    assert len(new) == 3
    part = tokenizer.decode(new)
    dialog = [{"role": "user", "content": "Bonjour"}, {"role": "assistant", "content": part}]
    dialog.append({"role": "user", "content": "Who?"})
    assert second == tokenizer.encode_dialog(dialog)
    (new,), _ = generator.generate([second], max_gen_len=6, temperature=0)
    assert out == f"> {part}\n> {tokenizer.decode(new)}\n> "


@pytest.mark.parametrize(
    "owner, name, call",
    [(Tokenizer, "encode_dialog", 2), (Mixtral, "stream_tokens", 1)],  # The format is tried first.
)
def test_ctrl_c_before_an_answer(run, checkpoint, monkeypatch, owner, name, call):
    """Just after Enter or while the prompt is read: as if the question had not been asked."""
    real = getattr(owner, name)
    called = []

    def interrupted(*args):
        called.append(args)
        if len(called) == call:
            raise KeyboardInterrupt
        return real(*args)

    paths = checkpoint, checkpoint / "tokenizer.model"
    (answer,) = answers(paths, ["Who?"])
    monkeypatch.setattr(owner, name, interrupted)
    monkeypatch.setattr(sys, "stdin", Terminal("Bonjour\nWho?\n"))
    code, out, err = run(*paths, "--chat", *LONG)
    assert (code, out) == (0, f"> \n> {answer}\n> \n"), err


@pytest.mark.parametrize("args", [("--prompt", "Bonjour"), ()])
def test_ctrl_c_without_a_terminal(run, checkpoint, monkeypatch, args):
    """It ends the program, as it does for completions."""
    Interrupted(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Bonjour\nWho?\n"))
    code, out, err = run(checkpoint, checkpoint / "tokenizer.model", "--chat", *args, *LONG)
    assert code == 130 and "Who?" not in out
    assert err.endswith("seconds\n\n")


@pytest.mark.parametrize("terminal", [Terminal, io.StringIO])
def test_max_seq_len_is_reached(run, paths, monkeypatch, terminal):
    """Within the second answer: it is shown as far as there is room, and a line says why."""
    first, second = answers(paths, QUESTIONS[:2])
    tokenizer = Tokenizer(paths[1])
    dialog = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": first}]
    dialog.append({"role": "user", "content": QUESTIONS[1]})
    limit = len(tokenizer.encode_dialog(dialog)) + 2
    monkeypatch.setattr(sys, "stdin", terminal("\n".join([*QUESTIONS, ""])))
    code, out, err = run(*paths, "--chat", *GREEDY, "--max-seq-len", limit)
    *_, last = err.splitlines()
    assert code == 1
    assert last.startswith("error: ") and f"max_seq_len is {limit}, " in last
    asked = [""] * 2 if terminal is Terminal else [f"{each}\n" for each in QUESTIONS[:2]]
    assert out.startswith(f"> {asked[0]}{first}\n> {asked[1]}")
    rest = out.removeprefix(f"> {asked[0]}{first}\n> {asked[1]}")
    assert rest.endswith("\n") and second.startswith(rest[:-1]) and rest[:-1] != second


def test_a_question_that_max_seq_len_cannot_hold(run, checkpoint, unread, monkeypatch):
    """Of a prompt it is known before loading, of a line when it is read."""
    long = "word " * 50
    args = ("--chat", *GREEDY, "--max-seq-len", "40")
    outcome = run(unread, unread / "tokenizer.model", *args, "--prompt", long)
    assert_refused(outcome, r"\b\d\d tokens", "max_seq_len is 40")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hi\n{long}\nHi\n"))
    code, out, err = run(checkpoint, checkpoint / "tokenizer.model", *args)
    assert code == 1 and out.endswith(f"> {long}\n")
    assert err.splitlines()[-1].startswith("error: max_seq_len is 40, and the conversation has")


@pytest.mark.parametrize("option", ["--temperature=-1", "--top-p=0", "--max-seq-len=0"])
def test_options_are_checked_before_loading(run, unread, option):
    for stream in ("--stream", "--stream=False"):
        paths = unread, unread / "tokenizer.model"
        assert_refused(run(*paths, "--chat", *CPU, option, stream), "must be")


def take_terminal(terminal: int) -> None:
    """Let Ctrl-C of this terminal reach the process that calls this."""
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Session:
    """The script at a terminal of its own."""

    def __init__(self, script: Path, *args):
        self.terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(script), *map(str, args)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=script.parent,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
            preexec_fn=functools.partial(take_terminal, theirs),
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, after: int = 0) -> int:
        """Read until the text has been shown: where it ends."""
        deadline = time.time() + 120
        while text not in self.shown[after:]:
            assert time.time() < deadline, self.shown
            if select.select([self.terminal], [], [], 1)[0]:
                with contextlib.suppress(OSError):  # the other side has ended
                    self.shown += os.read(self.terminal, 4096).decode(errors="replace")
        return self.shown.index(text, after) + len(text)


def test_a_real_terminal(script, demo):
    """Ctrl-C ends an answer, then the conversation goes on until Ctrl-D."""
    endless = ("--max-gen-len", "9000", "--max-seq-len", "20000", "--temperature", "0")
    session = Session(script, demo, demo / "tokenizer.model", "--chat", *endless, *CPU)
    try:
        end = session.wait_for("> ")
        session.type("Who art thou?\n")
        end = session.wait_for("\r\n", end)  # the question as typed
        end = session.wait_for("LORD", end)
        session.type("\x03")
        end = session.wait_for("\r\n> ", session.wait_for("^C", end))
        session.type("And thou?\n")
        end = session.wait_for(" the ", session.wait_for("\r\n", end))
        session.type("\x03")
        session.wait_for("\r\n> ", session.wait_for("^C", end))
        session.type("\x04")
        assert session.process.wait(timeout=60) == 0
        assert "Traceback" not in session.shown
    finally:
        session.process.kill()
        os.close(session.terminal)
