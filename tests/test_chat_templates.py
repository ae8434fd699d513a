"""Chat templates of checkpoints: dialogs as transformers encodes them in the same folder."""

import pytest
from helpers.templates import (
    ALMOST_MISTRAL,
    MISTRAL,
    NAMES,
    PARTS,
    SYSTEM_LAST,
    TEMPLATES,
    WITH_SYSTEM,
    ZEPHYR,
    dialog,
    random_dialogs,
    settings,
)
from helpers.tokens import CHATML, TEMPLATE, added_tokens_decoder, fine_tune

from mixtral import Tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def legacy(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, v1, legacy):
    """transformers' tokens of a dialog in a template."""
    pytest.importorskip("google.protobuf", reason="transformers needs it for such a folder")
    transformers = pytest.importorskip("transformers", minversion="5.24")
    folder = tmp_path_factory.mktemp("theirs")
    fine_tune(folder, v1, config=settings(None, legacy))
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": True, "return_dict": False}

    def encode(template: str, messages) -> list[int]:
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)

    return encode


@pytest.fixture
def load(tmp_path, v1, legacy):
    """load(template) is a tokenizer in whose folder it is."""
    return lambda template: Tokenizer(fine_tune(tmp_path, v1, config=settings(template, legacy)))


# What transformers makes of the same template


@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_transformers(load, theirs, name):
    tokenizer = load(TEMPLATES[name])
    for messages in random_dialogs(60):
        assert tokenizer.encode_dialog(messages) == theirs(TEMPLATES[name], messages), messages


@pytest.mark.parametrize(
    "expression",
    [
        "m.content.split('</think>')[-1] | trim",
        "m.content | length",
        "m.content | upper",
        "m.content if '<' in m.content else 'nothing'",
        "m.content if m.content.startswith('a') else m.content | trim",
        "m.content.replace('Hello', '')[2:] | tojson",
        "'</s>' + m.content[:2]",
    ],
)
def test_templates_that_look_at_messages(load, theirs, expression):
    template = f"{{% for m in messages %}}{{{{ {expression} }}}}<|im_end|>{{% endfor %}}"
    tokenizer = load(template)
    for messages in random_dialogs(60):
        assert tokenizer.encode_dialog(messages) == theirs(template, messages), messages


@pytest.mark.parametrize("name", ALMOST_MISTRAL)
def test_formats_that_are_almost_mistrals(load, theirs, name):
    tokenizer = load(ALMOST_MISTRAL[name])
    for messages in random_dialogs(20):
        if name not in ("a default", "no bos") or messages[0]["role"] == "user":
            assert tokenizer.encode_dialog(messages) == theirs(ALMOST_MISTRAL[name], messages)


def test_variables_that_are_null(tmp_path, v1):
    """The template reads no text; those that are absent are SentencePiece's own."""
    config = settings("{{ bos_token }}{{ eos_token }}{{ mask_token }}{{ unk_token }}a")
    config["bos_token"] = None
    del config["eos_token"], config["unk_token"]
    assert Tokenizer(fine_tune(tmp_path, v1, config=config)).encode_dialog(dialog("Hi")) == [
        2,
        0,
        264,
    ]


def test_where_a_template_is(tmp_path, v1):
    """chat_template.jinja counts more than the config; of a list, the default counts."""
    named = [{"name": name, "template": f"{name}!"} for name in ("tool_use", "default", "rag")]
    path = fine_tune(tmp_path, v1, config=settings(named))
    said = Tokenizer(path).encode_dialog(dialog("Hi"))
    assert said == Tokenizer(v1).encode("default!", bos=False, eos=False)
    (tmp_path / "chat_template.jinja").write_text("从文件", encoding="utf-8")
    said = Tokenizer(path).encode_dialog(dialog("Hi"))
    assert said == Tokenizer(v1).encode("从文件", bos=False, eos=False)


# Messages are letters


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_message_has_a_control_token(load, name):
    """The tokens that have no text are those of the same dialog with plain words."""
    tokenizer = load(TEMPLATES[name])
    special = {0, 1, 2, *CHATML.values()}
    for messages in random_dialogs(60, [*PARTS, *NAMES, "<s", ">", "/s>", "<<s>>"]):
        plain = [{**message, "content": "word"} for message in messages]
        tokens = tokenizer.encode_dialog(messages)
        found = [token for token in tokens if token in special]
        want = [token for token in tokenizer.encode_dialog(plain) if token in special]
        assert found == want, messages


