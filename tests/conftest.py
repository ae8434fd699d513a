"""What all tests share: checkpoints to load, and GPU tests that skip by themselves."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest_plugins = ["helpers.gpus"]  # its fixture
ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # quickest for models this small


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def script() -> Path:
    return ROOT / "example_text_completion.py"


@pytest.fixture(scope="session")
def demo() -> Path:
    """The small trained checkpoint that is part of the repository."""
    folder = ROOT / "tests" / "demo"
    files = ("consolidated.00.pth", "params.json", "tokenizer.model", "heldout.txt")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        pytest.fail(f"tests/demo lacks {', '.join(missing)}")
    return folder


def published_tokenizer(name: str) -> Path:
    """A tokenizer of a published checkpoint: mistral-common ships them."""
    mistral_common = pytest.importorskip("mistral_common")
    return Path(mistral_common.__file__).parent / "data" / name


@pytest.fixture(scope="session")
def v1() -> Path:
    """The tokenizer of 8x7B."""
    return published_tokenizer("tokenizer.model.v1")


@pytest.fixture(scope="session")
def v3() -> Path:
    """The tokenizer of 8x22B v0.3: it has 768 more pieces than 8x7B's."""
    return published_tokenizer("mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, v1) -> Path:
    """A downloaded folder whose model is tiny and whose weights are random."""
    from helpers.reference import random_transformer

    from mixtral import ModelArgs

    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"dim": 16, "n_layers": 2, "head_dim": 8, "hidden_dim": 32}
    sizes |= {"n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 32000}
    moe = {"num_experts_per_tok": 2, "num_experts": 8}
    args = ModelArgs(**sizes, **moe, max_seq_len=1, max_batch_size=1)
    state = random_transformer(args).state_dict()
    # bfloat16() copies: a view would be saved with all of the tensor it is part of.
    tensors = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(sizes | {"moe": moe}))
    shutil.copy(v1, folder / "tokenizer.model")
    return folder


# Checkpoints of helpers/checkpoints.py's tiny model


@pytest.fixture(scope="session")
def source():
    """The model that is written to the folders."""
    from helpers.checkpoints import ARGS
    from helpers.reference import random_transformer

    return random_transformer(ARGS, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def folders(source, tmp_path_factory) -> dict[str, Path]:
    """The model in each layout, not to be changed."""
    from helpers.checkpoints import ARGS
    from helpers.layouts import LAYOUTS, write

    top = tmp_path_factory.mktemp("layouts")
    state = source.state_dict()
    return {layout: write(top / layout, layout, ARGS, state) for layout in LAYOUTS}


@pytest.fixture
def copy_of(folders, tmp_path):
    """copy_of(layout) is a folder to change."""
    return lambda layout: shutil.copytree(folders[layout], tmp_path / "model")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages that the package logs, from INFO up, as they come."""
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("mixtral")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)
