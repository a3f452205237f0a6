"""Weights that say what they are: `save` keeps the options with them, `load` runs them with the same ones."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

from .backend import fqt1bit
from .config import FQTConfig
from .errors import ConfigError, FQTWarning
from .weights import (
    HEADER,
    MODEL,
    CheckpointError,
    Weights,
    check_finite,
    fit,
    header,
    plain_names,
    read,
    unpack,
    write,
)

Options = Mapping[str, Any] | FQTConfig
FORWARD = ("activation", "threshold", "weight_scale", "skip", "min_channels")
"""Options that predictions depend on: weights trained with others mean something else."""


def save(model: nn.Module, path: str | os.PathLike[str], options: Options | None = None) -> None:
    """Write the state dict of ``model`` and the options that it was trained with, atomically; `load` reads the file.

    model: compiled with the fqt1bit backend, or plain. options: of a plain model, ``{}`` for the defaults; a compiled
    one knows them.

    Raises
    ------
    ConfigError: no options, or others than those of the compiled model.
    CheckpointError: weights that are NaN or infinite. OutputError: the file cannot be written. In both cases what was
        there before is unchanged.
    """
    plain, compiled = _plain(model), compiled_options(model)
    if options is None and compiled is None:
        raise ConfigError(
            "options: got none, and the model is not compiled with the backend fqt1bit; accepted: the compiled model, "
            "or the options that it was trained with, {} for the defaults"
        )
    config = compiled if options is None else FQTConfig.from_options(options)
    assert config is not None
    if compiled is not None and config != compiled:
        raise ConfigError(f"options: got {_difference(config, compiled, 'of the compiled model')}; leave them out")
    state = model_state(plain)
    check_finite(state, {name for name, _ in plain.named_parameters()}, f"save {path}")
    write({HEADER: header(config), MODEL: state}, Path(path))


def load(
    path: str | os.PathLike[str], model: nn.Module, options: Options | None = None, *, compile: bool = True
) -> nn.Module:
    """Load the weights of a file into ``model`` and return it compiled with the options they were trained with.

    model: plain, or compiled, of which the plain one is taken. It is changed only if everything fits.
    options: in place of some of the saved ones, but for those that predictions depend on (`FORWARD`); those of a plain
    state dict, which has none. compile: False returns the model plain, with an `FQTWarning`: in float, weights trained
    with 1-bit layers mean something else. Weights trained in float are compiled without fqt1bit.

    Raises
    ------
    CheckpointError: no such file, broken or of a newer version; weights that do not fit or are not finite; a plain
        state dict without ``options``, unless ``compile`` is False.
    ConfigError: ``options`` with which the weights would mean something else.
    """
    plain, path = _plain(model), Path(path)
    weights = unpack(read(path, "weights"), path)
    config = _config(weights, path, options)
    if compile and not weights.says and config is None:
        raise CheckpointError(
            f"weights {path}: a plain state dict, which does not say how it was trained; accepted: a file of "
            "fqt_compile.save; remedy: options={...} with what it was trained with, or compile=False"
        )
    fitting, _ = fit(plain, weights.tensors, path)
    if not compile:
        _warn_in_float(weights, path)
    plain.load_state_dict(fitting, strict=False)
    if not compile:
        return plain
    options = {} if config is None else dataclasses.asdict(config)
    compiled: Any = torch.compile(plain, backend=fqt1bit, options=options) if config else torch.compile(plain)
    assert isinstance(compiled, nn.Module)  # as `torch.compile` makes of a module
    return compiled


def compiled_options(model: nn.Module) -> FQTConfig | None:
    """The options of a model compiled with the fqt1bit backend; None for any other."""
    if not isinstance(model, OptimizedModule):
        return None
    callback: Any = model.dynamo_ctx.callback
    backend = innermost_backend(callback)
    if getattr(backend, "compiler_fn", backend) is not fqt1bit:
        return None
    return FQTConfig.from_options(getattr(backend, "kwargs", {}).get("options"))


def model_state(model: nn.Module) -> dict[str, Any]:
    """The state dict without the names that ``torch.compile`` puts into it."""
    state = model.state_dict()
    return {name: state[own] for name, own in plain_names(state).items()}


def _plain(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    plain: nn.Module = getattr(model, "_orig_mod", model)
    return plain


def _config(weights: Weights, path: Path, options: Options | None) -> FQTConfig | None:
    """What to compile the weights with."""
    saved = weights.config
    if options is None:
        return saved
    if weights.says and saved is None:
        raise ConfigError(
            f"options: got some, but the weights in {path} were trained in float; accepted: none; remedy: to train "
            'them on with 1-bit layers, load with compile=False, then torch.compile(model, backend="fqt1bit", ...)'
        )
    if saved is None or isinstance(options, FQTConfig) or "preset" in options:
        config = FQTConfig.from_options(options)
    else:
        config = FQTConfig.from_options({**dataclasses.asdict(saved), **options})
    if saved is not None and any(getattr(config, name) != getattr(saved, name) for name in FORWARD):
        raise ConfigError(f"options: got {_difference(config, saved, f'that the weights in {path} were trained with')}")
    return config


def _difference(got: FQTConfig, expected: FQTConfig, whose: str) -> str:
    names = [*FORWARD, *(field.name for field in dataclasses.fields(FQTConfig))]
    name = next(name for name in names if getattr(got, name) != getattr(expected, name))
    return f"{name}={getattr(got, name)!r}; accepted: {name}={getattr(expected, name)!r}, {whose}"


def _warn_in_float(weights: Weights, path: Path) -> None:
    if weights.says and weights.config is None:
        return
    if weights.says:
        text = (
            "were trained with 1-bit layers and mean something else in float32; remedy: run what load returns with "
            "compile=True"
        )
    else:
        text = "do not say how they were trained: with 1-bit layers they would mean something else in float32"
    warnings.warn(f"weights {path} {text}", FQTWarning, stacklevel=3)
