"""A checkpoint's own chat template: a program in Jinja that writes a dialog as text."""

import functools
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
VARIABLES = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]

# The first of the code points that stand in for letters: private use, above what fonts have.
FIRST_STAND_IN = 0x108000


class ChatTemplate:
    """The chat template that a file has.

    Besides the dialog, it can read the variables, such as bos_token. One of names becomes that
    token where the template writes it, and stays plain letters where a message has it. Raises
    ValueError if source is not valid Jinja.
    """

    def __init__(
        self, path: Path, source: str, variables: Mapping[str, str], names: Collection[str]
    ):
        self.path = path
        self.template = compile_template(path, source)
        self.variables = variables
        self.source = source
        letters = sorted(set("".join(names)))
        self.stand_ins = {ord(x): chr(FIRST_STAND_IN + i) for i, x in enumerate(letters)}
        self.originals = {ord(stand_in): chr(x) for x, stand_in in self.stand_ins.items()}
        # The longest is tried first, for one name may begin another.
        longest_first = sorted(names, key=len, reverse=True)
        self.name_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def split(self, messages: Messages) -> list[str]:
        """The text of a dialog: a piece of text, a token's name, a piece of text, and so on.

        Raises ValueError if the template fails, or if a name would have letters of a message.
        """
        used = set(self.source).union(*(message["content"] for message in messages))
        if not used.isdisjoint(self.stand_ins.values()):
            raise ValueError("a dialog must not have private-use characters from U+108000 on")
        # Where a message has a name, stand-ins take the place of its letters, so that the name is
        # not found afterwards. All else stays as it is, since the template may look at it.
        parts = self._split(messages, self._replace_names)
        # The template may still make a name of a message's letters, by joining messages or cutting
        # something out of one. It cannot if all letters of names are replaced: so both renderings
        # must have the same names.
        if self._split(messages, self._replace_letters)[1::2] != parts[1::2]:
            raise ValueError(f"{self.path}: the chat template makes tokens of a message's letters")
        return [part.translate(self.originals) for part in parts]

    def _replace_names(self, text: str) -> str:
        return self.name_pattern.sub(lambda name: self._replace_letters(name[0]), text)

    def _replace_letters(self, text: str) -> str:
        return text.translate(self.stand_ins)

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
        """Whether it writes Mistral's own format. v1 and v3 differ in the system message's place.

        The text that it writes decides, since templates of this format are worded in many ways.
        Spaces are ignored, in which they differ. Many of them refuse or ignore a system message.
        """
        turns = [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "last"},
        ]
        text = f"{bos}[INST]first[/INST]answer{eos}[INST]last[/INST]"
        if self._without_spaces(turns) != text:
            return False
        with_system = self._without_spaces([{"role": "system", "content": "system"}, *turns])
        user = "last" if is_v3 else "first"
        return with_system in (None, text, text.replace(f"]{user}[", f"]system{user}["))

    def _without_spaces(self, messages: Messages) -> str | None:
        """What it writes, without spaces, or None if it refuses the dialog."""
        try:
            return "".join(self.render(messages).split())
        except ValueError:
            return None


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
    # Templates are downloaded programs, and older versions have holes in their sandbox.
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        raise ValueError("chat templates need jinja2 3.1.6 or later: pip install -U jinja2")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own tojson would write <, > and & as escapes.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
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


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
