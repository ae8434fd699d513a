"""Mistral's Mixtral in plain PyTorch. The README says in which order to read it."""

import importlib
import logging
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generation import Mixtral
    from .model import ModelArgs, Transformer
    from .tokenizer import Tokenizer

__all__ = ["Mixtral", "ModelArgs", "Tokenizer", "Transformer"]

MODULES = {
    "Mixtral": "generation",
    "ModelArgs": "model",
    "Tokenizer": "tokenizer",
    "Transformer": "model",
}


def __getattr__(name: str) -> object:
    """Import a class only when it is asked for.

    Importing PyTorch takes seconds, and the command line answers --help without it.
    """
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        # PyTorch complains if NumPy is absent, which nothing here needs.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        module = importlib.import_module(f".{MODULES[name]}", __name__)
    return getattr(module, name)


class StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is at the time. If that is closed or broken, does nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.write(f"{prefix}{record.getMessage()}\n")
            sys.stderr.flush()


# Without a handler Python would show only warnings, and without the prefix. If lines were passed on
# to the root logger, a program that configures that one would show each of them twice.
logger = logging.getLogger(__name__)
logger.addHandler(StderrHandler())
logger.setLevel(logging.INFO)
logger.propagate = False
