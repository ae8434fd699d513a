"""From a downloaded folder to parameters: the sizes of a checkpoint, then its tensors, one by one.

The layout read here is the torrent's: `params.json` beside `consolidated.00.pth`, under the model's own names.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .model import ModelArgs, Transformer

WEIGHTS = "consolidated.00.pth"


def read_params(
    ckpt_dir: str | Path, max_seq_len: int, max_batch_size: int
) -> ModelArgs:
    """The sizes that a checkpoint states, without reading its weights."""
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder at {ckpt_dir}: give the folder that holds params.json and {WEIGHTS}"
        )
    for name in ("params.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {ckpt_dir}: download it next to the checkpoint's other files"
            )
    try:
        params = json.loads((folder / "params.json").read_text())
        sizes = {
            name: params[name]
            for name in (
                "dim",
                "n_layers",
                "head_dim",
                "hidden_dim",
                "n_heads",
                "n_kv_heads",
            )
        }
        sizes |= {
            name: params["moe"][name] for name in ("num_experts", "num_experts_per_tok")
        }
        sizes |= {name: params[name] for name in ("norm_eps", "vocab_size")}
    except KeyError as error:
        raise ValueError(
            f"{folder / 'params.json'} gives no {error}: it is not a Mixtral's"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / 'params.json'} is not the JSON of a checkpoint: {error}"
        ) from error
    theta = params.get("rope_theta", ModelArgs.rope_theta)
    return ModelArgs(
        **sizes,
        rope_theta=theta,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )


def read_tensors(ckpt_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint under the model's names, mapped from the file rather than read."""
    path = Path(ckpt_dir) / WEIGHTS
    try:
        # weights_only: a pickle can hold tensors, never code that runs.
        yield from torch.load(
            path, map_location="cpu", mmap=True, weights_only=True
        ).items()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and was not opened: it is not Mixtral's file"
        ) from error
    except (RuntimeError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a whole PyTorch checkpoint: download it again"
        ) from error


@torch.inference_mode()
def load_checkpoint(model: Transformer, ckpt_dir: str | Path) -> None:
    """Copy every tensor of the checkpoint to its parameter. Raises ValueError where they do not match one to one."""
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(ckpt_dir):
        parameter = parameters.pop(name, None)
        if parameter is None:
            raise ValueError(
                f"{ckpt_dir} holds a tensor {name} that the model has no place for"
            )
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in {ckpt_dir}, params.json says {tuple(parameter.shape)}"
            )
        parameter.copy_(tensor)
    if parameters:
        raise ValueError(
            f"{ckpt_dir} lacks {len(parameters)} of the model's tensors, {next(iter(parameters))} first"
        )