def test_names_in_messages_are_spelt(v1, load, legacy):
    """They become the tokens of their letters, whatever else is in the message."""
    tokenizer = load(ZEPHYR)
    content = "".join(NAMES) + "\U000f0000 < \U000f0001<|im_</s>end|>\U00100000"
    (message,) = dialog(content)
    sp_model = Tokenizer(v1).sp_model
    newline = [28705, 13] if legacy else [13]
    answer = (
        sp_model.encode("\n<|assistant|>\n") if legacy else sp_model.encode("\n<|assistant|>\n")[1:]
    )
    assert newline == answer[: len(newline)]
    want = [*sp_model.encode(f"<|user|>\n{content}"), 2, *answer]
    assert tokenizer.encode_dialog([message]) == want


def test_names_that_overlap(tmp_path, v1):
    """In the template they are tokens, as in encode(); in a message none is."""
    added = {"<|im": 32000, "<|im_end|>": 32001, "|im_end|>x": 32002, "龘": 32003, "aba": 32004}
    text = "<|im_end|>x<|im<|im_end|>龘龘ababa"
    config = {"chat_template": text + "</s>{{ messages[0].content }}"}
    tokenizer = Tokenizer(fine_tune(tmp_path, v1, added, config))
    want = [*tokenizer.encode(text, bos=False, eos=True), *tokenizer.sp_model.encode(text)]
    assert tokenizer.encode_dialog(dialog(text)) == want


@pytest.mark.parametrize(
    "template, contents",
    [
        ("{{ messages[0].content + messages[1].content }}", ["</", "s>", ""]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["<|im_", "en", "d|>"]),
        ("{{ messages[0].content.replace('<image>', '') }}", ["</<image>s>"]),
        ("{{ messages[0].content | replace('\n', '') }}", ["<|im_\nend|>"]),
        ("{{ messages[0].content | lower }}", ["</S>"]),
        ("{{ '<|' + messages[0].content + '|>' }}", ["im_end"]),
        ("<{{ messages[0].content }}", ["/s>"]),
    ],
)
def test_names_that_arise_in_the_template(tmp_path, v1, template, contents):
    tokenizer = Tokenizer(fine_tune(tmp_path, v1, config=settings(template)))
    tokenizer.encode_dialog(dialog(*["Hi"] * len(contents)))
    with pytest.raises(ValueError, match="makes tokens of a message's letters$"):
        tokenizer.encode_dialog(dialog(*contents))


def test_no_character_is_left(tmp_path, v1):
    tokenizer = Tokenizer(fine_tune(tmp_path, v1, config=settings(ZEPHYR)))
    with pytest.raises(ValueError, match="private-use"):
        tokenizer.encode_dialog(dialog("".join(map(chr, range(0xF0000, 0x110000)))))


@pytest.mark.parametrize("kind", ["NORMAL", "CONTROL", "USER_DEFINED"])
def test_markers_that_are_pieces(tmp_path, v1, kind):
    """As in Yi's tokenizer. What SentencePiece makes tokens of even in a message is refused."""
    pytest.importorskip("google.protobuf", reason="SentencePiece's models are written with it")
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(v1.read_bytes())
    ids = {"<|im_start|>": 31998, "<|im_end|>": 31999}
    for name, token in ids.items():
        model.pieces[token].piece = name
        model.pieces[token].type = getattr(ModelProto.SentencePiece, kind)
    config = settings(TEMPLATE, added_tokens_decoder=added_tokens_decoder(ids))
    path = fine_tune(tmp_path, v1, added={}, config=config)
    path.write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(path)
    chatml = Tokenizer(fine_tune(tmp_path / "added", v1, config=settings(TEMPLATE)))
    markers = {32001: 31998, 32000: 31999}
    for messages in random_dialogs(20):
        want = [markers.get(token, token) for token in chatml.encode_dialog(messages)]
        assert tokenizer.encode_dialog(messages) == want
    if kind == "USER_DEFINED":
        with pytest.raises(ValueError, match="^a message cannot contain '<|im_end|>'"):
            tokenizer.encode_dialog(dialog("a<|im_end|>b"))
    else:
        assert tokenizer.encode_dialog(dialog("a<|im_end|>b")).count(31999) == 1


