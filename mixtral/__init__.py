from .generation import Mixtral
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__all__ = ["Mixtral", "ModelArgs", "Tokenizer", "Transformer"]
