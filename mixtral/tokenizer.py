"""Text to tokens and back."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

TAGS = ("[INST]", "[/INST]", "<s>", "</s>")


class Tokenizer:
    """A SentencePiece model with a bos and an eos token."""

    def __init__(self, model_path: str | Path):
        path = Path(model_path)
        if not path.is_file():  # opening a pipe would wait for its writer
            raise FileNotFoundError(f"no tokenizer at {path}: give a tokenizer.model")
        self.sp_model = SentencePieceProcessor()
        try:
            # SentencePiece would open only names that are UTF-8. The size has a limit
            # because a file of weights, given by mistake, may have gigabytes.
            content = path.read_bytes() if path.stat().st_size < 2**26 else b""
            self.sp_model.LoadFromSerializedProto(content)
            self.n_words = self.sp_model.vocab_size()
            self.sp_model.id_to_piece(list(range(self.n_words)))  # all are valid UTF-8
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            what = f"{path} is not a readable SentencePiece model: download it again"
            raise ValueError(what) from error
        self.bos_id, self.eos_id = self.sp_model.bos_id(), self.sp_model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no bos or no eos: use the checkpoint's own")

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        # SentencePiece would crash on a surrogate.
        if not isinstance(s, str) or re.search("[\ud800-\udfff]", s):
            raise ValueError(f"a text must be a string of valid Unicode, not {s!r:.60}")
        return [self.bos_id] * bos + self.sp_model.encode(s) + [self.eos_id] * eos

    def decode(self, t: list[int]) -> str:
        return self.sp_model.decode(t)

    def encode_dialog(self, dialog: Sequence[Mapping[str, str]]) -> list[int]:
        """Encode a dialog in the model's chat format, for the assistant to continue."""
        check_dialog(dialog)
        texts = [message["content"] for message in dialog]
        system = texts.pop(0) if dialog[0]["role"] == "system" else ""
        # The third format (8x22B) has control tokens, the first (8x7B) spells them out.
        begin, end = (self.sp_model.piece_to_id(tag) for tag in TAGS[:2])
        third = self.sp_model.is_control(begin)
        where = -1 if third else 0  # the user's message that the system's is put before
        texts[where] = f"{system}\n\n{texts[where]}" if system else texts[where]
        tokens = [self.bos_id]
        for i, text in enumerate(texts):
            if i % 2:  # the assistant's
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
            special = self.sp_model.is_byte(token) or self.sp_model.is_control(token)
            if whole == text and not special:
                window, sent = [token], self.decode([token])
        if rest := self.decode(window)[len(sent) :]:
            yield rest


def check_dialog(dialog: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError if dialog is not a list of messages whose roles take turns."""
    if not isinstance(dialog, (list, tuple)) or not dialog:
        raise ValueError(f"a dialog must be a list of messages, not {dialog!r:.60}")
    for message in dialog:
        good = isinstance(message, Mapping) and "role" in message
        if not good or not isinstance(message.get("content"), str):
            what = "a message must be a dict with a role and a content, a string"
            raise ValueError(f"{what}, not {message!r:.60}")
        if any(tag in message["content"] for tag in TAGS):
            raise ValueError(f"a message must not contain {', '.join(TAGS)}")
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError("a dialog's roles must be [system,] user, assistant, ..., user")
