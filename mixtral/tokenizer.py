"""Text to tokens and back, and the chat formats."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from sentencepiece import SentencePieceProcessor

from .tokenizer_json import Converted, Spaces, convert

if TYPE_CHECKING:
    from .chat import ChatTemplate


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


Dialog = Sequence[Message]

# ChatML's, around each message.
START = "<|im_start|>"
END = "<|im_end|>"


class Tokenizer:
    """A checkpoint's SentencePiece model, and the tokens that fine-tuning has added to it.

    model_path is a tokenizer.model, or a tokenizer.json that was made from one. Added tokens are
    named by the tokenizer.json, and by an added_tokens.json or a tokenizer_config.json beside it.
    bos_id and eos_id are SentencePiece's own, and n_words is one more than the largest id that has
    a name. add_bos says whether the model expects bos before a text that it is to complete. Raises
    FileNotFoundError or ValueError if a file is not what it should be.
    """

    def __init__(self, model_path: str | Path):
        path = Path(model_path)
        self.sp_model, converted = load_sentencepiece(path)
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path} has no bos or no eos: use the checkpoint's own")

        self.folder = path.parent
        self.config = read_json(self.folder / "tokenizer_config.json")
        own = dict(enumerate(all_pieces(self.sp_model)))
        added = read_added_tokens(self.folder, self.config, own)
        if converted is not None:
            self.config = self.config | {"added_tokens_decoder": converted.added_tokens}
            added = join(self.folder, added, added_by_config(path, self.config, own))
        check_added_tokens(self.folder, added, self.sp_model)
        self.pieces = own | added  # each token's piece of text, in which ▁ is a space
        self.n_words = max(self.pieces) + 1
        self.added_ids = {text: token for token, text in added.items()}
        # The longest is tried first, for one added token may begin another.
        longest_first = sorted(self.added_ids, key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

        # By default, which is called legacy, each piece of text between added tokens is encoded as
        # SentencePiece encodes a whole text, with a space before it.
        self.spaces = Spaces(bool(self.config.get("legacy", True)), before_each=False)
        if converted is not None:
            self.spaces = converted.spaces
        self.add_bos = adds_bos(self.folder, self.config, self.pieces[self.bos_id])
        self.is_chatml = START in self.added_ids and END in self.added_ids
        self.is_v3 = self.sp_model.is_control(self.sp_model.piece_to_id("[INST]"))

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The tokens of a text, with a bos before it and an eos after it if asked for.

        An added token is one token wherever the text has it. The names of SentencePiece's own
        control tokens are letters, unless they are among the added ones. Raises ValueError if s is
        not a string of valid Unicode.
        """
        check_text(s)
        tokens = [self.bos_id] if bos else []
        parts = self.added_pattern.split(s) if self.added_ids else [s]
        tokens += self._encode_parts(parts, self.added_ids)
        if eos:
            tokens.append(self.eos_id)
        return tokens

    def _encode_parts(self, parts: list[str], ids: Mapping[str, int]) -> list[int]:
        """Encode a piece of text, the name of a token in ids, a piece of text, and so on."""
        tokens = []
        for i, part in enumerate(parts):
            if i % 2 == 1:
                tokens.append(ids[part])
            else:
                tokens += self._encode_piece(part, is_first=i == 0)
        return tokens

    def _encode_piece(self, text: str, is_first: bool) -> list[int]:
        """Encode text between added tokens; a token's name in it is encoded as plain text."""
        if self._gets_space(text, is_first):
            return self.sp_model.encode(text)
        # SentencePiece adds a space at the beginning, where there must be none. This newline takes
        # the space and is cut off again; it is a byte, and so never merges with the text.
        newline = self.sp_model.encode("\n")
        return self.sp_model.encode("\n" + text)[len(newline) :]

    def _gets_space(self, text: str, is_first: bool) -> bool:
        """Whether a space is put before a text between added tokens."""
        if self.spaces.legacy:
            return True
        if text.startswith((" ", "▁")):
            return False
        return is_first or self.spaces.before_each

    def decode(self, t: Sequence[int]) -> str:
        """The text of tokens: an added token becomes its name, a control token nothing.

        An id without a name, such as a padded vocabulary has, becomes nothing too.
        """
        # SentencePiece decodes pieces as well as ids, and takes unknown pieces as text.
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

    def eos_ids(self) -> set[int]:
        """The tokens that end a text: SentencePiece's eos and tokenizer_config.json's eos_token."""
        name = self.config.get("eos_token")
        if isinstance(name, dict):  # a token with its properties
            name = name.get("content")
        named = {token for token, piece in self.pieces.items() if piece == name}
        return {self.eos_id, *named}

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
        Raises ValueError if the dialog is malformed or the checkpoint's chat template refuses it.
        """
        check_dialog(dialog)
        return self._encode_format(dialog)

    @functools.cached_property
    def _encode_format(self) -> Callable[[Dialog], list[int]]:
        """The method that encodes dialogs in the model's format, which its chat template decides.

        A template in Mistral's own format does not decide where spaces go: Mistral's models were
        trained with those of mistral-common. Raises ValueError if the template cannot be read.
        """
        from .chat import read_chat_template  # imports Jinja

        special = {
            "bos_token": self.pieces[self.bos_id],
            "eos_token": self.pieces[self.eos_id],
            "unk_token": self.pieces[self.sp_model.unk_id()],
        }
        template = read_chat_template(self.folder, self.config, special, self._named_ids)
        if template is None:
            return self._encode_chatml if self.is_chatml else self._encode_instruct
        if template.is_instruct(special["bos_token"], special["eos_token"], self.is_v3):
            return self._encode_instruct
        return functools.partial(self._encode_by_template, template)

    @functools.cached_property
    def _named_ids(self) -> dict[str, int]:
        """The tokens that are not text, by name: a chat template writes these names."""
        return named_pieces(self.sp_model, self.config) | self.added_ids

    def _encode_by_template(self, template: "ChatTemplate", dialog: Dialog) -> list[int]:
        parts = template.split(dialog)
        check_text("".join(parts))
        tokens = self._encode_parts(parts, self._named_ids)
        # SentencePiece finds its user-defined pieces in any text, so in a message too.
        found = Counter(tokens)
        written = Counter(parts[1::2])
        for name, token in self._named_ids.items():
            if found[token] > written[name] and not self.sp_model.is_unknown(token):
                raise ValueError(f"a message cannot contain {name!r:.60}: it would be a token")
        return tokens

    def _encode_chatml(self, dialog: Dialog) -> list[int]:
        """Each message as <|im_start|>role\\ncontent<|im_end|>\\n, and the next one's beginning."""
        start = self.added_ids[START]
        end = self.added_ids[END]
        newline = self._encode_piece("\n", is_first=False)
        tokens = [self.bos_id]
        for message in dialog:
            text = f"{message['role']}\n{message['content']}"
            tokens += [start, *self._encode_piece(text, is_first=False), end, *newline]
        return [*tokens, start, *self._encode_piece("assistant\n", is_first=False)]

    def _encode_instruct(self, dialog: Dialog) -> list[int]:
        """Mistral's format: v1 (8x7B) spells [INST] in letters, v3 (8x22B) has a token for it."""
        texts = [message["content"] for message in dialog]
        if dialog[0]["role"] == "system":
            system = texts.pop(0)
            of_user = -1 if self.is_v3 else 0  # the user's last message, or the first
            if system:
                texts[of_user] = f"{system}\n\n{texts[of_user]}"
        begin = self.sp_model.piece_to_id("[INST]")
        end = self.sp_model.piece_to_id("[/INST]")
        tokens = [self.bos_id]
        for i, text in enumerate(texts):
            if i % 2 == 1:  # the assistant's
                answer = text.rstrip(" ") if self.is_v3 else text  # as mistral-common does
                tokens += [*self.sp_model.encode(answer), self.eos_id]
            elif self.is_v3:
                tokens += [begin, *self.sp_model.encode(text), end]
            else:
                tokens += self.sp_model.encode(f"[INST] {text} [/INST]")
        return tokens

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
    """Load a tokenizer.model, or a tokenizer.json with what a SentencePiece model cannot say.

    Raises FileNotFoundError or ValueError if it is neither.
    """
    if path.is_dir():
        raise FileNotFoundError(
            f"no tokenizer at {path}, a folder: give the tokenizer.model or tokenizer.json in it"
        )
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
        advice = "give a tokenizer.model, the checkpoint's or that of the model it was made from"
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
        for flag in ("lstrip", "rstrip", "single_word"):  # They depend on the text around it.
            if entry.get(flag):
                raise ValueError(f"{path}: {flag} of added token {number} is not supported")
        added[int(number)] = entry.get("content", "")
    return added


def named_pieces(sp_model: SentencePieceProcessor, config: dict) -> dict[str, int]:
    """SentencePiece's own pieces that are not text, by name.

    They are its control pieces, the unknown one, and those that config lists as special tokens.
    """
    listed = config.get("added_tokens_decoder") or {}
    ids = {}
    for token, name in enumerate(all_pieces(sp_model)):
        entry = listed.get(str(token), {})
        is_special = entry.get("special") and entry.get("content") == name
        if is_special or sp_model.is_control(token) or sp_model.is_unknown(token):
            ids[name] = token
    return ids


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


def adds_bos(folder: Path, config: dict, bos: str) -> bool:
    """Whether a text to complete begins with bos: tokenizer.json says so, or else config.

    transformers takes these in the same order, but without either adds none since version 5.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return bool(config.get("add_bos_token", True))
    processor = read_json(path).get("post_processor")
    if not isinstance(processor, dict):
        return False
    # It is a Sequence of processors or a single one, and what it adds is in a template.
    for each in processor.get("processors", [processor]):
        if isinstance(each, dict) and bos in str(each.get("single")):
            return True
    return False


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
