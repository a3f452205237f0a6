"""What functions that take batches accept: an iterable of tensors, or of tuples and lists that begin with one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .errors import ConfigError


def require_iterable(batches: Any) -> None:
    """Raise `ConfigError` unless ``batches`` is an iterable and no tensor, which would be taken apart row by row."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"batches: got {type(batches).__name__}; accepted: an iterable of batches, such as [images] or a DataLoader"
        )


def input_of(batch: Any, number: int) -> Tensor:
    """The input of the ``number``-th batch; raises `ConfigError` where there is none or it has no rows."""
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor) or not first.dim() or not first.shape[0]:
        empty = isinstance(batch, tuple | list) and not batch
        shape = f" of shape {tuple(first.shape)}" if isinstance(first, Tensor) else ""
        raise ConfigError(
            f"batches: batch {number}: got {'an empty one' if empty else type(first).__name__ + shape}; accepted: a "
            "tensor with at least one row, or a tuple or list whose first item is one"
        )
    return first
