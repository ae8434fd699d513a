import warnings

with warnings.catch_warnings():
    # PyTorch complains if NumPy is absent, which nothing here needs.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    from .generation import Mixtral
    from .model import ModelArgs, Transformer
    from .tokenizer import Tokenizer

__all__ = ["Mixtral", "ModelArgs", "Tokenizer", "Transformer"]
