import warnings

# Nothing here needs NumPy, of whose absence PyTorch complains as it is imported.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

from .generation import Mixtral
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__all__ = ["Mixtral", "ModelArgs", "Tokenizer", "Transformer"]
