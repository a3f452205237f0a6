"""Files of weights: what they say about themselves, and whether they fit a model.

Everything is checked before anything is changed. A file of ours is a dictionary written by ``torch.save``: "fqt1bit"
has the format, the version of the package and the options that the weights were trained with (None: in float), "model"
has the state dict. No model takes that for its own state dict: ``load_state_dict`` of the file says that ``fqt1bit`` is
not expected.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .config import FQTConfig
from .errors import ConfigError, FQTError
from .results import write_atomic

FORMAT = 1
"""Of the header and of what is beside it; raised when an older version could not read them."""
HEADER, MODEL = "fqt1bit", "model"
COMPILED = "_orig_mod."  # before the names of a compiled module's parameters
SHOWN = 3
"""Weights named in one message."""


class CheckpointError(FQTError, RuntimeError):
    """A checkpoint or a state dict is absent, broken, or belongs to other settings."""


@dataclass(frozen=True)
class Weights:
    """tensors: the state dict of a file. says: whether it tells how they were trained. config: with which options."""

    tensors: dict[str, Any]
    says: bool = False
    config: FQTConfig | None = None


def header(config: FQTConfig | None) -> dict[str, Any]:
    """What a file of ours says about its weights; ``config`` None for float ones."""
    try:
        package = version("fqt-compile")
    except PackageNotFoundError:
        package = "unknown"
    options = None if config is None else json.loads(config.canonical())
    return {"format": FORMAT, "version": package, "options": options}


def write(content: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, atomically. Raises `OutputError`; the old file is then unchanged."""
    write_atomic(path, lambda file: torch.save(dict(content), file))


def read(path: Path, what: str) -> dict[str, Any]:
    """A dictionary written by ``torch.save``, loaded on the CPU with ``weights_only=True``.

    The file's checksums are verified first, so a flipped bit is noticed as well as a truncated file.

    Raises
    ------
    CheckpointError: absent, truncated, altered, not a dictionary; ``what`` names its role in the message.
    """
    if not path.is_file():
        raise CheckpointError(f"{what} {path}: no such file{' but a folder' if path.is_dir() else ''}")
    remedy = "accepted: a dictionary written by torch.save; the file is unchanged, replace it by a good copy"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise CheckpointError(f"{what} {path}: wrong checksum of {broken}; {remedy}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors that are refused anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises anything on a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{what} {path}: truncated or not readable ({reason}); {remedy}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{what} {path}: got {type(state).__name__}; {remedy}")
    return state


def unpack(state: Mapping[str, Any], source: str | Path) -> Weights:
    """The weights of a file that was read: one of ours, or a plain state dict.

    Raises `CheckpointError` for a header that is broken or of a newer version.
    """
    if HEADER not in state:
        return Weights(dict(state))
    about, tensors = state[HEADER], state.get(MODEL)
    if not isinstance(about, Mapping) or not isinstance(about.get("format"), int) or not isinstance(tensors, Mapping):
        raise CheckpointError(
            f"weights {source}: what the file says about itself is broken; accepted: a file of fqt_compile.save or of "
            "fqt1bit finetune, or a plain state dict"
        )
    author = f"it was written by fqt-compile {about.get('version', 'unknown')}; remedy: update fqt-compile"
    if about["format"] > FORMAT:
        raise CheckpointError(f"weights {source}: got format {about['format']}; accepted: up to {FORMAT}; {author}")
    try:
        options = about["options"]
        config = None if options is None else FQTConfig.from_options(options)
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"weights {source}: its options are not known here ({error}); {author}") from error
    return Weights(dict(tensors), says=True, config=config)


def plain_names(names: Collection[Any]) -> dict[str, str]:
    """Every name without what ``torch.compile`` and ``DataParallel`` put into it -> the name itself."""
    texts = {str(name).replace(COMPILED, ""): name for name in names}
    if texts and all(text.startswith("module.") for text in texts):
        return {text.removeprefix("module."): name for text, name in texts.items()}
    return texts


def fit(
    model: nn.Module, tensors: Mapping[str, Any], source: str | Path, free: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """A state dict in the model's own names, and one line for each of its entries in ``free`` that is not given.

    Those may be absent or of another shape. Nothing is changed; `torch.nn.Module.load_state_dict` takes the result
    with ``strict=False``.

    Raises
    ------
    CheckpointError: any other entry is absent, unexpected, or of another shape or kind of number; values that are NaN
        or infinite where the model's are not.
    """
    own, given = model.state_dict(), plain_names(tensors)
    names = plain_names(own)
    wrong = [f"{name} (not in the model)" for name in given if name not in names]
    fitting, absent = {}, []
    for name, own_name in names.items():
        got, mine = tensors.get(given.get(name, "")), own[own_name]
        if name in free and (not isinstance(got, Tensor) or got.shape != mine.shape):
            absent.append(f"{name} ({_shapes(got, mine)})")
        elif problem := _problem(name, got, mine):
            wrong.append(f"{name} ({problem})")
        else:
            fitting[own_name] = got
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        inside = [str(name) for name, value in tensors.items() if isinstance(value, Mapping)]
        hint = (
            f"; the file holds dictionaries ({', '.join(inside)}): save the model's state dict alone" if inside else ""
        )
        raise CheckpointError(
            f"weights {source} do not fit the model: {'; '.join(wrong[:SHOWN])}{more}; accepted: finite weights of the "
            f"same model{', where only the last linear layer may differ' if free else ''}{hint}"
        )
    return fitting, absent


def check_finite(tensors: Mapping[str, Any], parameters: Collection[str], what: str) -> None:
    """Raise `CheckpointError` for NaN, and for infinite parameters; a buffer may hold an infinity (a mask)."""
    wrong = []
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not is_lazy(value) and _is_fractional(value):
            bad = ~_finite(value) if name in parameters else value.isnan()
            wrong += [name] if bool(bad.any()) else []
    if wrong:
        raise CheckpointError(
            f"{what}: NaN or infinite values in {', '.join(wrong[:SHOWN])}; accepted: finite weights; nothing is "
            "written; remedy: go back to the last good weights, with a lower learning rate"
        )


def _problem(name: str, got: Any, mine: Any) -> str | None:
    """Why an entry of a file cannot take the place of the model's."""
    if not isinstance(mine, Tensor):  # extra state, of which the module knows the rest
        return None if got is not None else "got nothing"
    if is_lazy(mine):
        return "the model has a lazy layer here; run it on a batch first"
    if not isinstance(got, Tensor) or got.shape != mine.shape:
        return _shapes(got, mine)
    if got.layout != torch.strided or got.device.type == "meta" or got.is_quantized:
        return f"got a tensor of {got.layout} on {got.device} and {got.dtype}, accepted: dense values"
    if _is_fractional(got) != _is_fractional(mine) or got.is_complex() != mine.is_complex():
        return f"got {_dtype(got)}, the model has {_dtype(mine)}"
    if _is_fractional(mine):
        value = got.to(mine.dtype)  # which may be narrower
        bad = ~_finite(value)
        if bool(bad.any()) and bool((bad & (value != mine.detach().cpu())).any()):
            return f"{int(bad.sum())} of {got.numel()} values are NaN or infinite"
        if name.endswith("running_var") and bool((value < 0).any()):
            return "a variance is negative"
    return None


def _shapes(got: Any, mine: Tensor) -> str:
    return f"got {list(got.shape) if isinstance(got, Tensor) else 'nothing'}, the model has {list(mine.shape)}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_fractional(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float())
