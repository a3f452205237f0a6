"""`fqt1bit bench`: whole training steps of eager, Inductor and fqt1bit, timed in turn, with their memory."""

from .measure import bench, ratios
from .settings import ALLOCATORS, BFLOAT16, FLOAT32, MODELS, OURS, VARIANTS, BenchSettings
from .turns import BenchError

__all__ = [
    "ALLOCATORS",
    "BFLOAT16",
    "FLOAT32",
    "MODELS",
    "OURS",
    "VARIANTS",
    "BenchError",
    "BenchSettings",
    "bench",
    "ratios",
]
