"""The router's choices against transformers', and what is shown of them."""

import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from helpers.reference import random_transformer, to_transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated.cuda import simulated_cuda

from mixtral import ModelArgs, Tokenizer, Transformer, routing
from mixtral.checkpoint import load_checkpoint, read_params

SIZES = {"dim": 16, "n_layers": 3, "head_dim": 8, "hidden_dim": 32, "n_heads": 4}
SIZES |= {"n_kv_heads": 2, "vocab_size": 50, "max_batch_size": 2, "max_seq_len": 64}
few = settings(max_examples=200, deadline=None, derandomize=True, database=None)
ANSI = re.compile(r"\x1b\[48;5;(\d+);38;5;(?:16|231)m([^\x1b]*)\x1b\[0m")


def check_route(model, tokens: list[int], devices: int, cpu_layers=0, int8=False):
    """routing.route() of the model on so many devices is transformers'."""
    args, state = model.params, model.state_dict()
    with simulated_cuda(devices):
        places = [f"cuda:{i}" for i in range(devices)] or ["cpu"]
        placed = Transformer(args, places, torch.float32, cpu_layers, int8)
        for name, tensor in placed.state_dict().items():
            if tensor.dtype == torch.int8:
                placed.get_submodule(name.removesuffix(".weight")).scale.fill_(1 / 64)
                state[name] = (64 * state[name]).round().clamp(-127, 127) / 64
                tensor.copy_(64 * state[name])
            else:
                tensor.copy_(state[name])
        got, weights = routing.route(placed, tokens)
    reference = to_transformers(args, state)
    output = reference(torch.tensor([tokens]), output_router_logits=True)
    probs = torch.stack(output.router_logits).detach().softmax(dim=-1)
    want, chosen = probs.topk(args.num_experts_per_tok)
    assert got.tolist() == chosen.tolist()
    want /= want.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "devices, cpu_layers, int8",
    [(0, 0, 0), (1, 0, 0), (2, 0, 0), (4, 0, 0), (2, 1, 0), (0, 0, 1), (2, 1, 1)],
)
@pytest.mark.parametrize("n_experts, top_k, length", [(8, 2, 22), (4, 3, 14), (16, 1, 1)])
def test_route(monkeypatch, devices, cpu_layers, int8, n_experts, top_k, length):
    """22 tokens in pieces of 7 leave one for the last."""
    monkeypatch.setattr(routing, "prefill_tokens", lambda device: 7)
    moe = {"num_experts": n_experts, "num_experts_per_tok": top_k}
    model = random_transformer(ModelArgs(**SIZES, **moe))
    tokens = torch.randint(50, (length,), generator=torch.Generator().manual_seed(1))
    check_route(model, tokens.tolist(), devices, cpu_layers, int8)


@pytest.mark.parametrize("devices", [0, 1, 2, 4])
def test_route_of_the_demo(demo, devices):
    text = (demo / "heldout.txt").read_text(encoding="utf-8")[:600]
    model = Transformer(read_params(demo, 256, 1), dtype=torch.float32)
    load_checkpoint(model, demo)
    tokens = Tokenizer(demo / "tokenizer.model").encode(text, bos=True, eos=False)
    check_route(model, tokens, devices)


def test_route_leaves_the_model_as_it_was(monkeypatch):
    """Also if it fails; and a recorded step, which would run no hooks, is not used."""
    model = random_transformer(ModelArgs(**SIZES))
    model.decoder = decoder = object()
    forward = model.forward_packed

    def watch(tokens, *args, **kwargs):
        assert model.decoder is None
        if tokens.tolist() == [2]:
            raise RuntimeError("out of memory")
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "forward_packed", watch)
    routing.route(model, [1])
    with pytest.raises(RuntimeError, match="out of memory"):
        routing.route(model, [2])
    assert model.decoder is decoder
    assert not any(layer.feed_forward.gate._forward_hooks for layer in model.layers)


