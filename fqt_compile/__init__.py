"""1-bit fully quantized training as a compiler pass: ``torch.compile(model, backend="fqt1bit")``."""

from .backend import fqt1bit
from .config import FQTConfig
from .eager_fqt.model import eager
from .inspect.compare import Comparison, compare
from .inspect.explain import Report, explain
from .inspect.noise import GradientNoise, gradient_noise
from .recalibrate import recalibrate

__all__ = [
    "Comparison",
    "FQTConfig",
    "GradientNoise",
    "Report",
    "compare",
    "eager",
    "explain",
    "fqt1bit",
    "gradient_noise",
    "recalibrate",
]
__version__ = "0.1.0"
