"""A tokenizer.json is as good as the tokenizer.model that it was made from, or refused."""

import copy
import json
import random
import re

import pytest
from helpers.tokenizer_json import FORMS, REPLACE, added_token, save, tokenizer_json
from helpers.tokens import CHATML, added_tokens_decoder, fine_tune

from mixtral import Tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

PARTS = ["a", "Hello", " ", "   ", "\n", "\t", "<|im_", "混合", "龘", "🦆", "▁", "[INST]", "1234"]
PARTS += ["[REFERENCE_DOC_3]", "é", "<0x0A>", "def f(x):", "</s>", "[REFERENCE_DOC_1"]
DIALOG = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "混合\n"},
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory, request):
    """saved(model, form, added) is the path of such a tokenizer.json, in a folder of its own."""
    paths = {}

    def path(model: str, form: str, added: dict):
        key = (model, form, bool(added))
        if key not in paths:
            source = request.getfixturevalue(model)
            source = source / "tokenizer.model" if model == "demo" else source
            folder = tmp_path_factory.mktemp("saved")
            paths[key] = save(folder, tokenizer_json(source, form, added))
        return paths[key]

    return path


@pytest.fixture(scope="session")
def small(demo) -> dict:
    """A tokenizer.json to change; it has 2048 pieces."""
    return tokenizer_json(demo / "tokenizer.model", "5.24", {"<x>": 2048})


def random_text(draw: random.Random, parts: list[str]) -> str:
    return "".join(draw.choices(parts, k=draw.randrange(9)))


# Equal to the tokenizer.model


@pytest.fixture(
    scope="module",
    params=[("v1", "4"), ("v1", "5.24"), ("v3", "4"), ("v3", "5.24"), ("demo", "4")],
    ids=" ".join,
)
def pair(request, saved) -> tuple[Tokenizer, Tokenizer]:
    """Of a tokenizer.model, and of the tokenizer.json that was made from it."""
    name, form = request.param
    path = request.getfixturevalue(name)
    theirs = Tokenizer(path / "tokenizer.model" if name == "demo" else path)
    return theirs, Tokenizer(saved(name, form, {}))


def test_pieces(pair):
    theirs, ours = pair
    assert ours.pieces == theirs.pieces
    for name in ("n_words", "bos_id", "eos_id", "is_v3"):
        assert getattr(ours, name) == getattr(theirs, name)
    ids = list(range(theirs.n_words))
    for kind in ("is_control", "is_unknown", "is_byte", "is_unused"):
        of_model = getattr(theirs.sp_model, kind)
        assert getattr(ours.sp_model, kind)(ids) == of_model(ids)


TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PARTS)).map("".join))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(text=TEXTS)
def test_any_text(pair, text):
    theirs, ours = pair
    tokens = theirs.encode(text, bos=True, eos=True)
    assert ours.encode(text, bos=True, eos=True) == tokens
    assert ours.decode(tokens) == theirs.decode(tokens)


def test_spaces(pair):
    """Runs of them have equal scores in Mixtral's model, and an order in a tokenizer.json."""
    theirs, ours = pair
    for count in range(100):
        for text in (" " * count, f"a{' ' * count}b", "\n" + "▁" * count):
            assert ours.encode(text, False, False) == theirs.encode(text, False, False)


def test_every_piece_as_a_text(pair):
    theirs, ours = pair
    text = "\n".join(theirs.pieces.values())
    assert ours.encode(text, False, False) == theirs.encode(text, False, False)


def test_any_tokens(pair):
    theirs, ours = pair
    draw = random.Random(7)
    for _ in range(300):
        tokens = draw.choices([*range(600), *range(theirs.n_words)], k=12)
        assert ours.decode(tokens) == theirs.decode(tokens)


def test_dialogs(pair):
    theirs, ours = pair
    assert ours.encode_dialog(DIALOG) == theirs.encode_dialog(DIALOG)


# Equal to transformers on the same folder


CHATML_OF_DEMO = {"<|im_end|>": 2048, "<|im_start|>": 2049}


@pytest.mark.parametrize(
    "name, form, added",
    [
        ("v1", "4", CHATML),
        ("v1", "5.24", CHATML),
        *(("demo", form, CHATML_OF_DEMO) for form in FORMS),
        *(("demo", form, {}) for form in FORMS),
    ],
)
def test_equal_to_transformers(saved, name, form, added):
    transformers = pytest.importorskip("transformers", minversion="5")
    path = saved(name, form, added)
    (path.parent / "config.json").write_text('{"model_type": "mixtral"}')
    (path.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent)
    ours = Tokenizer(path)
    assert ours.n_words == len(theirs)
    draw = random.Random(3)
    parts = [*PARTS, *added, *added]
    parts.remove("</s>")  # It is letters, unlike in transformers.
    texts = [random_text(draw, parts) for _ in range(300)]
    texts += [f"{' ' * count}{end}" for count in range(40) for end in ("a", "<|im_end|>")]
    for text in texts:
        tokens = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False, eos=False) == tokens, text
        assert ours.decode(tokens) == theirs.decode(tokens), text


