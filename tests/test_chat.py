"""Dialogs: mistral-common's prompts, Llama's results, and refusals that harm no other."""

import copy
import dataclasses
import random

import pytest
import torch
from helpers.reference import random_transformer
from helpers.templates import dialog
from helpers.tiny import ARGS, NEAR, Stub, saying

from mixtral import Mixtral, Tokenizer, Transformer

TAGS = ("[INST]", "[/INST]", "<s>", "</s>")
PARTS = [
    "words, and more",
    "混合专家模型。",
    "龘靐",
    "👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301",
    "क्षि",
    "𐍈é𓀀",
]
PARTS += [
    "a",
    "Hi",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "[",
    "]",
    "[INST ]",
    "/INST]",
]
PARTS += ["<", "s>", "<unk>", "▁", "\x00", "�", *TAGS, *TAGS]


GOOD = [
    dialog("Who are you?"),
    dialog("Hi", "Hello!", "And now?", system="Be brief."),
    dialog("1", "2", "3", "4", "5"),
]
BAD = [
    [],
    dialog(system="Be brief."),
    dialog("Hi", "Hello!"),  # ends with the assistant
    dialog("Hi", "Hello!", system="Brief."),
    dialog("Hi", "Hello!", "Well")[1:],  # begins with the assistant
    dialog("Hi", "Hello!", "Well")[::2],  # the user twice
    [*dialog("Hi", "Hello!"), *dialog("Hi", "Hello!", "?")[1:]],
    [*dialog(system="A"), *dialog("Hi", system="B")],
    [*dialog("Hi", "Hello!"), *dialog("Well", system="A")],  # a late system message
    [*dialog(system="A"), *dialog("Hi", "Hello!", "?")[1:]],
    [{"role": "tool", "content": "42"}],
    *(None, "Hi", 7, [None], ["Hi"], [{"role": "user"}], [{"content": "Hi"}]),
    *([{"role": "user", "content": content}] for content in (None, 7, ["Hi"])),
    [{"role": ["user"], "content": "Hi"}],
    [*dialog("Hi", "Hello!"), {"role": "user"}],
]


@pytest.fixture(scope="module", params=["v1", "v3"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def official(tokenizer):
    """mistral-common's tokens of a dialog."""
    from mistral_common.protocol.instruct import messages, request
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    versions = {32000: MistralTokenizer.v1, 32768: MistralTokenizer.v3}
    theirs = versions[tokenizer.n_words]()
    kinds = {"system": messages.SystemMessage, "user": messages.UserMessage}
    kinds["assistant"] = messages.AssistantMessage

    def encode(dialog) -> list[int]:
        typed = [kinds[m["role"]](content=m["content"]) for m in dialog]
        asked = request.ChatCompletionRequest(messages=typed)
        return theirs.encode_chat_completion(asked).tokens

    return encode


def random_dialog(draw: random.Random) -> list[dict[str, str]]:
    """Of one to seven turns; what the assistant says is never empty."""

    def text(least: int) -> str:
        letter = chr(draw.choice([0x3A0, 0x4E00, 0x1F600]) + draw.randrange(64))
        return "".join(draw.choices([*PARTS, letter], k=draw.randint(least, 6)))

    contents = [text(i % 2) for i in range(2 * draw.randint(0, 3) + 1)]
    return dialog(*contents, system=draw.choice([None, text(0)]))


def test_dialogs_are_encoded_as_published(tokenizer, official):
    draw = random.Random(7)
    dialogs = [dialog("Hi", "Hello", "How?", system="")]
    dialogs += [dialog(tag, f"a{tag}", f"{tag}b", system=tag) for tag in TAGS]
    dialogs += [random_dialog(draw) for _ in range(200)]
    before = copy.deepcopy(dialogs)
    eos = torch.nn.functional.one_hot(torch.tensor(tokenizer.eos_id), tokenizer.n_words)
    sizes = {"max_batch_size": len(dialogs), "vocab_size": tokenizer.n_words}
    stub = Stub(lambda row, heard: eos.float(), **sizes)
    answers = Mixtral(stub, tokenizer).chat_completion(dialogs, temperature=0)
    nothing = {"generation": {"role": "assistant", "content": ""}}
    assert answers == [nothing] * len(dialogs)
    for row, messages in enumerate(dialogs):
        assert stub.heard[row] == official(messages), messages
        n_answers = sum(message["role"] == "assistant" for message in messages)
        assert stub.heard[row].count(1) == 1 and stub.heard[row].count(2) == n_answers
    assert dialogs == before


def check_refusal(answer, logprobs: bool):
    message = answer.pop("generation")
    assert message.pop("content").startswith("Error: ")
    assert message == {"role": "assistant"}
    assert answer == ({"tokens": [], "logprobs": []} if logprobs else {})


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    sizes = {"dim": 16, "n_layers": 1, "vocab_size": tokenizer.n_words}
    return random_transformer(dataclasses.replace(ARGS, **sizes, max_seq_len=96))


@pytest.mark.parametrize("logprobs", [False, True])
def test_refusals(tokenizer, model, logprobs):
    """The others get the answers that they get alone."""
    generator = Mixtral(model, tokenizer)
    options = {"temperature": 0, "max_gen_len": 7, "logprobs": logprobs}
    dialogs = [*BAD[:1], *GOOD[:2], *BAD[1:9], *GOOD[2:], *BAD[9:]]
    answers = generator.chat_completion(dialogs, **options)
    for messages, answer in zip(dialogs, answers, strict=True):
        if messages not in GOOD:
            check_refusal(answer, logprobs)
            continue
        (alone,) = generator.chat_completion([messages], **options)
        if logprobs:
            assert answer.pop("logprobs") == NEAR(alone.pop("logprobs"))
        assert answer == alone
    # Without a good one nothing is computed.
    for answer in Mixtral(Stub(None), tokenizer).chat_completion(BAD):
        check_refusal(answer, logprobs=False)


def test_options(tokenizer, model):
    prompt = tokenizer.encode_dialog(GOOD[0])
    (tokens,), _ = Mixtral(model, tokenizer, 3).generate([prompt], 9, 1.5, 0.5)
    (answer,) = Mixtral(model, tokenizer, 3).chat_completion(GOOD[:1], 1.5, 0.5, 9)
    assert answer["generation"]["content"] == tokenizer.decode(tokens)


def test_results(tokenizer):
    """Llama's dictionaries, and text that ends before eos or at max_seq_len."""
    said = ["I am a model. 🙂", "", "混合" * 100]
    scripts = [tokenizer.encode(text, bos=False, eos=False) for text in said]
    prompts = [tokenizer.encode_dialog(messages) for messages in GOOD]
    generator = saying(tokenizer, prompts, scripts, max_seq_len=64)
    tokens = [script[: 64 - len(prompt)] for prompt, script in zip(prompts, scripts)]
    right = [
        {
            "generation": {"role": "assistant", "content": tokenizer.decode(ids)},
            "tokens": [tokenizer.decode([token]) for token in ids],
            "logprobs": [0.0] * len(ids),
        }
        for ids in tokens
    ]
    assert generator.chat_completion(GOOD, logprobs=True) == right
    for answer in right:
        del answer["tokens"], answer["logprobs"]
    assert generator.chat_completion(GOOD) == right
