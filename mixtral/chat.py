"""A checkpoint's own chat template: a program in Jinja that writes a dialog as text."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]  # each has a role and a content

# The names of tokens that a template can read from tokenizer_config.json.
VARIABLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# These code points have no meaning of their own.
PRIVATE_USE = range(0xF0000, 0x110000)


class ChatTemplate:
    """The chat template that a file has.

    Besides the dialog it can read variables, such as bos_token. Where it writes one of names, the
    text has that token; where a message has the name, it has its letters. Raises ValueError if
    source is not valid Jinja.
    """

    def __init__(
        self, path: Path, source: str, variables: Mapping[str, str], names: Collection[str]
    ):
        self.path = path
        self.template = compile_template(path, source)
        self.variables = variables
        self.letters = sorted(set("".join(names)))
        self.reserved = {*source, *self.letters}
        # The longest is tried first, for one name may begin another.
        longest_first = sorted(names, key=len, reverse=True)
        self.name_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def split(self, messages: Messages) -> list[str]:
        """The text of a dialog: a piece of text, a token's name, a piece of text, and so on.

        Raises ValueError if the template fails, or if a name would have letters of a message.
        """
        # Where a message has a name, stand-ins take the place of its letters, so that the name is
        # not found afterwards. All else stays as it is, since the template may look at it.
        stand_ins = self._stand_ins(messages)

        def replace_names(text: str) -> str:
            return self.name_pattern.sub(lambda name: name[0].translate(stand_ins), text)

        def replace_letters(text: str) -> str:
            return text.translate(stand_ins)

        parts = self._split(messages, replace_names)
        # A name may still arise, if the template joins messages or cuts something out of one. If
        # every letter that names have is replaced, none can; so the same ones must be found then.
        if self._split(messages, replace_letters)[1::2] != parts[1::2]:
            raise ValueError(f"{self.path}: the chat template makes tokens of a message's letters")
        originals = {ord(stand_in): letter for letter, stand_in in stand_ins.items()}
        return [part.translate(originals) for part in parts]

    def _stand_ins(self, messages: Messages) -> dict[int, str]:
        """For each letter of a name, a character that neither the template nor a message has."""
        used = self.reserved.union(*(message["content"] for message in messages))
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        stand_ins = {ord(letter): stand_in for letter, stand_in in zip(self.letters, unused)}
        if len(stand_ins) < len(self.letters):
            raise ValueError("a dialog must leave some private-use characters unused")
        return stand_ins

    def _split(self, messages: Messages, change: Callable[[str], str]) -> list[str]:
        changed = []
        for message in messages:
            changed.append({"role": message["role"], "content": change(message["content"])})
        return self.name_pattern.split(self.render(changed))

    def render(self, messages: Messages) -> str:
        """The text of a dialog, for the assistant to continue."""
        try:
            return self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.variables,
            )
        except Exception as error:  # A template is a program, which may raise anything.
            why = one_line(error)
            raise ValueError(f"{self.path}: the chat template refuses the dialog: {why}") from error

    def is_instruct(self, bos: str, eos: str, is_v3: bool) -> bool:
        """Whether it writes Mistral's own format: v1's, or v3's with the system message elsewhere.

        What it writes decides, since templates of this format are worded in many ways. They differ
        in their spaces too, so these do not count, and many of them refuse a system message.
        """
        turns = [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "last"},
        ]
        text = f"{bos}[INST]first[/INST]answer{eos}[INST]last[/INST]"
        try:
            if without_spaces(self.render(turns)) != text:
                return False
        except ValueError:
            return False
        user = "last" if is_v3 else "first"
        try:
            with_system = self.render([{"role": "system", "content": "system"}, *turns])
        except ValueError:
            return True
        return without_spaces(with_system) == text.replace(f"]{user}[", f"]system{user}[")


def read_chat_template(
    folder: Path, config: dict, special: Mapping[str, str], names: Collection[str]
) -> ChatTemplate | None:
    """The chat template of a folder whose tokenizer_config.json is config, or None if it has none.

    special has the variables that config may leave out. Raises ValueError if the template cannot
    be read.
    """
    variables = read_variables(config, special)
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path, read_text(path), variables, names)
    path = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if template is None:
        return None
    source = default_of(template) if isinstance(template, list) else template
    if not isinstance(source, str):
        raise ValueError(f"{path}: chat_template is not a text, nor a list with a default one")
    return ChatTemplate(path, source, variables, names)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable text: download it again") from error


def default_of(templates: list) -> object:
    """One of several templates for several uses, or None if they lack a default."""
    for template in templates:
        if isinstance(template, dict) and template.get("name") == "default":
            return template.get("template")
    return None


def read_variables(config: dict, special: Mapping[str, str]) -> dict[str, str]:
    """The names of tokens in config, else in special. One that config has as null is left out."""
    variables = dict(special)
    for variable in VARIABLES:
        name = config.get(variable)
        if isinstance(name, dict):  # a token with its properties
            name = name.get("content")
        if isinstance(name, str):
            variables[variable] = name
        elif variable in config:
            variables.pop(variable, None)  # What is left out reads as an empty text.
    return variables


def compile_template(path: Path, source: str) -> Template:
    """Compile a template, with the functions and tags that transformers lets it use."""
    # A template is a program from a download, and could leave the sandbox of older versions.
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        raise ValueError("chat templates need jinja2 3.1.6 or later: pip install -U jinja2")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        why = f"line {error.lineno}: {error.message}"
    except Exception as error:  # noqa: BLE001 - such as RecursionError
        why = one_line(error)
    raise ValueError(f"{path}: the chat template is not valid Jinja: {why}")


class Generation(Extension):
    """{% generation %} and {% endgeneration %}, which mark answers for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson would write <, > and & as escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def without_spaces(text: str) -> str:
    return "".join(text.split())
