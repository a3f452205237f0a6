"""1-bit fully quantized training as a compiler pass: ``torch.compile(model, backend="fqt1bit")``."""

from .backend import fqt1bit
from .capturable import capturable
from .compare import Comparison, compare
from .config import FQTConfig
from .eager import eager
from .explain import Report, explain
from .recalibrate import recalibrate

__all__ = [
    "Comparison",
    "FQTConfig",
    "Report",
    "capturable",
    "compare",
    "eager",
    "explain",
    "fqt1bit",
    "recalibrate",
]
__version__ = "0.1.0"
