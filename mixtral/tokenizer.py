"""Text to tokens and back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

TAGS = ("[INST]", "[/INST]", "<s>", "</s>")


class Tokenizer:
    """A SentencePiece model; FileNotFoundError or ValueError where there is none."""

    def __init__(self, model_path: str | Path):
        if not Path(model_path).is_file():
            raise FileNotFoundError(
                f"no tokenizer at {model_path}: give the path of a tokenizer.model"
            )
        try:
            self.sp_model = SentencePieceProcessor(model_file=str(model_path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{model_path} is not a readable SentencePiece model: download it again"
            ) from error
        self.n_words = self.sp_model.vocab_size()
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        self.pad_id = self.sp_model.pad_id()

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + self.sp_model.encode(s) + [self.eos_id] * eos

    def decode(self, t: list[int]) -> str:
        return self.sp_model.decode(t)

    def encode_dialog(self, dialog: Sequence[Mapping[str, str]]) -> list[int]:
        """A dialog in its model's format, up to where the assistant speaks.

        The format is the first (8x7B) where the tags [INST] and [/INST] are plain text,
        and the third (8x22B) where they are tokens. Raises ValueError where the roles are
        not system, if any, then user and assistant in turn, or where a message holds tags.
        """
        system = [m["content"] for m in dialog[:1] if m["role"] == "system"]
        turns = list(dialog[len(system) :])
        roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
        if len(turns) % 2 == 0 or [m["role"] for m in turns] != roles:
            raise ValueError(
                "a dialog is a system message or none, then user, assistant, ..., user"
            )
        if any(tag in m["content"] for m in dialog for tag in TAGS):
            raise ValueError(f"a message must not contain {', '.join(TAGS)}")
        begin, end = (self.sp_model.piece_to_id(tag) for tag in TAGS[:2])
        third = self.sp_model.is_control(begin)
        joined = len(turns) - 1 if third else 0  # the turn that has the system's text
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
        """decode() of all tokens, in parts, as they come, never half a character."""
        window, sent = [], ""
        for token in tokens:
            window.append(token)
            text = self.decode(window)
            # Replacement characters at the end may be a character's first bytes.
            whole = text.rstrip("\ufffd")
            if whole != sent:
                yield whole[len(sent) :]
                sent = whole
            # Where nothing is open, this piece is all the context that others need.
            if whole == text and not (
                self.sp_model.is_byte(token) or self.sp_model.is_control(token)
            ):
                window, sent = [token], self.decode([token])
        text = self.decode(window)
        if text != sent:
            yield text[len(sent) :]
