"""The one configuration object: frozen, keyword-only, validated once.

Every option is declared once, as a field made by `option`: its default, what it accepts and what it means. Validation
and error messages, the class's docstring, the help of the command line and the table in README (`option_table`,
written by ``python docs/option_table.py``) all come from there.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from .errors import ConfigError, did_you_mean

SKIP_GROUPS = ("first", "last", "downsample", "slow")
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


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The values that an option accepts.

    text: in words. admits: is this one of them? kept_as: the form in which it is kept. names: the accepted words, if
    these are all, to find the one that was meant.
    """

    text: str
    admits: Callable[[Any], bool]
    kept_as: Callable[[Any], Any] = lambda value: value
    names: tuple[str, ...] = ()

    def checked(self, name: str, got: Any) -> Any:
        """The value of the option ``name`` in the form in which it is kept; `ConfigError` if it is not accepted."""
        if not self.admits(got):
            raise ConfigError(f"option {name!r}: got {got!r}; accepted: {self.text}{did_you_mean(got, self.names)}")
        return self.kept_as(got)


def choice(*names: str) -> Accepted:
    """One of some words."""
    return Accepted(", ".join(map(repr, names)), lambda got: isinstance(got, str) and got in names, names=names)


def integer(low: int, high: int | None = None) -> Accepted:
    """An integer, which True and False are not."""
    text = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    return Accepted(text, lambda got: _is_number(got, int) and low <= got and (high is None or got <= high))


def _is_number(got: Any, kind: Any) -> bool:
    return isinstance(got, kind) and not isinstance(got, bool)


def _is_fraction(got: Any) -> bool:
    return got is None or (_is_number(got, int | float) and 0 < got <= 1)


def _are_names(got: Any) -> bool:
    return isinstance(got, list | tuple | set | frozenset) and all(isinstance(name, str) and name for name in got)


FLAG = Accepted("True or False", lambda got: isinstance(got, bool))
KEPT_FRACTION = Accepted(
    "a number in (0, 1], or None for 1 / bits", _is_fraction, lambda got: None if got is None else float(got)
)
LAYERS = Accepted(
    f"a list of {', '.join(map(repr, SKIP_GROUPS))}, module paths or patterns such as 'layer4.*'",
    _are_names,
    lambda got: tuple(sorted(got) if isinstance(got, set | frozenset) else got),
)
PRESET = choice(*PRESETS)
PRESET_MEANING = (
    "values for other options, which those given replace: 'paper' sets scope, prune, importance, prune_weight and "
    "zero_point as published; 'v1' is the estimator of version 0.1"
)


