"""1-bit fully quantized training as a compiler pass: ``torch.compile(model, backend="fqt1bit")``."""

from .backend import fqt1bit
from .config import FQTConfig

__all__ = ["FQTConfig", "fqt1bit"]
__version__ = "0.1.0"
