"""The memory that the published models take of each card, as the README's table says."""

import re

import pytest
from conftest import ROOT

from mixtral import ModelArgs, Transformer
from mixtral.devices import memory_needed

V03 = {"dim": 6144, "n_layers": 56, "n_heads": 48, "hidden_dim": 16384}
SIZES = {"8x7B": ModelArgs(), "8x22B": ModelArgs(**V03, vocab_size=32768)}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_table_of_the_readme(name, int8):
    """GB on the first card, and on each other, with a cache of 4 rows of 4096 tokens."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {name + ' int8' * int8} \|(.*)\|$", readme, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    ours = []
    for n_devices in (1, 2, 4, 8):
        first, *others, on_host = memory_needed(SIZES[name], n_devices, int8=int8)
        assert on_host == 0
        assert len(set(others)) <= 1 and len(others) == n_devices - 1
        ours.append(", ".join(f"{size / 1e9:.1f}" for size in (first, *others[:1])))
    assert cells == ours


@pytest.mark.parametrize("name, size", [("8x7B", 93.4e9), ("8x22B", 281.3e9)])
def test_published_totals(name, size):
    """Weights alone, in bfloat16."""
    model = Transformer(SIZES[name], ["meta"])
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert total == pytest.approx(size, rel=1e-3)
