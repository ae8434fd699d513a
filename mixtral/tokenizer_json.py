"""A tokenizer.json becomes the SentencePiece model that it was made from.

A folder that transformers 5 has saved has no tokenizer.model. Its tokenizer.json is a file of the
tokenizers library: https://huggingface.co/docs/tokenizers/components describes its parts. For
Mixtral and Llama 2 they are the pieces of a SentencePiece model, the order of their scores, and
what SentencePiece does with spaces, each written in another way.

SentencePiece loads a ModelProto, as sentencepiece_model.proto in the folder src of
https://github.com/google/sentencepiece defines it, in the encoding that
https://protobuf.dev/programming-guides/encoding describes.
"""

import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Types of pieces in a ModelProto.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
BYTE = 6

# What tokenizers does with the spaces of a text.
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DOUBLE = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}
# Metaspace puts a ▁ before a text that does not begin with one.
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
ALWAYS = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


class Spaces(NamedTuple):
    """How each piece of text between added tokens gets a space before it.

    If legacy, every piece gets one. If not, a piece that begins with a space never does; any other
    gets one if before_each, or if it begins the whole text.
    """

    legacy: bool
    before_each: bool


# Normalizers and pre-tokenizers as versions of transformers write them, and what they do.
FORMS = [
    ([PREPEND, REPLACE], [], Spaces(legacy=True, before_each=False)),  # 4
    ([REPLACE, DOUBLE], [ALWAYS], Spaces(legacy=True, before_each=False)),  # 5
    ([], [FIRST], Spaces(legacy=False, before_each=False)),  # 4, and 5's LlamaTokenizer
    ([REPLACE], [FIRST], Spaces(legacy=False, before_each=False)),  # 5
    ([], [ALWAYS], Spaces(legacy=False, before_each=True)),  # 5's LlamaTokenizer
]


class Converted(NamedTuple):
    """What a tokenizer.json says: a serialized ModelProto and what SentencePiece does not know.

    added_tokens has the form of added_tokens_decoder in a tokenizer_config.json: entries by id, and
    the ids are text. Some of these tokens may be pieces of the model.
    """

    model: bytes
    spaces: Spaces
    added_tokens: dict[str, dict]


def convert(tokenizer: Any) -> Converted:
    """Convert the content of a tokenizer.json.

    Raises ValueError if it was not made from a SentencePiece model like Mixtral's; the message is
    the end of a sentence about the file.
    """
    # Any part can be absent or of the wrong type, and using it then raises one of these errors.
    try:
        check_kind(tokenizer)
        return convert_parts(tokenizer)
    except UnicodeEncodeError as error:
        raise ValueError("it has a piece that is not valid Unicode") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("parts of it are absent or not what they should be") from error


def check_kind(tokenizer: Any) -> None:
    """Raise ValueError if it is a tokenizer of another kind."""
    if not isinstance(tokenizer, dict) or "model" not in tokenizer:
        raise ValueError("not a tokenizer.json")
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"its model is of the type {model.get('type')!r:.40}, not BPE")
    if "ByteLevel" in str(tokenizer.get("pre_tokenizer")):
        raise ValueError("its BPE is byte-level, as those of Llama 3 and Qwen are")
    if not model.get("byte_fallback"):
        raise ValueError("its BPE has no byte fallback")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("its BPE marks the parts of a word, as SentencePiece does not")


def convert_parts(tokenizer: dict) -> Converted:
    """Convert a tokenizer.json of the right kind."""
    pre_tokenizers = steps_of(tokenizer["pre_tokenizer"], "pretokenizers")
    user_defined: list[str] = []
    if pre_tokenizers and pre_tokenizers[-1]["type"] == "Split":
        user_defined = pieces_of_pattern(pre_tokenizers.pop())
    normalizers = steps_of(tokenizer["normalizer"], "normalizers")
    spaces = read_spaces(normalizers, pre_tokenizers)

    added_tokens = by_number(tokenizer["added_tokens"])
    model = tokenizer["model"]
    pieces = own_pieces(model["vocab"], added_tokens)
    refuse_normalized(added_tokens, len(pieces), normalizers)
    merges = [read_merge(merge) for merge in model["merges"]]
    ranks = rank_pieces(merges)

    types = {piece: type_by_name(piece, ranks) for piece in pieces}
    for piece in user_defined:
        types[piece] = USER_DEFINED
    for number, entry in added_tokens.items():
        if int(number) < len(pieces):
            types[entry["content"]] = CONTROL if entry["special"] else USER_DEFINED
    unknown = model["unk_token"] or "<unk>"
    types[unknown] = UNKNOWN
    if len(types) > len(pieces):  # one of these names is not a piece
        raise ValueError("it names a token that is not in its vocabulary")
    if list(types.values()).count(BYTE) != 256:
        raise ValueError("it does not have all 256 bytes")
    check_merges(merges, types)
    return Converted(write_model(types, ranks, unknown), spaces, added_tokens)


def steps_of(component: dict | None, name: str) -> list[dict]:
    """The steps of a Sequence of several, of a single one, or of none."""
    if component is None:
        return []
    return list(component[name]) if component["type"] == "Sequence" else [component]


