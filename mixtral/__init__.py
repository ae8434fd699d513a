import contextlib
import logging
import sys
import warnings

with warnings.catch_warnings():
    # PyTorch complains if NumPy is absent, which nothing here needs.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    from .generation import Mixtral
    from .model import ModelArgs, Transformer
    from .tokenizer import Tokenizer

__all__ = ["Mixtral", "ModelArgs", "Tokenizer", "Transformer"]


class StderrHandler(logging.Handler):
    """Writes lines to today's stderr; if that is closed or broken, it does nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stderr.write(f"{prefix}{record.getMessage()}\n")
            sys.stderr.flush()


logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)
logger.addHandler(StderrHandler())
logger.propagate = False
