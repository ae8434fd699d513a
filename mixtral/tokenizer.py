"""Text to tokens and back, and the chat formats."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from sentencepiece import SentencePieceProcessor

from .tokenizer_json import Converted, Spaces, convert


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


Dialog = Sequence[Message]

# ChatML's, around each message.
START = "<|im_start|>"
END = "<|im_end|>"


class Tokenizer:
    """A checkpoint's SentencePiece model, and the tokens that fine-tuning has added to it.

    model_path is a tokenizer.model, or a tokenizer.json that was made from one, which names the
    added tokens. So does an added_tokens.json or a tokenizer_config.json beside it. bos_id and
    eos_id are SentencePiece's own, and n_words is one more than the largest id that has a name.
    Raises FileNotFoundError or ValueError if a file is not what it should be.
    """

    def __init__(self, model_path: str | Path):
        path = Path(model_path)
        self.sp_model, converted = load_sentencepiece(path)
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path} has no bos or no eos: use the checkpoint's own")

        config = read_json(path.parent / "tokenizer_config.json")
        own = dict(enumerate(all_pieces(self.sp_model)))
        added = read_added_tokens(path.parent, config, own)
        if converted is not None:
            config = config | {"added_tokens_decoder": converted.added_tokens}
            added = join(path.parent, added, added_by_config(path, config, own))
        check_added_tokens(path.parent, added, self.sp_model)
        self.pieces = own | added  # each token's piece of text, in which ▁ is a space
        self.n_words = max(self.pieces) + 1
        self.added_ids = {text: token for token, text in added.items()}
        # The longest is tried first, for one added token may begin another.
        longest_first = sorted(self.added_ids, key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

        # By default, which is called legacy, each piece of text between added tokens is encoded as
        # SentencePiece encodes a whole text, with a space before it.
        legacy = bool(config.get("legacy", True))
        self.spaces = Spaces(dummy_prefix=True, legacy=legacy, each=False)
        if converted is not None:
            self.spaces = converted.spaces
        self.is_chatml = START in self.added_ids and END in self.added_ids
        self.chatml_has_bos = template_has_bos(path.parent, config)
        self.is_v3 = self.sp_model.is_control(self.sp_model.piece_to_id("[INST]"))

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The tokens of a text, with a bos before it and an eos after it if asked for.

        An added token is one token wherever the text has it. The names of SentencePiece's own
        control tokens are letters, unless they are among the added ones. Raises ValueError if s is
        not a string of valid Unicode.
        """
        check_text(s)
        tokens = [self.bos_id] if bos else []
        if not self.added_ids:
            tokens += self.sp_model.encode(s)
        else:
            # split() returns a piece of text, an added token, a piece of text, and so on.
            for i, part in enumerate(self.added_pattern.split(s)):
                if i % 2 == 1:
                    tokens.append(self.added_ids[part])
                else:
                    tokens += self._encode_piece(part, is_first=i == 0)
        if eos:
            tokens.append(self.eos_id)
        return tokens

    def _encode_piece(self, text: str, is_first: bool) -> list[int]:
        """Encode text between added tokens; their names in it become plain text."""
        has_space = is_first or self.spaces.each
        if self.spaces.legacy or (has_space and not text.startswith((" ", "▁"))):
            return self.sp_model.encode(text)
        # SentencePiece adds a space at the beginning, where there must be none. This newline takes
        # the space and is cut off again; it is a byte, and so never merges with the text.
        newline = self.sp_model.encode("\n")
        return self.sp_model.encode("\n" + text)[len(newline) :]

    def decode(self, t: Sequence[int]) -> str:
        """The text of tokens: an added token becomes its name, a control token nothing.

        An id that has no name, as a padded vocabulary has some, becomes nothing too.
        """
        # SentencePiece decodes pieces as well as ids, and takes those it does not know as text.
        return self.sp_model.decode_pieces([self.pieces.get(token, "") for token in t])

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield decode(tokens) in parts as tokens come, never half a character.

        Only two things make a token's text depend on those before it: it may be one byte of a
        character, and the space at the very beginning of a text is left out. So decoding can start
        again from any token that has complete text of its own.
        """
        window: list[int] = []  # the latest tokens, which are decoded together
        sent = ""  # what has been yielded of the window's text
        for token in tokens:
            window.append(token)
            text = self.decode(window)
            # Replacement characters at the end may be the first bytes of a character.
            complete = text.rstrip("\ufffd")
            if complete != sent:
                yield complete[len(sent) :]
                sent = complete
            own = self.decode([token])
            if complete == text and own and not own.endswith("\ufffd"):
                window = [token]
                sent = own
        rest = self.decode(window)[len(sent) :]
        if rest:
            yield rest

    def is_special(self, token: int) -> bool:
        """Whether it has no text, being a control token or an id that has no name."""
        if 0 <= token < self.sp_model.vocab_size():
            return self.sp_model.is_control(token)
        return token not in self.pieces

    def is_byte(self, token: int) -> bool:
        """Whether it is one byte, of a character that may have several."""
        return 0 <= token < self.sp_model.vocab_size() and self.sp_model.is_byte(token)

    def encode_dialog(self, dialog: Dialog) -> list[int]:
        """Encode a dialog in the model's chat format, for the assistant to continue.

        No message can contain a control token or an added one: their names are letters in it.
        Raises ValueError if the dialog is malformed.
        """
        check_dialog(dialog)
        if self.is_chatml:
            return self._encode_chatml(dialog)
        return self._encode_instruct(dialog)

    def _encode_chatml(self, dialog: Dialog) -> list[int]:
        """Each message as <|im_start|>role\\ncontent<|im_end|>\\n, and the next one's beginning."""
        start = self.added_ids[START]
        end = self.added_ids[END]
        newline = self._encode_piece("\n", is_first=False)
        tokens = [self.bos_id] if self.chatml_has_bos else []
        for message in dialog:
            text = f"{message['role']}\n{message['content']}"
            tokens += [start, *self._encode_piece(text, is_first=False), end, *newline]
        return [*tokens, start, *self._encode_piece("assistant\n", is_first=False)]

    def _encode_instruct(self, dialog: Dialog) -> list[int]:
        """Mistral's format: v1 (8x7B) spells [INST] in letters, v3 (8x22B) has a token for it."""
        texts = [message["content"] for message in dialog]
        if dialog[0]["role"] == "system":
            system = texts.pop(0)
            message = -1 if self.is_v3 else 0  # the user's last one, or the first
            if system:
                texts[message] = f"{system}\n\n{texts[message]}"
        begin = self.sp_model.piece_to_id("[INST]")
        end = self.sp_model.piece_to_id("[/INST]")
        tokens = [self.bos_id]
        for i, text in enumerate(texts):
            if i % 2 == 1:  # the assistant's
                answer = text.rstrip(" ") if self.is_v3 else text  # as mistral-common does
                tokens += [*self._encode_message(answer), self.eos_id]
            elif self.is_v3:
                tokens += [begin, *self._encode_message(text), end]
            else:
                tokens += self._encode_message(f"[INST] {text} [/INST]")
        return tokens

    def _encode_message(self, text: str) -> list[int]:
        """Encode text with a space before it, which Mistral's formats have in any case."""
        if text and not self.spaces.dummy_prefix:
            return self.sp_model.encode(f" {text}")
        return self.sp_model.encode(text)

    def chat_hint(self, text: str) -> str | None:
        """What is wrong with a prompt that spells control tokens of a chat format, or None."""
        bos = self.pieces[self.bos_id]
        if text.lstrip().startswith(bos) and bos not in self.added_ids:
            return f"the {bos} that begins the prompt becomes letters: use --chat, or leave it out"
        for tag in ("[INST]", "[/INST]"):
            if self.is_v3 and tag in text and tag not in self.added_ids:
                return f"{tag} in a prompt becomes letters, never a control token: use --chat"
        return None


