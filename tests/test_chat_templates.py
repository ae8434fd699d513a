"""Chat templates of checkpoints: dialogs as transformers encodes them in the same folder."""

import json
import random

import pytest
from helpers.tokens import CHATML, TEMPLATE, added_tokens_decoder, fine_tune
from test_chat import dialog

from mixtral import Tokenizer

# Short forms of templates as they are published.
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + TEMPLATE
)
MARKED_ANSWERS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set seen = 1 %}{% generation %}{% set seen = 2 %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ seen }}\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] | trim + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = false -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate.') }}
    {%- endif -%}
    {%- set content = system + message.content if loop.first and system else message.content -%}
    {%- if message.role == 'user' -%}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""
ALPACA = (
    "{% set ns = namespace(text='Write a response.') %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.text = m.content %}{% continue %}"
    "{% endif %}{% if ns.text %}{{ ns.text }}\n\n{% set ns.text = '' %}{% endif %}"
    "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
JSON = "{{ bos_token }}{{ messages | tojson(indent=2) }}{{ unk_token }}{{ pad_token }}{{ tools }}"
TEMPLATES = {
    "zephyr": ZEPHYR,
    "chatml": TEMPLATE,
    "chatml with bos": "{{ bos_token }}" + TEMPLATE,
    "chatml with a default": DEFAULT_SYSTEM,
    "chatml with marked answers": MARKED_ANSWERS,
    "vicuna": VICUNA,
    "llama": LLAMA,
    "alpaca": ALPACA,
    "json": JSON,
}
PARTS = [
    "a",
    "Hello",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "<",
    "</s",
    "混合",
    "龘",
    "🦆",
    "▁",
    "e\u0301",
    "\x00",
    "\u00a0",
    "\U000f0000",
    "[INST]",
    "<|user|>",
    "&",
]


def random_dialogs(count: int):
    draw = random.Random(11)

    def text() -> str:
        return "".join(draw.choices(PARTS, k=draw.randrange(7)))

    for _ in range(count):
        contents = [text() for _ in range(2 * draw.randrange(4) + 1)]
        yield dialog(*contents, system=draw.choice([None, text()]))


def settings(template, legacy=True, **others) -> dict:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "chat_template": template}
    return {**kind, **tokens, "added_tokens_decoder": added_tokens_decoder(), **others}


def theirs(folder):
    """transformers' tokens of a dialog."""
    pytest.importorskip("google.protobuf", reason="transformers needs it for such a folder")
    transformers = pytest.importorskip("transformers", minversion="5.24")
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": True, "return_dict": False}
    return lambda messages: tokenizer.apply_chat_template(messages, **options)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_transformers(tmp_path, v1, name, legacy):
    path = fine_tune(
        tmp_path,
        v1,
        config=settings(
            TEMPLATES[name], legacy, pad_token={"__type": "AddedToken", "content": "</s>"}
        ),
    )
    encode = theirs(tmp_path)
    tokenizer = Tokenizer(path)
    for messages in random_dialogs(150):
        assert tokenizer.encode_dialog(messages) == encode(messages), messages
