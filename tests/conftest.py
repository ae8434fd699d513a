"""What all tests share: the package on the path, and checkpoints to load."""

import json
import shutil
import sys
from pathlib import Path

import mistral_common
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tests run without the package being installed
torch.set_num_threads(1)  # quickest for models this small


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")


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
    return Path(mistral_common.__file__).parent / "data" / name


@pytest.fixture(scope="session")
def v1() -> Path:
    """8x7B's tokenizer."""
    return published_tokenizer("tokenizer.model.v1")


@pytest.fixture(scope="session")
def v3() -> Path:
    """8x22B's tokenizer, of v0.3: it has 768 more pieces than 8x7B's."""
    return published_tokenizer("mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, v1) -> Path:
    """A downloaded folder in every respect but the sizes and the weights' sense."""
    from reference import random_transformer

    from mixtral import ModelArgs

    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"dim": 16, "n_layers": 2, "head_dim": 8, "hidden_dim": 32}
    sizes |= {"n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 32000}
    moe = {"num_experts_per_tok": 2, "num_experts": 8}
    args = ModelArgs(**sizes, **moe, max_seq_len=1, max_batch_size=1)
    tensors = {
        name: tensor.bfloat16()
        for name, tensor in random_transformer(args).state_dict().items()
    }
    # Clones: a view is saved with the whole of the tensor that it is a part of.
    torch.save(
        {name: tensor.clone() for name, tensor in tensors.items()},
        folder / "consolidated.00.pth",
    )
    (folder / "params.json").write_text(json.dumps(sizes | {"moe": moe}))
    shutil.copy(v1, folder / "tokenizer.model")
    return folder