@pytest.mark.parametrize("name, added, legacy", [("v1", CHATML, True), ("v3", {}, False)])
def test_transformers_writes_this(tmp_path, saved, request, name, added, legacy):
    """The form of 5.24, by which all others here were made too, is that of 5.24 itself."""
    pytest.importorskip("google.protobuf", reason="transformers needs it for such a folder")
    transformers = pytest.importorskip("transformers", minversion="5.24")
    config = {"legacy": legacy, "added_tokens_decoder": added_tokens_decoder(added)}
    fine_tune(tmp_path / "source", request.getfixturevalue(name), added, config)
    (tmp_path / "source" / "config.json").write_text('{"model_type": "mixtral"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    theirs.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    path = saved(name, "5.24" if legacy else "5.24, not legacy", added)
    here = json.loads(path.read_text(encoding="utf-8"))
    for part in ("normalizer", "pre_tokenizer", "decoder", "added_tokens", "model"):
        assert here[part] == written[part], part
    # What else it has written does not matter.
    ours = Tokenizer(tmp_path / "saved" / "tokenizer.json")
    assert ours.pieces == Tokenizer(tmp_path / "source" / "tokenizer.model").pieces
    assert ours.encode_dialog(DIALOG) == Tokenizer(path).encode_dialog(DIALOG)


# Added tokens


@pytest.mark.parametrize("form", ["4", "5.24, not legacy"])
def test_added_tokens_are_those_of_a_fine_tune(tmp_path, saved, v1, form):
    legacy = form == "4"
    config = {"legacy": legacy, "added_tokens_decoder": added_tokens_decoder()}
    theirs = Tokenizer(fine_tune(tmp_path, v1, config=config))
    path = saved("v1", form, CHATML)
    # The file itself says what is done to spaces, and transformers takes no notice of this.
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"legacy": not legacy}))
    ours = Tokenizer(path)
    assert ours.pieces == theirs.pieces
    assert ours.encode_dialog(DIALOG) == theirs.encode_dialog(DIALOG)
    draw = random.Random(5)
    for _ in range(300):
        text = random_text(draw, [*PARTS, *CHATML])
        tokens = theirs.encode(text, bos=False, eos=False)
        assert ours.encode(text, bos=False, eos=False) == tokens
        assert ours.decode(tokens) == theirs.decode(tokens)


def test_several_files_name_added_tokens(tmp_path, small):
    path = save(tmp_path, small)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"added_tokens_decoder": {"2048": {"content": "<x>"}}}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2048, "<y>": 2049}')
    ours = Tokenizer(path)
    assert ours.encode("<y><x>", bos=False, eos=False) == [2049, 2048]
    config.write_text('{"added_tokens_decoder": {"2048": {"content": "<z>"}}}')
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match="token 2048 is '<z>' and '<x>' in two files"):
        Tokenizer(path)


def test_added_tokens_in_the_vocabulary(tmp_path, small):
    """Some tools write them there too; they stay what they are."""
    changed = copy.deepcopy(small)
    changed["model"]["vocab"]["<x>"] = 2048
    ours = Tokenizer(save(tmp_path, changed))
    assert (ours.sp_model.vocab_size(), ours.n_words) == (2048, 2049)
    assert 2048 in ours.encode("a<x>", bos=False, eos=False)


def test_control_tokens_that_are_not_named(tmp_path, v3):
    """What no merge makes is one, even if only the first three are called special."""
    content = tokenizer_json(v3, "4", {})
    content["added_tokens"] = content["added_tokens"][:3]
    vocab = content["model"]["vocab"]
    name = "[" + "control" * 25 + "]"  # Its length takes two bytes in the model.
    vocab[name] = vocab.pop("[control_748]")
    ours = Tokenizer(save(tmp_path, content))
    assert ours.is_v3
    assert ours.sp_model.is_control(ours.sp_model.piece_to_id(name))
    assert ours.encode_dialog(DIALOG) == Tokenizer(v3).encode_dialog(DIALOG)


def test_user_defined_pieces_of_any_characters(tmp_path, small):
    """The pattern of 5.24 quotes them."""
    changed = copy.deepcopy(small)
    names = ["x\n|\\.", "*"]
    vocab = changed["model"]["vocab"]
    vocab[names[0]] = vocab.pop("V")
    vocab[names[1]] = vocab.pop("Q")
    pattern = {"Regex": "|".join(map(re.escape, names))}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    changed["pre_tokenizer"]["pretokenizers"].append(split)
    ours = Tokenizer(save(tmp_path, changed))
    split["behavior"] = "Removed"
    with pytest.raises(ValueError, match="prepares texts"):
        Tokenizer(save(tmp_path / "removed", changed))
    tokens = ours.encode("*x\n|\\.x", bos=False, eos=False)
    assert [ours.pieces[token] for token in tokens] == ["▁", names[1], names[0], "x"]


# What is refused


def put(*keys, value):
    """A change that sets tokenizer[keys[0]][keys[1]]... to value."""

    def change(tokenizer: dict):
        *parents, last = keys
        for key in parents:
            tokenizer = tokenizer[key]
        tokenizer[last] = value

    return change


