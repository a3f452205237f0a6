"""`fqt1bit finetune`: train with float32, QAT and FQT under one schedule and compare them."""

from .checkpoint import PLOT, RESULTS, CheckpointError
from .ranks import started_by_torchrun
from .report import table
from .settings import FinetuneSettings
from .training import DivergedError, finetune

__all__ = [
    "PLOT",
    "RESULTS",
    "CheckpointError",
    "DivergedError",
    "FinetuneSettings",
    "finetune",
    "started_by_torchrun",
    "table",
]