def option(default: Any, accepted: Accepted, meaning: str) -> Any:
    """A field of `FQTConfig`. ``meaning`` is read in the docstring, in ``--help`` and in README: plain text."""
    return dataclasses.field(default=default, metadata={"accepted": accepted, "meaning": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FQTConfig:
    """What is quantized and how (definitions: docs/math.md; method: arXiv 2408.14267).

    Raises
    ------
    ConfigError: a value outside the accepted ones; the message names field, value and choices.
    """

    bits: int = option(4, integer(1, 8), "bits of a gradient entry")
    keep: float | None = option(
        None,
        KEPT_FRACTION,
        "kept fraction of gradient rows, the knob between speed and accuracy; None is 1 / bits, the paper's budget of "
        "one one-bit product per product",
    )
    scope: str = option(
        "step",
        choice("step", "layer"),
        "rows are chosen once per step, where the gradient enters the packed part of the network, or at every 'layer' "
        "(the paper)",
    )
    prune: str = option(
        "systematic",
        choice("systematic", "bernoulli", "topk", "none"),
        "exactly K rows, unbiased; 'bernoulli': a random number of rows, unbiased (the paper); 'topk': the most "
        "important rows, biased (the released code); 'none': all rows",
    )
    prune_weight: str = option(
        "sample",
        choice("sample", "channel"),
        "the weight gradient from the same kept samples, or from output channels kept by their own importance (the "
        "paper's SCQ)",
    )
    importance: str = option(
        "norm",
        choice("norm", "range", "uniform"),
        "of a row: its L2 norm, its max - min (the paper), or the same for all rows (a control)",
    )
    grad: str = option(
        "fqt",
        choice("fqt", "exact", "psq"),
        "quantized gradients; 'exact': float gradients of the packed forward (QAT); 'psq': one bit per entry, scaled "
        "per row",
    )
    activation: str = option(
        "auto",
        choice("auto", "sign", "threshold"),
        "code of activation bits: 'threshold' where the input is provably non-negative, else 'sign'; or always one of "
        "them",
    )
    threshold: str = option(
        "auto",
        choice("auto", "sample", "batch"),
        "of the code 'threshold': of each channel from the BatchNorm before the layer, else the mean of each sample; "
        "'sample': always that mean; 'batch': the mean of the batch, so that predictions depend on the batch (version "
        "0.1)",
    )
    cut: str = option(
        "batch_norm",
        choice("batch_norm", "layer", "output"),
        "where rows are chosen once per step: above the BatchNorm that the gradient of the packed layers comes from, "
        "directly above the packed layers, or at the model's outputs",
    )
    batch_norm: str = option(
        "project",
        choice("project", "drop"),
        "backward of BatchNorm on kept rows: orthogonal to 1 and to its input, as the exact gradient is; 'drop' loses "
        "the share of the dropped rows (biased, version 0.1)",
    )
    zero_point: str = option(
        "grid",
        choice("grid", "free"),
        "of quantized gradients: an exact zero is a code, and sums over a channel are exact; 'free': the least value "
        "(the paper)",
    )
    weight_scale: str = option("xnor", choice("xnor", "none"), "mean |W| per output channel, or 1")
    skip: tuple[str, ...] = option(
        ("first", "last", "downsample"),
        LAYERS,
        "layers left in float; 'slow' are those that this machine computes faster in float, by a model calibrated once",
    )
    min_channels: int = option(
        32, integer(1), "layers with fewer input or output channels stay in float: packing them wastes words"
    )
    check_finite: bool = option(
        False, FLAG, "for debugging: raise at the first packed layer that meets a NaN or an infinity, naming it"
    )
    float_dtype: str = option(
        "float32",
        choice("float32", "bfloat16"),
        "products of the layers left in float: as the model says, or in bfloat16, about twice as fast where the CPU "
        "has instructions for it; float32 models only",
    )
    save_outputs: bool = option(
        False,
        FLAG,
        "keep the integer outputs of the products for the backward (2 bytes an element, 4 where int16 is too small) "
        "instead of computing them again; worth it where nothing is pruned (keep=1)",
    )
    reuse_memory: bool = option(
        True,
        FLAG,
        "the C library keeps freed memory for the next step, in the whole process (glibc): page faults would cost as "
        "much as the products; what is far more than the steps need is given back",
    )
    report: bool = option(
        True, FLAG, "write one line by the logger 'fqt_compile' when a model is compiled: how many layers are packed"
    )
    strict: bool = option(
        False,
        FLAG,
        "for tests: a pass that cannot handle a graph raises, instead of leaving the layer in float or the region "
        "unoptimized, with the reason",
    )
    lowering: str = option(
        "native",
        choice("native", "eager", "triton"),
        "generated kernels inside Inductor; 'eager': the same rewritten graph interpreted with the reference "
        "operations, without a compiler; 'triton': with the GPU kernels, on CPU tensors in Triton's interpreter "
        "(TRITON_INTERPRET=1)",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            got = getattr(self, field.name)
            object.__setattr__(self, field.name, field.metadata["accepted"].checked(field.name, got))

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
    def from_options(cls, options: Mapping[str, Any] | FQTConfig | None) -> FQTConfig:
        """Build from ``torch.compile(options=...)``: field names, and ``preset`` (`PRESETS`) underneath them.

        An `FQTConfig` is returned as it is. Raises `ConfigError` for an unknown name, with the closest accepted one.
        """
        if options is None:
            return cls()
        if isinstance(options, FQTConfig):
            return options
        if not isinstance(options, Mapping):
            raise ConfigError(f"options: got {type(options).__name__}; accepted: a mapping of option names to values")
        given = dict(options)
        preset = PRESET.checked("preset", given.pop("preset", "default"))
        names = [*OPTIONS, "preset"]
        for name in given:
            if name not in OPTIONS:
                hint = did_you_mean(name, names)
                raise ConfigError(f"unknown option {name!r}{hint}; accepted: {', '.join(sorted(names))}")
        return cls(**{**PRESETS[preset], **given})


OPTIONS = {field.name: field for field in dataclasses.fields(FQTConfig)}
MEANINGS: dict[str, str] = {name: field.metadata["meaning"] for name, field in OPTIONS.items()}


def _described(name: str) -> str:
    """An option in the docstring."""
    text = f"{name} ({OPTIONS[name].metadata['accepted'].text}): {MEANINGS[name]}."
    return textwrap.fill(text, 120, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)


def option_table() -> str:
    """The options as a table in Markdown."""
    rows = [(name, f.default, f.metadata["accepted"].text, MEANINGS[name]) for name, f in OPTIONS.items()]
    rows.append(("preset", "default", PRESET.text, PRESET_MEANING))
    lines = ["| option | default | accepted | meaning |", "|---|---|---|---|"]
    for name, default, accepted, meaning in rows:
        shown = ", ".join(default) if isinstance(default, tuple) else default
        cells = (f"`{name}`", f"{shown}", accepted, meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


FQTConfig.__doc__ = "\n".join([str(FQTConfig.__doc__).rstrip(), "\n    Fields\n    ------", *map(_described, OPTIONS)])