def pieces_of_pattern(split: dict) -> list[str]:
    """The user-defined pieces, for which transformers 5.24 writes a pattern of alternatives."""
    if split["behavior"] != "Isolated" or split["invert"]:
        raise ValueError("it prepares texts as SentencePiece does not")
    alternatives = re.findall(r"(?:\\.|[^\\|])+", split["pattern"]["Regex"], re.DOTALL)
    return [re.sub(r"\\(.)", r"\1", each, flags=re.DOTALL) for each in alternatives]


def read_spaces(normalizers: list[dict], pre_tokenizers: list[dict]) -> Spaces:
    """What a tokenizer.json does with spaces.

    Versions 5.17 to 5.20 could lose the space before a text. Such a file is refused, since no
    model was trained with its tokens.
    """
    for known_normalizers, known_pre_tokenizers, spaces in FORMS:
        if normalizers == known_normalizers and pre_tokenizers == known_pre_tokenizers:
            return spaces
    raise ValueError("it prepares texts as SentencePiece does not")


def by_number(entries: list[dict]) -> dict[str, dict]:
    """The added tokens in the form of an added_tokens_decoder."""
    added_tokens: dict[str, dict] = {}
    for entry in entries:
        number = str(entry["id"])
        if number in added_tokens or not number.isdecimal():
            raise ValueError(f"its added token {number:.40} is there twice or not an id")
        added_tokens[number] = entry
    return added_tokens


def own_pieces(vocab: Mapping[str, int], added_tokens: Mapping[str, dict]) -> list[str]:
    """SentencePiece's own pieces in the order of their ids, without added tokens at the end."""
    by_id = {token: piece for piece, token in vocab.items()}
    if by_id.keys() != set(range(len(vocab))):
        raise ValueError("its vocabulary has ids that are absent or there twice")
    pieces = [by_id[token] for token in range(len(vocab))]
    while pieces and added_tokens.get(str(len(pieces) - 1), {}).get("content") == pieces[-1]:
        pieces.pop()
    return pieces


def refuse_normalized(
    added_tokens: Mapping[str, dict], n_pieces: int, normalizers: list[dict]
) -> None:
    """Raise ValueError if an added token is looked for after normalizers that add a ▁.

    One that follows no space may not be found then.
    """
    if PREPEND not in normalizers and DOUBLE not in normalizers:
        return
    for number, entry in added_tokens.items():
        if entry["normalized"] and int(number) >= n_pieces:
            raise ValueError(f"normalized of its added token {number} is not supported")


def read_merge(merge: Any) -> tuple[str, str]:
    """A merge is a pair, or was one string before tokenizers 0.20."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise ValueError("it has a merge that is not of two pieces")
    return (parts[0], parts[1])


def rank_pieces(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The rank of each piece in the order in which merges make them.

    SentencePiece has one score for a piece, however it is put together, so all merges that make a
    piece must follow one another. Those that make a run of ▁ need not: some runs have equal scores
    in Mixtral's model, and transformers 4 interleaved their merges.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        piece = left + right
        if piece not in ranks:
            ranks[piece] = len(ranks)
        elif ranks[piece] != len(ranks) - 1 and piece.strip("▁"):
            raise ValueError(f"its merges make {piece!r:.40} at different times")
    return ranks


def type_by_name(piece: str, ranks: Mapping[str, int]) -> int:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return BYTE
    # A longer piece that no merge makes cannot come from a text: 8x22B's [INST] is one.
    return NORMAL if len(piece) == 1 or piece in ranks else CONTROL


def check_merges(merges: Iterable[tuple[str, str]], types: Mapping[str, int]) -> None:
    """Raise ValueError unless merges are exactly those that SentencePiece would do.

    It has no list of merges, but merges any two neighbours that together are a normal piece.
    """
    normal = {piece for piece, kind in types.items() if kind == NORMAL}
    possible = set()
    for piece in normal:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in normal and pair[1] in normal:
                possible.add(pair)
    given = set()
    for left, right in merges:
        if types.get(left + right, NORMAL) == NORMAL:
            given.add((left, right))
    if given != possible:
        raise ValueError("its merges are not those that SentencePiece would do")


def write_model(types: Mapping[str, int], ranks: Mapping[str, int], unknown: str) -> bytes:
    """A ModelProto whose pieces are those of types, in this order."""
    fields = []
    for piece, kind in types.items():
        # Merges of a higher score come first. Pieces that no merge makes need no score.
        score = -ranks.get(piece, 0)
        content = bytes_field(1, piece.encode()) + float_field(2, score) + number_field(3, kind)
        fields.append(bytes_field(1, content))
    trainer_spec = (
        number_field(3, 2)  # model_type: BPE
        + number_field(35, 1)  # byte_fallback
        + bytes_field(45, unknown.encode())  # unk_piece
    )
    normalizer_spec = (
        bytes_field(1, b"identity")  # name
        + number_field(3, 1)  # add_dummy_prefix
        + number_field(4, 0)  # remove_extra_whitespaces
    )
    fields.append(bytes_field(2, trainer_spec))
    fields.append(bytes_field(3, normalizer_spec))
    return b"".join(fields)


# The encoding of protobuf: each field begins with its number and how it is written.


def number_field(field: int, number: int) -> bytes:
    return varint(field << 3) + varint(number)


def bytes_field(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def float_field(field: int, number: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", number)


def varint(number: int) -> bytes:
    """7 bits in each byte, the lowest first; the eighth says that another byte follows."""
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])
