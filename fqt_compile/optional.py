"""Packages of the ``demo`` extra, which everything but the training itself can do without."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import FQTError


class MissingPackageError(FQTError, ImportError):
    """A package of the ``demo`` extra is needed and not installed."""


def optional_import(module: str) -> Any:
    """Import a module of the ``demo`` extra, or raise `MissingPackageError` with the remedy."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # one built for another torch or NumPy raises anything
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise MissingPackageError(
            f"the package {package} is needed and cannot be imported ({type(error).__name__}: {error}); "
            "install it, or everything at once with: pip install 'fqt-compile[demo]'"
        ) from error
