"""Text to tokens and back, with the tokenizers of the published checkpoints."""

import hashlib
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from sentencepiece import SentencePieceProcessor

from mixtral import Tokenizer

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
random_text = st.text(max_size=60)  # any code points but surrogates
# SentencePiece marks spaces with ▁, which so comes back as a space.
spaceless_text = random_text.filter(lambda text: "▁" not in text)
few = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def tokenizer(v1) -> Tokenizer:
    return Tokenizer(v1)


@pytest.fixture(scope="module", params=["v1", "v3"])
def either(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


def stream(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What decode_stream() has yielded when each token has come, and when none is left.

    A list of len(tokens) + 1 texts, each as long as the one before or longer.
    """
    heard, states = "", []

    def one_at_a_time():
        for i, token in enumerate(tokens):
            if i:
                states.append(heard)
            yield token
        if tokens:
            states.append(heard)

    for part in tokenizer.decode_stream(one_at_a_time()):
        assert part
        heard += part
    return [*states, heard]


def test_it_is_the_published_file(v1):
    digest = hashlib.md5(v1.read_bytes()).hexdigest()
    assert digest == "37974873eb68a7ab30c4912fc36264ae"


def test_ids(tokenizer, v3):
    assert (tokenizer.n_words, Tokenizer(v3).n_words) == (32000, 32768)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, -1)


def test_bos_and_eos(tokenizer):
    plain = tokenizer.encode("Hello there", bos=False, eos=False)
    assert plain and not {1, 2} & set(plain)
    assert tokenizer.encode("Hello there", bos=True, eos=False) == [1, *plain]
    assert tokenizer.encode("Hello there", bos=False, eos=True) == [*plain, 2]
    assert tokenizer.encode("Hello there", bos=True, eos=True) == [1, *plain, 2]
    assert tokenizer.encode("", bos=True, eos=True) == [1, 2]
    assert tokenizer.decode([1, *plain, 2]) == "Hello there"


def test_text_never_becomes_a_control_id(either):
    """Nobody ends a turn by writing the name of a control piece."""
    for text in ("<s>", "</s>", "<unk>", "a</s>b", "[INST]", "[/INST]"):
        tokens = either.encode(text, bos=False, eos=False)
        assert not any(map(either.sp_model.is_control, tokens))
        assert 0 not in tokens


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip(either, name):
    tokens = either.encode(TEXTS[name], bos=True, eos=True)
    assert either.decode(tokens) == TEXTS[name]


@few
@given(text=spaceless_text)
def test_any_round_trip(tokenizer, text):
    tokens = tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(tokens) == text


def test_bytes_stand_in_for_missing_pieces(tokenizer):
    """Byte b is id 3 + b."""
    tokens = tokenizer.encode("龘", bos=False, eos=False)
    assert tokens[1:] == [3 + byte for byte in "龘".encode()]


@few
@given(text=random_text)
def test_sentencepiece_encodes_the_same(tokenizer, processor, text):
    tokens = processor.encode(text)
    assert tokenizer.encode(text, bos=False, eos=False) == tokens
    assert tokenizer.decode(tokens) == processor.decode(tokens)


@pytest.fixture(scope="module")
def processor(v1) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(v1))


@few
@given(text=random_text)
@example(text=TEXTS["emoji"])
def test_mistral_common_encodes_the_same(tokenizer, official, text):
    assert tokenizer.encode(text, True, False) == official.encode(text, True, False)
    assert tokenizer.encode(text, True, True) == official.encode(text, True, True)
    assert tokenizer.n_words == official.n_words


@pytest.fixture(scope="module")
def official(v1) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(str(v1))


# Decoding as tokens come


def tokens_of_every_kind():
    byte = st.integers(3, 258)
    lead = st.sampled_from([3 + b for b in (0xC3, 0xE2, 0xE4, 0xF0)])
    trail = st.integers(3 + 0x80, 3 + 0xBF)
    space = st.sampled_from([28705, 259, 3 + 0x20, 13])
    control = st.sampled_from([0, 1, 2])
    piece = st.integers(0, 31999)
    return st.lists(st.one_of(byte, lead, trail, trail, space, control, piece))


@settings(few, max_examples=600)
@given(tokens=tokens_of_every_kind())
@example(tokens=[])
@example(tokens=[1, 28705, 28705, 1, 28705, 6312])
@example(tokens=[229, 133, 6312, 175])
@example(tokens=[229, 1, 133, 0, 175, 229, 133, 175])
def test_joined_stream_is_decode(tokenizer, tokens):
    states = stream(tokenizer, tokens)
    assert states[-1] == tokenizer.decode(tokens)
    for count, heard in enumerate(states[:-1], 1):
        # All is out at once but what may be the start of a character.
        assert heard == tokenizer.decode(tokens[:count]).rstrip("\ufffd")


@few
@given(seed=st.integers(0, 2**32))
def test_joined_stream_is_decode_v3(v3_tokenizer, seed):
    """v3 has control pieces of its own, [INST] and so on."""
    draw = random.Random(seed)
    limits = draw.choices([3, 20, 800, 32768], k=30)
    tokens = [draw.randrange(limit) for limit in limits]
    assert stream(v3_tokenizer, tokens)[-1] == v3_tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def v3_tokenizer(v3) -> Tokenizer:
    return Tokenizer(v3)


def check_text(tokenizer: Tokenizer, text: str):
    tokens = tokenizer.encode(text, bos=True, eos=True)
    states = stream(tokenizer, tokens)
    assert states[-1] == text
    # No state ends in the middle of a character, nor holds what is later taken back.
    assert all(text.startswith(heard) for heard in states)


@pytest.mark.parametrize("name", TEXTS)
def test_stream_of_text(either, name):
    check_text(either, TEXTS[name])


@few
@given(text=spaceless_text)
def test_stream_of_any_text(tokenizer, text):
    check_text(tokenizer, text)


def test_stream_of_a_long_text(demo, tokenizer):
    """A long one, with the demo's tokenizer as well."""
    text = (demo / "heldout.txt").read_text(encoding="utf-8")[:20000]
    for each in (tokenizer, Tokenizer(demo / "tokenizer.model")):
        assert each.decode(each.encode(text, bos=True, eos=False)) == text
        check_text(each, text)


# Files that are no tokenizer


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.model"):
        Tokenizer(tmp_path / "absent.model")


def test_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage" * 1000, b'{"version": "1.0"}', b"version https://git-lfs\n"],
    ids=["empty", "garbage", "JSON", "LFS pointer"],
)
def test_not_sentencepiece(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.model"):
        Tokenizer(path)


def test_truncated(tmp_path, v1):
    path = tmp_path / "bad.model"
    path.write_bytes(v1.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="bad.model"):
        Tokenizer(path)
