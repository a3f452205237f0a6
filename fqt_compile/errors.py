"""Named errors. Every message says what is wrong, where, what was got, what is accepted and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FQTError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FQTError, ValueError):
    """An option has an unknown name, a wrong type or a value outside the accepted ones."""


class UnsupportedInputError(FQTError, TypeError):
    """A tensor has a dtype, layout or shape that an operation does not accept."""


class CompilerMissingError(FQTError, RuntimeError):
    """No C++ compiler was found, and native kernels need one."""


class TritonMissingError(FQTError, RuntimeError):
    """GPU kernels need Triton, and a GPU or its interpreter."""


class KernelBuildError(FQTError, RuntimeError):
    """A kernel could not be compiled, kept in the cache or loaded from it."""


class NonFiniteError(FQTError, FloatingPointError):
    """``check_finite=True`` and a NaN or an infinity reached a packed layer."""


class PassError(FQTError, RuntimeError):
    """A graph pass found its input, or left its output, in a state its contract forbids."""


class CaptureError(FQTError, RuntimeError):
    """A model could not be captured as a graph, so it can be neither explained nor compared."""


class FQTWarning(UserWarning):
    """Something was left in float that the user probably expected to be packed."""


def did_you_mean(got: object, accepted: Iterable[str]) -> str:
    """`` (did you mean 'name'?)`` with the accepted name that is most like ``got``; empty if none is."""
    close = difflib.get_close_matches(got, list(accepted), n=1) if isinstance(got, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""
