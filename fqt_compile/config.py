"""The one configuration object: frozen, keyword-only, validated once."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "scope": ("step", "layer"),
    "prune": ("systematic", "bernoulli", "topk", "none"),
    "prune_weight": ("sample", "channel"),
    "importance": ("norm", "range", "uniform"),
    "grad": ("fqt", "exact", "psq"),
    "activation": ("auto", "sign", "threshold"),
    "threshold": ("auto", "sample", "batch"),
    "cut": ("batch_norm", "layer", "output"),
    "batch_norm": ("project", "drop"),
    "zero_point": ("grid", "free"),
    "weight_scale": ("xnor", "none"),
    "float_dtype": ("float32", "bfloat16"),
    "lowering": ("native", "eager", "triton"),
}
SKIP_GROUPS = ("first", "last", "downsample", "slow")
DEFAULT_SKIP = ("first", "last", "downsample")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "scope": "layer",
        "prune": "bernoulli",
        "importance": "range",
        "prune_weight": "channel",
        "zero_point": "free",
    },
    "v1": {"threshold": "batch", "cut": "layer", "batch_norm": "drop", "zero_point": "free"},
}
MAX_BITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FQTConfig:
    """What is quantized and how (derivations: docs/math.md; method: arXiv 2408.14267).

    Fields
    ------
    bits: gradient bits ``b``, 1..8.
    keep: kept fraction of gradient rows in (0, 1]; ``None`` means ``1 / bits``, the paper's budget of
        one one-bit product per product.
    scope: ``"step"`` chooses the rows once per step where the gradient enters the packed part of the
        network; ``"layer"`` (the paper) chooses at every site.
    prune: ``"systematic"`` (exactly K rows, unbiased), ``"bernoulli"`` (the paper, unbiased, random
        count), ``"topk"`` (the released code, biased), ``"none"`` (keep all rows).
    prune_weight: ``"sample"`` uses the same kept samples for the weight gradient; ``"channel"`` (the
        paper's SCQ) keeps output channels by their own importance.
    importance: of a row: L2 ``"norm"``, ``"range"`` (max - min, the paper) or ``"uniform"`` (control).
    grad: ``"fqt"``; ``"exact"`` (QAT: packed forward, float gradients); ``"psq"`` (one-bit per row).
    activation: ``"auto"`` picks ``threshold`` where the input is provably non-negative, else ``sign``.
    threshold: of the code ``threshold``: ``"auto"`` takes that of each channel from the BatchNorm before the layer,
        and else the mean of each sample; ``"sample"`` always the latter. No prediction depends on its neighbours.
        ``"batch"`` takes the mean of the batch (version 0.1: predictions depend on the batch).
    cut: with ``scope="step"``, where rows are chosen: ``"batch_norm"`` above the BatchNorm that the gradient of the
        packed layers comes from, ``"layer"`` directly above the packed layers, ``"output"`` at the model's outputs.
    batch_norm: the backward of BatchNorm on kept rows: ``"project"`` (orthogonal to 1 and to its input, as the exact
        gradient is), or ``"drop"`` (the share of the dropped rows is lost: biased; version 0.1).
    zero_point: ``"grid"``: an exact zero is a code, and sums over a channel are exact; ``"free"``: the least value (the
        paper).
    weight_scale: ``"xnor"`` (mean |W| per output channel) or ``"none"`` (1).
    skip: layers left in float: the groups ``first``, ``last``, ``downsample`` and ``slow`` (where the packed layer
        would be slower on this machine, by a model calibrated once: `kernels.cost`), and module paths or shell
        patterns such as ``"layer4.*"``.
    min_channels: layers with fewer input or output channels stay in float (packing them wastes words).
    check_finite: debug: raise `NonFiniteError`, naming the layer, when a NaN or Inf reaches a packed layer.
    float_dtype: the products of layers left in float run in ``"float32"`` (as the model says) or in
        ``"bfloat16"``, about twice as fast where the CPU has bfloat16 instructions; float32 models only.
    save_outputs: keep the integer outputs of the products for the backward (2 bytes an element, 4 where int16 is too
        small) instead of computing them again. Worth it where nothing is pruned (``keep=1``): with rows chosen once per
        step, only the kept ones are computed again, and nothing more is saved.
    reuse_memory: let the C library keep freed memory for the next step, in the whole process and for good (glibc;
        `kernels.memory`): page faults would cost as much as the products.
    lowering: ``"native"`` generated kernels inside Inductor; ``"eager"`` interprets the same rewritten
        graph with the reference operations (the oracle; needs no compiler); ``"triton"`` interprets it with the
        generated Triton kernels, on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``; tests the GPU path).

    Raises
    ------
    ConfigError: a value outside the accepted ones; the message names field, value and choices.
    """

    bits: int = 4
    keep: float | None = None
    scope: str = "step"
    prune: str = "systematic"
    prune_weight: str = "sample"
    importance: str = "norm"
    grad: str = "fqt"
    activation: str = "auto"
    threshold: str = "auto"
    cut: str = "batch_norm"
    batch_norm: str = "project"
    zero_point: str = "grid"
    weight_scale: str = "xnor"
    skip: tuple[str, ...] = DEFAULT_SKIP
    min_channels: int = 32
    check_finite: bool = False
    float_dtype: str = "float32"
    save_outputs: bool = False
    reuse_memory: bool = True
    lowering: str = "native"

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            _check_choice(name, getattr(self, name), accepted)
        _check_int("bits", self.bits, 1, MAX_BITS)
        _check_int("min_channels", self.min_channels, 1, None)
        for name in ("check_finite", "save_outputs", "reuse_memory"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(_message(name, getattr(self, name), "True or False"))
        if self.keep is not None:
            _check_keep(self.keep)
            object.__setattr__(self, "keep", float(self.keep))
        object.__setattr__(self, "skip", _normalize_skip(self.skip))

    @property
    def kept_fraction(self) -> Fraction:
        """``keep`` as an exact fraction: 1 for ``prune="none"`` and for modes that never prune."""
        if self.prune == "none" or self.grad != "fqt":
            return Fraction(1)
        if self.keep is None:
            return Fraction(1, self.bits)
        return Fraction(self.keep).limit_denominator(10**6)

    @property
    def prunes(self) -> bool:
        """Is anything pruned at all?"""
        return self.kept_fraction < 1

    @property
    def gradient_bits(self) -> int:
        """Bits per kept gradient entry: 1 for ``grad="psq"``."""
        return 1 if self.grad == "psq" else self.bits

    def canonical(self) -> str:
        """A stable text of all fields, used in cache keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def replace(self, **changes: Any) -> FQTConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> FQTConfig:
        """Build from ``torch.compile(options=...)``: field names, and ``preset`` (`PRESETS`) underneath them.

        Raises `ConfigError` for an unknown name, with the closest accepted one.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise ConfigError(f"options: got {type(options).__name__}; accepted: a mapping of option names to values")
        given = dict(options)
        preset = given.pop("preset", "default")
        _check_choice("preset", preset, tuple(PRESETS))
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(_unknown_name(name, [*names, "preset"]))
        return cls(**{**PRESETS[preset], **given})


def _message(field: str, got: object, accepted: str) -> str:
    return f"option {field!r}: got {got!r}; accepted: {accepted}"


def _did_you_mean(got: object, accepted: list[str]) -> str:
    close = difflib.get_close_matches(got, accepted, n=1) if isinstance(got, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unknown_name(name: object, names: list[str]) -> str:
    return f"unknown option {name!r}{_did_you_mean(name, names)}; accepted: {', '.join(sorted(names))}"


def _check_choice(field: str, got: object, accepted: tuple[str, ...]) -> None:
    if not isinstance(got, str) or got not in accepted:
        choices = ", ".join(repr(choice) for choice in accepted)
        raise ConfigError(_message(field, got, choices) + _did_you_mean(got, list(accepted)))


def _check_int(field: str, got: object, low: int, high: int | None) -> None:
    accepted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(got, bool) or not isinstance(got, int) or got < low or (high is not None and got > high):
        raise ConfigError(_message(field, got, accepted))


def _check_keep(got: object) -> None:
    if isinstance(got, bool) or not isinstance(got, int | float) or not 0 < got <= 1:
        raise ConfigError(_message("keep", got, "a number in (0, 1], or None for 1 / bits"))


def _normalize_skip(got: object) -> tuple[str, ...]:
    accepted = f"a list of {', '.join(map(repr, SKIP_GROUPS))}, module paths or patterns such as 'layer4.*'"
    if isinstance(got, str) or not isinstance(got, list | tuple | set | frozenset):
        raise ConfigError(_message("skip", got, accepted))
    if not all(isinstance(entry, str) and entry for entry in got):
        raise ConfigError(_message("skip", got, accepted))
    return tuple(sorted(got)) if isinstance(got, set | frozenset) else tuple(got)
