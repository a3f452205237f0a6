"""What `bench` measures: the variants, the models by name and the settings of one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import FQTConfig
from ..errors import ConfigError, did_you_mean

CLASSES = 10
MODELS = {"vgg16-cifar": "fqt_compile.models:vgg16_cifar", "resnet18": "torchvision.models:resnet18"}
OURS = "fqt1bit"
OWN = (OURS, "fqt1bit bf16")
FLOAT32 = ("eager float32", "inductor float32")
SAVED_BASELINE = "inductor float32"
BFLOAT16 = ("eager bf16", "inductor bf16")
VARIANTS = (*FLOAT32, *BFLOAT16, *OWN)
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    # Large tensors from the heap, and a heap that is never given back: no page faults once the steps are warm.
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 26),
    },
}
BOTH = "both"
CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured.

    Fields
    ------
    model: a name in `MODELS`, or ``module:factory`` or ``path/to/file.py:factory`` (`models.make_model`).
    batch, size: images per step, of ``size`` x ``size`` pixels.
    threads: of torch.
    rounds: timed steps of every variant, taken in turn.
    warm: steps of every variant before those, after the first one, which compiles.
    config: the options of fqt1bit.
    baselines: time eager and Inductor too.
    only: names of the variants to measure, ``"fqt1bit"`` among them; empty: all that ``baselines`` allows.
    allocator: ``"default"`` (glibc's), ``"tuned"`` (keeps large blocks) or ``"both"``, each with processes of its own.
    memory: measure peak memory, which needs a process for every variant.
    phases: also break down the steps of fqt1bit.
    cold: compile with an empty cache of Inductor, so that ``compile_s`` is the time of a first run.

    Raises
    ------
    ConfigError: a value outside the accepted ones.
    """

    model: str = "vgg16-cifar"
    batch: int = 128
    size: int = 32
    threads: int = 1
    rounds: int = 7
    warm: int = 3
    config: FQTConfig = dataclasses.field(default_factory=FQTConfig)
    baselines: bool = True
    only: tuple[str, ...] = ()
    allocator: str = "default"
    memory: bool = True
    phases: bool = False
    cold: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "size", "threads", "rounds", "warm"):
            got = getattr(self, name)
            if isinstance(got, bool) or not isinstance(got, int) or got < 1:
                raise ConfigError(f"--{name}: got {got!r}; accepted: an integer >= 1")
        object.__setattr__(self, "only", tuple(self.only))
        for name in self.only:
            _check_choice("--only", name, list(VARIANTS))
        if self.only and OURS not in self.only:
            raise ConfigError(f"--only: got {', '.join(self.only)}; accepted: names with {OURS} among them; add {OURS}")
        _check_choice("--allocator", self.allocator, [*ALLOCATORS, BOTH])
        if ":" not in self.model:
            remedy = "PATH:FACTORY (another torchvision network is torchvision.models:NAME)"
            _check_choice("--model", self.model, list(MODELS), remedy)

    @property
    def arch(self) -> str:
        """``module:factory`` of the model."""
        return MODELS.get(self.model, self.model)

    @property
    def variants(self) -> tuple[str, ...]:
        """What is timed, in order."""
        measured = VARIANTS if self.baselines else OWN
        return tuple(name for name in measured if not self.only or name in self.only)

    @property
    def allocators(self) -> tuple[str, ...]:
        return tuple(ALLOCATORS) if self.allocator == BOTH else (self.allocator,)

    def record(self) -> dict[str, Any]:
        """As plain values, from which `from_record` makes an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> BenchSettings:
        return cls(**{**record, "config": FQTConfig.from_options(record["config"])})


def _check_choice(name: str, got: str, accepted: list[str], also: str = "") -> None:
    if got not in accepted:
        choices = ", ".join([*accepted, *([also] if also else [])])
        raise ConfigError(f"{name}: got {got!r}{did_you_mean(got, accepted)}; accepted: {choices}")
