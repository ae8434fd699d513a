"""Text to tokens and back."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """A SentencePiece model. Raises FileNotFoundError or ValueError where model_path is not one."""

    def __init__(self, model_path: str | Path):
        if not Path(model_path).is_file():
            raise FileNotFoundError(
                f"no tokenizer at {model_path}: give the path of the checkpoint's tokenizer.model"
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

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as its tokens come, never half a character; joined, it is decode() of all of them."""
        window, sent = [], ""
        for token in tokens:
            window.append(token)
            text = self.decode(window)
            # The replacement characters at the end may be bytes of a character whose others are still to come.
            whole = text.rstrip("\ufffd")
            if whole != sent:
                yield whole[len(sent) :]
                sent = whole
            # A piece of text after which nothing is open is all the context that what follows needs.
            if whole == text and not (
                self.sp_model.is_byte(token) or self.sp_model.is_control(token)
            ):
                window, sent = [token], self.decode([token])
        text = self.decode(window)
        if text != sent:
            yield text[len(sent) :]