@pytest.mark.parametrize("tokens, said", [([], "no tokens"), ([50], "50"), ([1] * 65, "65")])
def test_tokens_that_cannot_be_routed(tokens, said):
    model = random_transformer(ModelArgs(**SIZES))
    with pytest.raises(ValueError, match=said):
        routing.route(model, tokens)


@pytest.fixture(scope="module", params=["v1", "v3", "demo"])
def tokenizer(request) -> Tokenizer:
    path = request.getfixturevalue(request.param)
    return Tokenizer(path / "tokenizer.model" if path.is_dir() else path)


# A byte's value, a special token or a share of the vocabulary.
byte = st.one_of(st.integers(0, 255), st.integers(0x80, 0xBF), st.integers(0xC2, 0xF4))
token = st.one_of(byte, st.sampled_from(["▁", "<s>", "</s>", "<unk>"]), st.floats(0, 1))


def find(tokenizer: Tokenizer, token: str | float) -> int:
    model = tokenizer.sp_model
    if isinstance(token, float):
        return int(token * (tokenizer.n_words - 1))
    return model.piece_to_id(token if isinstance(token, str) else f"<0x{token:02X}>")


@few
@given(drawn=st.lists(token), text=st.text(max_size=10))
@example(drawn=["<s>", "▁", "▁", "<s>", "▁", 0.9, 0xC3, "</s>", 0xA9], text="")
@example(drawn=[*"é\ufffd🦆".encode(), 0xF0, 0x9F, 0xA6, 0.5, 0xA6], text="")
def test_pieces_are_the_text(tokenizer, drawn, text):
    tokens = [find(tokenizer, each) for each in drawn]
    tokens += tokenizer.encode(text, bos=False, eos=False)
    pieces = routing.split(tokenizer, tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == tokenizer.decode(tokens)


def test_a_character_belongs_to_its_first_token(tokenizer):
    tokens = [find(tokenizer, each) for each in ["<s>", *"龘é".encode(), 0xE2, "▁"]]
    want = ["", "龘", "", "", "é", "", "\ufffd", " "]
    assert routing.split(tokenizer, tokens) == want


def test_split_reads_each_token_a_few_times(tokenizer):
    """A copy of all that follows, for each token, would take seconds for a long text."""

    class Counted(list):
        copied = 0

        def __getitem__(self, key):
            part = super().__getitem__(key)
            Counted.copied += len(part) if isinstance(key, slice) else 1
            return part

    tokens = Counted(tokenizer.encode("naïve 🦆 " * 100, bos=True, eos=False))
    assert "".join(routing.split(tokenizer, tokens)) == tokenizer.decode(list(tokens))
    assert Counted.copied < 10 * len(tokens)


def test_a_token_that_a_fine_tune_added(demo, monkeypatch):
    """SentencePiece does not know its number; the tokenizer may know its text."""
    tokenizer = Tokenizer(demo / "tokenizer.model")
    added = {2048: "<|im_end|>", 2049: ""}

    def decode(tokens: list[int]) -> str:
        text = ""
        for token in tokens:
            text += added[token] if token in added else tokenizer.sp_model.id_to_piece(token)
        return text.replace("▁", " ").removeprefix(" ")

    monkeypatch.setattr(tokenizer, "decode", decode)
    (king,) = tokenizer.encode("king", bos=False, eos=False)
    pieces = routing.split(tokenizer, [king, 2048, king, 2049, king])
    assert pieces == ["king", "<|im_end|>", " king", "", " king"]


TEXT = "Who  does\twhat? <&>\"'\r\n\n混合 e\u0301 \x1b[31m\x00\x7f\x9b\ufffe 🦆\n" + "m" * 200
UNSAFE = re.compile("[\x00\r\x1b\x7f\x9b\ufffe]")
SHOWN = UNSAFE.sub("\ufffd", TEXT)


def choices(layers: int, n_experts: int) -> tuple[list[str], torch.Tensor]:
    """TEXT in pieces, and experts that differ from layer to layer."""
    pieces = ["", *re.findall(r"\n|[^\n]{1,3}", TEXT)]
    first = torch.arange(len(pieces)) * 5 + torch.arange(layers)[:, None]
    return pieces, torch.stack((first, first + 1), dim=-1) % n_experts


def show(monkeypatch, terminal: bool, no_color: str, layers=5, n_experts=8) -> str:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("COLUMNS", "60")
    return routing.show(*choices(layers, n_experts), n_experts)


@pytest.mark.parametrize("terminal, no_color", [(False, ""), (True, "1")])
def test_numbers(monkeypatch, terminal, no_color):
    shown = show(monkeypatch, terminal, no_color)
    pieces, chosen = choices(5, 8)
    assert "\x1b" not in shown
    for layer in (0, 4):
        marked = "".join(
            f"↵[{e}]\n" if piece == "\n" else f"{piece}[{e}]"
            for piece, e in zip(pieces, chosen[layer, :, 0].tolist())
            if piece
        )
        assert "\n" + UNSAFE.sub("\ufffd", marked) + "\n" in shown
    assert re.findall("Layer (.):", shown) == ["0", "4"]


def test_colours(monkeypatch):
    """A newline is a mark at the end of its line, and no colour goes on to the next."""
    shown = show(monkeypatch, True, "")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ANSI.sub("", shown))
    for block in shown.rstrip("\n").split("\n\n"):
        _, legend, *lines = block.split("\n")
        assert len({colour for colour, _ in ANSI.findall(legend)}) == 8
        found = [ANSI.findall(line) for line in lines]
        assert all(ANSI.sub("", line) == "" for line in lines)
        text = "\n".join("".join(text for _, text in line) for line in found)
        assert text == SHOWN.replace("\n", "↵\n")


