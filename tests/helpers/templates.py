"""Chat templates as checkpoints have them, and dialogs to write with them."""

import itertools
import random

from helpers.tokens import CHATML, TEMPLATE, added_tokens_decoder

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
PARTS = ["a", "Hello", " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\x00"]
PARTS += ["混合", "龘", "🦆", "e\u0301", "▁", "\U000f0000"]
PARTS += ["<", "</s", "</think>", "&", "[INST]", "<|user|>"]
NAMES = ("<s>", "</s>", "<unk>", *CHATML)


def settings(template, legacy=True, **others) -> dict:
    """A tokenizer_config.json."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens["pad_token"] = {"__type": "AddedToken", "content": "</s>"}
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "chat_template": template}
    return {**kind, **tokens, "added_tokens_decoder": added_tokens_decoder(), **others}


MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
WITH_SYSTEM = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == "user" and loop.first and system_message is defined %}
        {{- " [INST] " + system_message + "\n\n" + message.content + " [/INST]" }}
    {%- elif message.role == "user" %}
        {{- "[INST]" + message.content + "[/INST]" }}
    {%- else %}
        {{- " " + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
SYSTEM_LAST = WITH_SYSTEM.replace("loop.first", "loop.last")
ALMOST_MISTRAL = {
    "a default": MISTRAL.replace("{{ bos_token }}", "{{ bos_token }}[INST] Be kind. [/INST]</s>"),
    "tagged": WITH_SYSTEM.replace('" + system_message + "', '<<SYS>>" + system_message + "'),
    "last": SYSTEM_LAST,
    "no bos": MISTRAL.replace("{{ bos_token }}", ""),
    "another end": WITH_SYSTEM.replace("eos_token", "'<|im_end|>'"),
    "with a prompt": WITH_SYSTEM + "{{ 'Answer:' if add_generation_prompt }}",
}


def dialog(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def random_dialogs(count: int, parts=PARTS):
    draw = random.Random(11)

    def text() -> str:
        return "".join(draw.choices(parts, k=draw.randrange(7)))

    for _ in range(count):
        contents = [text() for _ in range(2 * draw.randrange(4) + 1)]
        yield dialog(*contents, system=draw.choice([None, text()]))