def load_sentencepiece(path: Path) -> tuple[SentencePieceProcessor, Converted | None]:
    """Load a tokenizer.model or a tokenizer.json, and return what only the latter says too.

    Raises FileNotFoundError or ValueError if it is neither.
    """
    if path.is_dir():
        what = "give the tokenizer.model or tokenizer.json in it"
        raise FileNotFoundError(f"no tokenizer at {path}, a folder: {what}")
    if not path.is_file():  # Opening a pipe would wait for its writer.
        raise FileNotFoundError(f"no tokenizer at {path}: give a tokenizer.model")
    if path.stat().st_size >= 2**26:  # such as weights that were given by mistake
        raise ValueError(f"{path} is too large for a tokenizer: give a tokenizer.model")
    try:
        content = path.read_bytes()  # SentencePiece would open only names that are UTF-8.
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    converted = None
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        converted = convert_json(path, content)
        content = converted.model
    sp_model = SentencePieceProcessor()
    try:
        sp_model.LoadFromSerializedProto(content)
        all_pieces(sp_model)  # raises UnicodeDecodeError if one is not UTF-8
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} {describe(content)}") from error
    return sp_model, converted


def convert_json(path: Path, content: bytes) -> Converted:
    try:
        tokenizer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: download it again") from error
    try:
        return convert(tokenizer)
    except ValueError as error:
        advice = "give the checkpoint's tokenizer.model"
        raise ValueError(f"{path} is JSON, but {error}: {advice}") from error


def all_pieces(sp_model: SentencePieceProcessor) -> list[str]:
    return sp_model.id_to_piece(list(range(sp_model.vocab_size())))