def test_numbers_tell_experts_of_one_colour_apart(monkeypatch):
    assert "Who[5]" in ANSI.sub(r"\2", show(monkeypatch, True, "", n_experts=16))


def test_figures(monkeypatch):
    """Two of three neighbours share their first expert; second choices count nowhere."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    chosen = torch.tensor([[[3, 1], [3, 0], [3, 1], [0, 3]]])
    shown = routing.show(["a", "b", "c", "d"], chosen, 4)
    assert "66.7% of neighbours" in shown and "25.0% by chance" in shown
    assert " 0: 25%  1: 0%  2: 0%  3: 75% \n" in shown


@pytest.mark.parametrize("layers, n_layers", [(1, 1), (2, 2), (5, 2)])
def test_svg(layers, n_layers):
    root = ElementTree.fromstring(routing.svg(*choices(layers, 8), 8))
    name = "{http://www.w3.org/2000/svg}"
    spans = list(root.iter(f"{name}tspan"))
    places = [(float(span.get("x")), float(span.get("y"))) for span in spans]
    text = "".join(root.find(f"{name}text").itertext())
    assert "\n" not in text  # it would be drawn as a space
    assert text.count("Layer") == text.count(SHOWN.replace("\n", "↵")) == n_layers
    # A cell follows another on its line or begins the next, and stays in the picture.
    ends = [x + float(s.get("textLength")) for s, (x, _) in zip(spans, places)]
    assert max(ends) <= 830 and max(places)[1] < float(root.get("height"))
    for end, (_, before), (x, y) in zip(ends, places, places[1:]):
        assert (y == before and abs(x - end) < 0.11) or (y > before and x == 16)
    # Every cell has a box of its size, of the colour of its expert.
    boxes = [r for r in root.iter(f"{name}rect") if r.get("x")]
    assert len({box.get("fill") for box in boxes}) == 8
    boxes = {(float(b.get("x")), float(b.get("y")) + 15): b for b in boxes}
    first = choices(layers, 8)[1][-1, :, 0].tolist()
    # The first token, bos, has no text and no cell.
    last = list(zip(spans, places))[1 - len(first) :]
    for (span, place), expert in zip(last, first[1:], strict=True):
        colour = routing.COLOURS[expert]
        assert boxes[place].get("fill") == colour.rgb and span.get("fill") == colour.ink
