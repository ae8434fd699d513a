"""Text to tokens and back."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SURROGATE = re.compile("[\ud800-\udfff]")  # SentencePiece would crash on one
TAGS = ("[INST]", "[/INST]", "<s>", "</s>")
MAX_BYTES = 2**26  # a tokenizer.model has about 500 kB, a file of weights some GB


class Tokenizer:
    """A SentencePiece model with a bos and an eos token.

    Raises FileNotFoundError or ValueError if model_path is not one.
    """

    def __init__(self, model_path: str | Path):
        path = Path(model_path)
        if not path.is_file():  # opening a pipe would wait for its writer
            raise FileNotFoundError(
                f"no tokenizer at {path}: give the path of a tokenizer.model"
            )
        self.sp_model = SentencePieceProcessor()
        try:
            # Read here, because SentencePiece opens only file names that are UTF-8.
            content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
            self.sp_model.LoadFromSerializedProto(content)
            self.n_words = self.sp_model.vocab_size()
            self.sp_model.id_to_piece(list(range(self.n_words)))  # all are valid UTF-8
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a readable SentencePiece model: download it again"
            ) from error
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(
                f"{path} has no bos or no eos token: use the tokenizer.model "
                f"that belongs to the checkpoint"
            )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Raises ValueError if s is not a string or holds a lone surrogate."""
        if not isinstance(s, str) or SURROGATE.search(s):
            raise ValueError(f"a text must be a string of valid Unicode, not {s!r:.60}")
        return [self.bos_id] * bos + self.sp_model.encode(s) + [self.eos_id] * eos

    def decode(self, t: list[int]) -> str:
        return self.sp_model.decode(t)

    def encode_dialog(self, dialog: Sequence[Mapping[str, str]]) -> list[int]:
        """Encode a dialog in the model's chat format, for the assistant to continue.

        If [INST] and [/INST] are control tokens, it is the third format (8x22B),
        otherwise the first (8x7B), which spells them as text. Raises ValueError if the
        dialog is malformed or a message contains a tag.
        """
        check_dialog(dialog)
        system = [m["content"] for m in dialog[:1] if m["role"] == "system"]
        turns = dialog[len(system) :]
        begin, end = (self.sp_model.piece_to_id(tag) for tag in TAGS[:2])
        third = self.sp_model.is_control(begin)
        # The system message is put before the last (third) or the first user message.
        joined = len(turns) - 1 if third else 0
        tokens = [self.bos_id]
        for i, message in enumerate(turns):
            text = message["content"]
            if i == joined:
                text = "\n\n".join([*filter(None, system), text])
            if message["role"] == "assistant":
                text = text.rstrip(" ") if third else text
                tokens += self.encode(text, bos=False, eos=True)
            elif third:
                tokens += [begin, *self.encode(text, bos=False, eos=False), end]
            else:
                tokens += self.encode(f"[INST] {text} [/INST]", bos=False, eos=False)
        return tokens

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield decode(tokens) in parts as tokens come, never half a character."""
        window, sent = [], ""
        for token in tokens:
            window.append(token)
            text = self.decode(window)
            # Replacement characters at the end may be a character's first bytes.
            whole = text.rstrip("\ufffd")
            if whole != sent:
                yield whole[len(sent) :]
                sent = whole
            # After a complete character, the pieces that follow decode as they should
            # if only this piece precedes them.
            if whole == text and not (
                self.sp_model.is_byte(token) or self.sp_model.is_control(token)
            ):
                window, sent = [token], self.decode([token])
        text = self.decode(window)
        if text != sent:
            yield text[len(sent) :]


def check_dialog(dialog: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError if dialog is not a list of messages whose roles take turns."""
    if not isinstance(dialog, (list, tuple)) or not dialog:
        raise ValueError(f"a dialog must be a list of messages, not {dialog!r:.60}")
    for message in dialog:
        if (
            not isinstance(message, Mapping)
            or "role" not in message
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"a message must be a dict with a role and a content, "
                f"which is a string, not {message!r:.60}"
            )
        if any(tag in message["content"] for tag in TAGS):
            raise ValueError(f"a message must not contain {', '.join(TAGS)}")
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            "the roles of a dialog must be user, assistant, ..., user, "
            "with or without system before them"
        )