def describe(content: bytes) -> str:
    """What the content of a file that is not a SentencePiece model is, and what to do."""
    if content.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer in place of the tokenizer: run git lfs pull"
    return "is not a readable SentencePiece model: download it again"


def read_json(path: Path) -> dict:
    """The object in a JSON file, which is empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return content


def read_added_tokens(folder: Path, config: dict, own: Mapping[int, str]) -> dict[int, str]:
    """The tokens that files in folder add to SentencePiece's own, by id."""
    by_json = added_by_json(folder / "added_tokens.json", own)
    by_config = added_by_config(folder / "tokenizer_config.json", config, own)
    return join(folder, by_json, by_config)


def join(folder: Path, first: Mapping[int, str], second: Mapping[int, str]) -> dict[int, str]:
    """The tokens of two files, which must agree on those that are in both."""
    for token, text in second.items():
        if first.get(token, text) != text:
            names = f"{first[token]!r:.60} and {text!r:.60}"
            raise ValueError(
                f"{folder}: token {token} is {names} in two files: download them again"
            )
    return {**first, **second}


def added_by_json(path: Path, own: Mapping[int, str]) -> dict[int, str]:
    """The tokens of an added_tokens.json by id; it may name some of SentencePiece's own."""
    added: dict[int, str] = {}
    for text, token in read_json(path).items():
        if type(token) is not int or token < 0:
            raise ValueError(f"{path}: the id of {text!r:.60} is not a token id: {token!r:.40}")
        if token in added:
            raise ValueError(f"{path}: {text!r:.60} and {added[token]!r:.60} are both {token}")
        if own.get(token, text) != text:
            what = f"but the tokenizer.model has {own[token]!r:.60} there"
            raise ValueError(f"{path}: {text!r:.60} is token {token}, {what}")
        added[token] = text
    return added


def added_by_config(path: Path, config: dict, own: Mapping[int, str]) -> dict[int, str]:
    """The tokens of a tokenizer_config.json by id, without SentencePiece's own."""
    added: dict[int, str] = {}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: added_tokens_decoder is not a JSON object")
    for number, entry in decoder.items():
        if not number.isdecimal() or not isinstance(entry, dict):
            raise ValueError(f"{path}: the added token {number!r:.40} cannot be read")
        if int(number) in own:
            continue
        for flag in ("lstrip", "rstrip", "single_word"):  # By these, the text around it matters.
            if entry.get(flag):
                raise ValueError(f"{path}: {flag} of added token {number} is not supported")
        added[int(number)] = entry.get("content", "")
    return added


def check_added_tokens(
    folder: Path, added: dict[int, str], sp_model: SentencePieceProcessor
) -> None:
    for token, text in added.items():
        if not is_text(text) or not text:
            raise ValueError(f"{folder}: the added token {token} is not a text but {text!r:.60}")
        # decode() passes the names of added tokens through SentencePiece, which must return them
        # unchanged. It does not if the name is that of a control token or of a byte, as <0x0A>.
        is_own = token < sp_model.vocab_size()
        if not is_own and sp_model.decode_pieces(["a", text]) != f"a{text}":
            what = f"but it is {sp_model.piece_to_id(text)} in the tokenizer.model"
            raise ValueError(f"{folder} adds {text!r:.60} as token {token}, {what}")


def template_has_bos(folder: Path, config: dict) -> bool:
    """Whether ChatML begins with bos, as it does unless the checkpoint's template lacks it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return "bos_token" in path.read_text(encoding="utf-8", errors="replace")
    # This is one template or a list of several, and in each of them bos is called bos_token.
    template = config.get("chat_template")
    return template is None or "bos_token" in str(template)


def is_text(s: object) -> bool:
    """Whether it is a string without surrogates, at which SentencePiece would crash."""
    return isinstance(s, str) and not re.search("[\ud800-\udfff]", s)


def check_text(s: object) -> None:
    if not is_text(s):
        raise ValueError(f"a text must be a string of valid Unicode, not {s!r:.60}")


def check_dialog(dialog: Dialog) -> None:
    """Raise ValueError if dialog is not a list of messages whose roles take turns."""
    if not isinstance(dialog, (list, tuple)) or not dialog:
        raise ValueError(f"a dialog must be a list of messages, not {dialog!r:.60}")
    for message in dialog:
        check_message(message)
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError("a dialog's roles must be [system,] user, assistant, ..., user")


def check_message(message: object) -> None:
    if (
        not isinstance(message, Mapping)
        or "role" not in message
        or not isinstance(message.get("content"), str)
    ):
        what = "a message must be a dict with a role and a content, a string"
        raise ValueError(f"{what}, not {message!r:.60}")
    check_text(message["content"])
