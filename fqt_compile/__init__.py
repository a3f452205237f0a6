"""1-bit fully quantized training as a compiler pass: ``torch.compile(model, backend="fqt1bit")``.

fqt1bit         the backend, which needs no import to be used by its name
FQTConfig       its options, each with what it accepts and means
explain         what is done with a model and why, without training it: a Report
compare         one step, layer by layer, against the reference, eager FQT and float: a Comparison
gradient_noise  bias and variance of a model's quantized gradients: a GradientNoise
eager           a model that computes the definition, without a compiler
status          which layers of a compiled model run on packed bits, and which do not: a Status
save, load      weights with the options they were trained with, in a file
recalibrate     BatchNorm's statistics for the weights as they are, before an evaluation
"""

from .backend import fqt1bit
from .config import FQTConfig
from .eager_fqt.model import eager
from .inspect.compare import Comparison, compare
from .inspect.explain import Report, explain
from .inspect.noise import GradientNoise, gradient_noise
from .recalibrate import recalibrate
from .saving import load, save
from .status import Status, status

__all__ = [
    "Comparison",
    "FQTConfig",
    "GradientNoise",
    "Report",
    "Status",
    "compare",
    "eager",
    "explain",
    "fqt1bit",
    "gradient_noise",
    "load",
    "recalibrate",
    "save",
    "status",
]
__version__ = "0.1.0"
