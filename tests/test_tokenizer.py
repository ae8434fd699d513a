"""Text to tokens and back, with the tokenizers of the published checkpoints."""

import hashlib
import os

import pytest
from helpers.tokens import fine_tune, stream

from mixtral import Tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TEXTS = {
    "empty": "",
    "one word": "Hello",
    "sentence": "Simply put, the theory of relativity states that",
    "leading space": " Hello",
    "many spaces": "   a  b    c   ",
    "only spaces": "     ",
    "newlines": "\n\nHi everyone,\n\n        I just\n",
    "carriage returns and tabs": "a\r\n\tb\r\n",
    "accents": "menthe poivrée, girafe, œuvre, ÅNGSTRÖM",
    "combining marks": "e\u0301 n\u0303 o\u0308\u0304 क्षि",
    "Chinese": "混合专家模型把每个词元交给两个专家。 你好",
    "Chinese in bytes": "龘靐齉爩",
    "Japanese, Korean, Arabic": "日本語のテキスト 한국어 العربية",
    "emoji": "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽 🦆",
    "mathematics": "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε, 𝔼[𝑋]",
    "code": "def f(x):\n\treturn {'a': x**2}  # <s> </s> [INST] <unk> <0x0A>\n",
    "control characters": "a\x00b\x07c\x1b[0m\x7f",
    "beyond the first plane": "𐍈 𓀀 \U0010ffff",
    "replacement character": "�a��",
}
few = hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", params=["v1", "v3"])
def path(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tokenizer(path) -> Tokenizer:
    return Tokenizer(path)


@pytest.fixture(scope="module")
def official(path):
    from mistral_common.tokens.tokenizers import sentencepiece

    return sentencepiece.SentencePieceTokenizer(str(path))


def test_ids(v1, v3):
    digest = hashlib.md5(v1.read_bytes()).hexdigest()
    assert digest == "37974873eb68a7ab30c4912fc36264ae"  # of the published file
    for path, n_words in ((v1, 32000), (v3, 32768)):
        tokenizer = Tokenizer(path)
        ids = tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id
        assert ids == (n_words, 1, 2)


def test_text_never_becomes_a_control_id(tokenizer):
    """Nobody ends a turn by writing the name of a control piece."""
    for text in ("<s>", "</s>", "<unk>", "a</s>b", "[INST]", "[/INST]"):
        tokens = tokenizer.encode(text, bos=False, eos=False)
        assert not any(map(tokenizer.sp_model.is_control, tokens))
        assert 0 not in tokens


def check_text(tokenizer: Tokenizer, text: str):
    """It comes back, at once and as a stream."""
    tokens = tokenizer.encode(text, bos=True, eos=True)
    # SentencePiece marks spaces with ▁, which therefore comes back as a space.
    text = text.replace("▁", " ")
    assert tokenizer.decode(tokens) == text
    states = stream(tokenizer, tokens)
    assert states[-1] == text
    # No state ends in the middle of a character, nor holds what is later taken back.
    assert all(text.startswith(state) for state in states)


def check_encoding(tokenizer: Tokenizer, official, text: str):
    plain = tokenizer.encode(text, bos=False, eos=False)
    assert not {1, 2} & set(plain)
    assert plain == official.encode(text, False, False)
    assert tokenizer.encode(text, True, False) == [1, *plain]
    assert tokenizer.encode(text, False, True) == [*plain, 2]
    assert tokenizer.encode(text, True, True) == official.encode(text, True, True)


@pytest.mark.parametrize("name", TEXTS)
def test_text(tokenizer, official, name):
    check_encoding(tokenizer, official, TEXTS[name])
    check_text(tokenizer, TEXTS[name])


@few
@hypothesis.given(text=st.text(max_size=60))  # any code points but surrogates
def test_any_text(tokenizer, official, text):
    check_encoding(tokenizer, official, text)
    check_text(tokenizer, text)


def test_a_long_text(demo, v1):
    text = (demo / "heldout.txt").read_text(encoding="utf-8")[:20000]
    check_text(Tokenizer(v1), text)
    check_text(Tokenizer(demo / "tokenizer.model"), text)


def tokens_of_every_kind():
    """From 0 on ids after that of byte 0, below 0 control pieces."""
    byte = st.integers(0, 255)
    lead = st.sampled_from([0xC3, 0xE2, 0xE4, 0xF0])
    trail = st.integers(0x80, 0xBF)
    space = st.sampled_from([28702, 256, 0x20, 10])
    control = st.integers(-771, -1)  # v3 has 771, as [INST]
    piece = st.integers(0, 31996)
    return st.lists(st.one_of(byte, lead, trail, trail, space, control, piece))


@hypothesis.settings(few, max_examples=600)
@hypothesis.given(tokens=tokens_of_every_kind())
@hypothesis.example(tokens=[])
@hypothesis.example(tokens=[-1, 28702, 28702, -1, 28702, 6309])
@hypothesis.example(tokens=[226, 130, 6309, 172])
@hypothesis.example(tokens=[226, -1, 130, -771, 172, 226, 130, 172])
def test_joined_stream_is_decode(tokenizer, tokens):
    first = tokenizer.sp_model.piece_to_id("<0x00>")
    tokens = [first + token if token >= 0 else -token % first for token in tokens]
    *states, text = stream(tokenizer, tokens)
    assert text == tokenizer.decode(tokens)
    for count, state in enumerate(states, 1):
        # All is out at once but what may be the start of a character.
        assert state == tokenizer.decode(tokens[:count]).rstrip("\ufffd")


# What is refused


def test_no_text(tokenizer):
    for text in (None, 7, b"a", ["a"], "a\ud800", "\udcffa"):
        with pytest.raises(ValueError, match="^a text must be .* valid Unicode, not"):
            tokenizer.encode(text, bos=True, eos=False)


def user(content) -> dict:
    return {"role": "user", "content": content}


DIALOGS = {
    "list of messages": [None, "Hi", 7, [], {}, user("Hi"), iter([user("Hi")])],
    "dict with a role and a content": [
        *([None], ["Hi"], [[]], [{}], [{"role": "user"}], [{"content": "Hi"}]),
        *([user(None)], [user(7)], [user(["Hi"])], [user("Hi"), {"role": "user"}]),
    ],
    "roles": [
        *([{"role": role, "content": "Hi"}] for role in ("tool", "", None, ["user"])),
        *([user("Hi"), user("Hi")], [{"role": "system", "content": "Hi"}]),
    ],
    "valid Unicode": [
        [user("a\ud800")],
        [{"role": "system", "content": "\udcff"}, user("Hi")],
        [user("Hi"), {"role": "assistant", "content": "\udcff"}, user("Hi")],
    ],
}


@pytest.mark.parametrize("reason", DIALOGS)
def test_no_dialog(tokenizer, reason):
    """test_chat.py has all orders of roles, and the dialogs that are encoded."""
    for dialog in DIALOGS[reason]:
        with pytest.raises(ValueError, match=f"^[^\n]*{reason}[^\n]*$"):
            tokenizer.encode_dialog(dialog)


FILES = {
    "is not a readable SentencePiece model": {
        "empty": lambda good: b"",
        "garbage": lambda good: b"garbage" * 1000,
        "truncated": lambda good: good[:100_000],
        "another length": lambda good: good.replace(b"ing", b"ing" * 9, 1),
        "a piece that is not UTF-8": lambda good: good.replace(b"ing", b"i\xffg", 1),
    },
    "is a Git LFS pointer .*: run git lfs pull": {
        "pointer": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    },
    "is JSON, .*: give a tokenizer.model, the checkpoint's or": {
        "tokenizer.json": lambda good: b'{\n  "version": "1.0",\n  "model": {"type": "BPE"}}',
        "tekken.json": lambda good: b'{"config": {"pattern": "x"}, "vocab": []}',
        "after a mark": lambda good: b'\xef\xbb\xbf {"version": "1.0"}',
        "list": lambda good: b"[]",
    },
    "has no bos or no eos": {
        "no bos": lambda good: good.replace(b"\n\x03<s>", b"\n\x03<t>", 1),
        "no eos": lambda good: good.replace(b"\n\x04</s>", b"\n\x04</t>", 1),
    },
}


@pytest.mark.parametrize("reason", FILES)
def test_no_tokenizer(tmp_path, v1, reason):
    path = tmp_path / "bad.model"
    for name, make in FILES[reason].items():
        path.write_bytes(make(v1.read_bytes()))
        with pytest.raises(ValueError, match=rf"^{path} {reason}[^\n]*$"):
            Tokenizer(path)
            pytest.fail(name)


def test_files_that_are_not_read(tmp_path):
    for name in ("", "absent", "pipe", "large"):
        path = tmp_path / name
        if name == "pipe":
            os.mkfifo(path)  # Nobody writes to it.
        elif name == "large":
            path.touch()
            os.truncate(path, 2**36)  # It takes no space on the disk.
        with pytest.raises((FileNotFoundError, ValueError), match=rf"{path}\b") as error:
            Tokenizer(path)
        assert error.type is (ValueError if name == "large" else FileNotFoundError)
        assert ("a folder" in str(error.value)) == (name == "")
        assert "give a tokenizer.model" in str(error.value) or name == ""


def test_prompts_that_spell_control_tokens(v1, v3, tmp_path):
    """A hint is a line for a person, given if the names would be letters."""
    tuned = fine_tune(tmp_path / "v1", v1)
    named = fine_tune(tmp_path / "v3", v3, {"<s>": 1, "[INST]": 3, "[/INST]": 4})
    for path, text, hint in (
        (v1, "Hi", None),
        (v1, "[INST] Hi [/INST]", None),  # v1's own format is spelt in letters
        (v1, "<s>[INST] Hi [/INST]", "<s>"),
        (v1, "\n <s>Hi", "<s>"),
        (v1, "What does <s> do?", None),
        (v3, "Hi", None),
        (v3, "[INST] Hi [/INST]", "[INST]"),
        (v3, "Hi [/INST]", "[/INST]"),
        (v3, "<s>[INST] Hi [/INST]", "<s>"),
        (tuned, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", None),
        (tuned, "[INST] Hi [/INST]", None),
        (named, "<s>[INST] Hi [/INST]", None),  # they become what they spell
    ):
        said = Tokenizer(path).chat_hint(text)
        assert (said is None) == (hint is None)
        assert hint is None or (hint in said and "--chat" in said and "\n" not in said)