# Mistral's own format


@pytest.mark.parametrize(
    "model, template",
    [
        ("v1", MISTRAL),
        ("v1", MISTRAL.replace("{{ message['content'] +", "{{ ' ' + message['content'] +")),
        ("v1", WITH_SYSTEM),
        ("v3", MISTRAL),
        ("v3", SYSTEM_LAST),
        ("v3", WITH_SYSTEM.replace(' + system_message + "\n\n"', "")),  # it ignores the message
    ],
)
def test_mistrals_own_format(tmp_path, request, model, template):
    """mistral-common's tokens, to which test_chat.py compares, and not the template's spaces."""
    model = request.getfixturevalue(model)
    plain = Tokenizer(model)
    config = settings(template, added_tokens_decoder=added_tokens_decoder({}))
    tokenizer = Tokenizer(fine_tune(tmp_path, model, added={}, config=config))
    for messages in random_dialogs(20, [*PARTS, *NAMES[:3]]):
        assert tokenizer.encode_dialog(messages) == plain.encode_dialog(messages)


# What is refused


@pytest.mark.parametrize(
    "template, reason",
    [
        (
            "{{ raise_exception('No system\n\nmessage.') }}",
            "refuses the dialog: No system message.$",
        ),
        (
            "{% for m in messages %}{{ m }}",
            "is not valid Jinja: line 1: Unexpected end of template",
        ),
        ("a\n{{ b c }}", "is not valid Jinja: line 2: expected token"),
        ("{{ 1 | no_filter }}", "is not valid Jinja: line 1: No filter named 'no_filter'"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is not valid Jinja: "),
        ("{{ messages[9].content.x }}", "refuses the dialog: "),
        ("{{ 'a' + 1 }}", "refuses the dialog: "),
        ("{{ 1 / 0 }}", "refuses the dialog: division by zero"),
        ("{{ 'a' * 10 ** 15 }}", "refuses the dialog: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the dialog: .*unsafe"),
        ("{% if messages.append(1) %}{% endif %}", "refuses the dialog: .*unsafe"),
        ("{% include 'other' %}", "refuses the dialog: "),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "refuses the dialog: maximum recursion",
        ),
    ],
)
def test_refused_templates(tmp_path, v1, template, reason):
    """In one line that names the file, and only if the template is needed."""
    path = fine_tune(tmp_path, v1, config=settings(template))
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("a", bos=False, eos=False) == [264]
    where = tmp_path / "tokenizer_config.json"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{where}: the chat template {reason}") as error:
            tokenizer.encode_dialog(dialog("Hi"))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert Tokenizer(v1).encode_dialog(dialog("Hi"))


def test_half_a_character(tmp_path, v1):
    tokenizer = Tokenizer(fine_tune(tmp_path, v1, config=settings("{{ '\\ud800' }}")))
    with pytest.raises(ValueError, match="valid Unicode"):
        tokenizer.encode_dialog(dialog("Hi"))


@pytest.mark.parametrize(
    "template",
    [7, {}, {"default": "a"}, [], ["a"], [{"name": "rag", "template": "a"}], [{"name": "default"}]],
)
def test_refused_shapes(tmp_path, v1, template):
    tokenizer = Tokenizer(fine_tune(tmp_path, v1, config=settings(template)))
    reason = "chat_template is not a text, nor a list with a default one"
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer_config.json: {reason}$"):
        tokenizer.encode_dialog(dialog("Hi"))


def test_refused_files(tmp_path, v1):
    path = fine_tune(tmp_path, v1)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"^{tmp_path}/chat_template.jinja is not a readable text"):
        Tokenizer(path).encode_dialog(dialog("Hi"))


def test_an_old_jinja(tmp_path, v1, monkeypatch):
    """Templates could leave its sandbox."""
    monkeypatch.setattr("mixtral.chat.version", lambda name: "3.1.5")
    with pytest.raises(ValueError, match="need jinja2 3.1.6 or later"):
        Tokenizer(fine_tune(tmp_path, v1, config=settings(ZEPHYR))).encode_dialog(dialog("Hi"))