def rename(old: str, new: str):
    def change(tokenizer: dict):
        vocab = tokenizer["model"]["vocab"]
        vocab[new] = vocab.pop(old)
        tokenizer["added_tokens"] = []

    return change


def drop(piece: str):
    return lambda tokenizer: tokenizer["model"]["vocab"].pop(piece)


def move_merge(old: int, new: int):
    def change(tokenizer: dict):
        merges = tokenizer["model"]["merges"]
        merges.insert(new, merges.pop(old))

    return change


BYTE_LEVEL = {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "use_regex": False}]}
NORMALIZED = {**added_token(2048, "<x>"), "normalized": True}
STRIPPED = {**added_token(2048, "<x>"), "lstrip": True}
NFKC = {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}
NO_SPACE_BEFORE = {"normalizer": REPLACE, "pre_tokenizer": None}  # as 5.17 to 5.20 wrote it
REFUSED = [
    (put("model", "type", value="Unigram"), "type 'Unigram', not BPE"),
    (put("model", "type", value="WordPiece"), "type 'WordPiece', not BPE"),
    (put("pre_tokenizer", value=BYTE_LEVEL), "byte-level"),
    (put("model", "byte_fallback", value=False), "no byte fallback"),
    (put("model", "continuing_subword_prefix", value="##"), "parts of a word"),
    (put("model", "end_of_word_suffix", value="</w>"), "parts of a word"),
    (put("normalizer", value=NFKC), "prepares texts"),
    (put("pre_tokenizer", "pretokenizers", 0, "split", value=True), "prepares texts"),
    (lambda tokenizer: tokenizer.update(NO_SPACE_BEFORE), "prepares texts"),
    (put("pre_tokenizer", "pretokenizers", 0, "prepend_scheme", value="never"), "prepares texts"),
    (move_merge(2, 1000), "merges make '▁th' at different times"),
    (lambda tokenizer: tokenizer["model"]["merges"].pop(), "merges are not those"),
    (lambda tokenizer: tokenizer["model"]["merges"].append(["Q", "V"]), "merges are not those"),
    (put("model", "merges", 0, value=["t"]), "a merge that is not of two pieces"),
    (put("model", "merges", 0, value="t  h"), "a merge that is not of two pieces"),
    (put("model", "merges", 0, value=[1, 2]), "merges are not those"),
    (put("model", "merges", 0, value=7), "parts of it"),
    (put("model", "unk_token", value="<nil>"), "a token that is not in its vocabulary"),
    (put("added_tokens", 0, "content", value="<nil>"), "a token that is not in its vocabulary"),
    (put("added_tokens", 0, "id", value=1), "1 is there twice or not an id"),
    (put("added_tokens", 0, "id", value=-1), "-1 is there twice or not an id"),
    (put("added_tokens", 3, value=NORMALIZED), "normalized of its added token 2048"),
    (put("added_tokens", value=None), "parts of it"),
    (put("model", "vocab", value=["a"]), "parts of it"),
    (put("model", "vocab", "th", value=7), "ids that are absent or there twice"),
    (put("model", "vocab", "th", value=[]), "parts of it"),
    (drop("th"), "ids that are absent or there twice"),
    (rename("t", "<t>"), "merges are not those"),  # SentencePiece would merge it all the same.
    (rename("<0x41>", "<0x4a>"), "all 256 bytes"),
    (rename("Q", "\ud800"), "not valid Unicode"),
]


@pytest.mark.parametrize("change, reason", REFUSED, ids=range(len(REFUSED)))
def test_refused(tmp_path, small, change, reason):
    changed = copy.deepcopy(small)
    change(changed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed))
    advice = "give a tokenizer.model, the checkpoint's or that of the model it was made from"
    with pytest.raises(ValueError, match=f"^{path} is JSON, but [^\n]*{reason}[^\n]*: {advice}$"):
        Tokenizer(path)


@pytest.mark.parametrize("name", ["<s>", "</s>"])
def test_no_bos_or_eos(tmp_path, small, name):
    changed = copy.deepcopy(small)
    rename(name, "<t>")(changed)
    with pytest.raises(ValueError, match="has no bos or no eos: use the checkpoint's own$"):
        Tokenizer(save(tmp_path, changed))


def test_flags_that_are_not_supported(tmp_path, small):
    path = save(tmp_path, {**small, "added_tokens": [*small["added_tokens"][:3], STRIPPED]})
    with pytest.raises(ValueError, match=f"^{path}: lstrip of added token 2048 is not supported$"):
        Tokenizer(path)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "is not readable JSON: download it again"),
        ('{"model": ' + "[" * 100_000, "is not readable JSON: download it again"),
        ('{"model": 7}', "is JSON, but parts of it .*: give"),
        ('{"model": {"type": "BPE", "byte_fallback": true}}', "is JSON, but parts of it .*: give"),
        ('{"config": {}, "vocab": []}', "is JSON, but not a tokenizer.json: give"),  # tekken.json
        ("[]", "is JSON, but not a tokenizer.json: give"),
    ],
)
def test_other_json(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path} {reason}[^\n]*$"):
        Tokenizer(path)
