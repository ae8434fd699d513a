"""A tokenizer.json as versions of transformers write it, made from a tokenizer.model."""

import functools
import json
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DOUBLE = {"type": "Replace", "pattern": {"Regex": "\\A▁"}, "content": "▁▁"}
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
ALWAYS = {**FIRST, "prepend_scheme": "always"}
# What each form does before it merges pieces: normalizers, then pre-tokenizers.
FORMS = {
    "4": ([PREPEND, REPLACE], []),
    "4, not legacy": ([], [FIRST]),
    "5.24": ([REPLACE, DOUBLE], [ALWAYS]),
    "5.24, not legacy": ([REPLACE], [FIRST]),
    "5, LlamaTokenizer": ([], [FIRST]),
    "5, LlamaTokenizer, legacy": ([], [ALWAYS]),
}
# Those whose merges have the order of SentencePiece's scores, in which ▁▁ comes last, not of ids.
FAITHFUL = ["4", "4, not legacy", "5.24", "5.24, not legacy"]


@functools.cache
def splits(model: Path) -> list[tuple[float, int, str, str]]:
    """Each normal piece cut in two others, with its score and its id."""
    sp = SentencePieceProcessor(model_file=str(model))
    normal = {}
    for token in range(sp.vocab_size()):
        special = sp.is_control(token) or sp.is_unknown(token) or sp.is_byte(token)
        if not special and token not in user_defined(sp):
            normal[sp.id_to_piece(token)] = token
    found = []
    for piece, token in normal.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                found.append((sp.get_score(token), token, piece[:cut], piece[cut:]))
    return found


def user_defined(sp: SentencePieceProcessor) -> list[int]:
    """Mistral's have one kind."""
    first = sp.piece_to_id("[REFERENCE_DOC_19]")
    return list(range(first, first + 20)) if first != sp.unk_id() else []


def sort_merges(found: list[tuple[float, int, str, str]], form: str) -> list:
    if form.startswith("4"):
        found = sorted(found, key=lambda split: (split[0], len(split[2]), len(split[3])))[::-1]
        return [f"{left} {right}" for _, _, left, right in found]
    if form in FAITHFUL:
        found = sorted(found, key=lambda split: (-split[0], *split[1:]))
    else:
        found = sorted(found, key=lambda split: (split[1], len(split[2])))
    return [[left, right] for _, _, left, right in found]


def added_token(token: int, content: str, special: bool = True) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": special}


def tokenizer_json(model: Path, form: str, added: dict[str, int]) -> dict:
    """The content of a tokenizer.json; added has the ids of added tokens by name."""
    sp = SentencePieceProcessor(model_file=str(model))
    pieces = [sp.id_to_piece(token) for token in range(sp.vocab_size())]
    normalizers, pre_tokenizers = FORMS[form]
    own = user_defined(sp)
    entries = []
    for token, piece in enumerate(pieces):
        if sp.is_control(token) or sp.is_unknown(token):
            entries.append(added_token(token, piece))
        elif token in own and "5.24" not in form:
            entries.append(added_token(token, piece, special=False))
    entries += [added_token(token, piece) for piece, token in added.items()]
    if own and "5.24" in form:
        longest_first = sorted([pieces[token] for token in own], key=len, reverse=True)
        pattern = {"Regex": "|".join(map(re.escape, longest_first))}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        pre_tokenizers = [*pre_tokenizers, split]
    is_llama = "LlamaTokenizer" in form
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        strip,
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": sequence("normalizers", normalizers),
        "pre_tokenizer": sequence("pretokenizers", pre_tokenizers, "5.24" not in form),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if is_llama else "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": bool(own) and "5.24" in form,
            "vocab": {piece: token for token, piece in enumerate(pieces)},
            "merges": sort_merges(splits(model), form),
        },
    }


def sequence(name: str, steps: list[dict], single: bool = False) -> dict | None:
    if not steps:
        return None
    return steps[0] if single else {"type": "Sequence", name: steps}


def save(folder: Path, content: dict) -> Path:
    """Write a tokenizer.json into folder, and return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path
