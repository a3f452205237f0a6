"""The settings of a fine-tuning run, and the stages of training that follow from them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..config import FQTConfig
from ..errors import ConfigError

METHODS = ("float32", "qat", "fqt")
RUN_ONLY = ("out", "resume", "overwrite")  # settings that do not change what is computed


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """All that decides a run.

    Fields
    ------
    arch: a torchvision classifier, ``module:factory`` or ``path/to/file.py:factory``.
    data, data_root, size, limit: see `fqt_compile.finetune.data.load`.
    weights: ``"none"``, ``"DEFAULT"`` (torchvision's pre-trained ones) or a file with a state dict.
    qat_epochs, epochs: length of the first (pre-training, may be 0) and second (fine-tuning) stage.
    batch: images per training step; the rest of an epoch that does not fill one is left out.
    qat_lr, lr, head_lr: Adam's learning rate of the body in the first and in the second stage, and of the
        last linear layer; each stage follows half a cosine from there to 0.
    weight_decay: L2 penalty inside Adam.
    recalibrate: training batches from which BatchNorm's running statistics are measured before every evaluation
        (see `fqt_compile.recalibrate`), for all methods alike; 0 evaluates with those of the training.
    seed: of initialization, split, order of the images and gradient noise.
    threads: of torch, ``None`` leaves them as they are.
    methods: what to compare, of `METHODS`.
    config: the FQT options; the QAT stages use them with ``grad="exact"``.
    out: folder of checkpoints and results.
    resume, overwrite: continue the run in ``out``, or replace it.

    Raises
    ------
    ConfigError: a value outside the accepted ones.
    """

    arch: str = "fqt_compile.models:small_vgg"
    data: str = "digits"
    data_root: Path | None = None
    weights: str = "none"
    size: int = 32
    limit: int | None = None
    qat_epochs: int = 3
    epochs: int = 3
    batch: int = 64
    qat_lr: float = 3e-3
    lr: float = 1e-3
    head_lr: float = 3e-3
    weight_decay: float = 1e-5
    recalibrate: int = 8
    seed: int = 0
    threads: int | None = None
    methods: tuple[str, ...] = METHODS
    config: FQTConfig = dataclasses.field(default_factory=FQTConfig)
    out: Path = Path("runs/finetune")
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, low in {"size": 1, "epochs": 1, "qat_epochs": 0, "batch": 1, "recalibrate": 0, "seed": 0}.items():
            _check(name, getattr(self, name), low)
        for name in ("limit", "threads"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 1)
        for name in ("qat_lr", "lr", "head_lr", "weight_decay"):
            _check(name, getattr(self, name), 0, integer=False)
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise ConfigError(f"setting 'methods': got {self.methods!r}; accepted: {', '.join(METHODS)}")
        if self.resume and self.overwrite:
            raise ConfigError("settings 'resume' and 'overwrite' exclude each other; give one of them")

    def record(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one, as plain values; also for JSON."""
        values = {k: v for k, v in vars(self).items() if k not in (*RUN_ONLY, "config")} | vars(self.config)
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Training with one schedule from the last state of ``parent``; ``config`` None is float32."""

    name: str
    parent: str | None
    config: FQTConfig | None
    epochs: int
    lr: float


def plan(settings: FinetuneSettings) -> dict[str, list[Stage]]:
    """The stages of each method, in order; the first stage of ``qat`` and ``fqt`` is one and the same."""
    exact = settings.config.replace(grad="exact")
    variants = {
        "float32": ("float32-pretrained", None, None),
        "qat": ("qat-pretrained", exact, exact),
        "fqt": ("qat-pretrained", exact, settings.config),
    }
    stages: dict[str, list[Stage]] = {}
    for method in (name for name in METHODS if name in settings.methods):
        first, first_config, config = variants[method]
        if settings.qat_epochs:
            pretraining = Stage(first, None, first_config, settings.qat_epochs, settings.qat_lr)
            stages[method] = [pretraining, Stage(method, first, config, settings.epochs, settings.lr)]
        else:
            stages[method] = [Stage(method, None, config, settings.epochs, settings.lr)]
    return stages


def _check(name: str, got: Any, low: int, *, integer: bool = True) -> None:
    number = isinstance(got, int if integer else int | float) and not isinstance(got, bool)
    if not number or not low <= got < math.inf:
        noun = "an integer" if integer else "a finite number"
        raise ConfigError(f"setting {name!r}: got {got!r}; accepted: {noun} >= {low}")
