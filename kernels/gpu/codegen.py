"""Triton kernels from templates: a `Spec` is rendered to a readable Python file in the cache and imported from there.

Device code lives in ``templates/gpu``; a spec chooses between variants of it (code, bits, strategy, shape class,
offset type). Triton reads a kernel's source from disk, so the file must exist; it is ``<name>-<hash>.py`` in the
directory that the C++ kernels are cached in (`cache`). What is left to Triton's own compile-time
constants are sizes of blocks and convolutions. Importing this imports no Triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import TritonMissingError
from .. import program, rendering
from ..cache import cache_directory, replacing

TEMPLATES = rendering.TEMPLATES / "gpu"
INTERPRET = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Spec:
    """One rendered file: a template and the values of its options, in order."""

    template: str
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """``conv_product-code=sign-planes=1``: what tests, snapshots and files are called."""
        return "-".join([self.template, *(f"{key}={value}" for key, value in self.options)])


def spec(template: str, **options: Any) -> Spec:
    return Spec(template, tuple(options.items()))


@functools.cache
def render(wanted: Spec) -> str:
    """The Python source of a spec; self-contained."""
    text = ", ".join(f"{key}={value}" for key, value in wanted.options if key != "tiles") or "no options"
    values = {**rendering.PARAMETERS, **dict(wanted.options), "template": wanted.template, "options": text}
    if wanted.template in rendering.PROGRAM_TEMPLATES:
        values |= program.triton_parameters(values["program"])
    return rendering.environment(TEMPLATES).get_template(f"{wanted.template}.py.jinja").render(values)


def write(wanted: Spec) -> Path:
    """The path of a spec's file, written unless an identical one is there."""
    source = render(wanted)
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = cache_directory() / f"{wanted.template}-{key}.py"
    with contextlib.suppress(OSError):
        if path.read_bytes() == source.encode():
            return path
    with replacing(path) as part:
        part.write_text(source, encoding="utf-8")
    return path


@functools.cache
def load(wanted: Spec) -> ModuleType:
    """The imported file of a spec."""
    import_triton()
    path = write(wanted)
    found = importlib.util.spec_from_file_location(f"fqt_compile_{path.stem.replace('-', '_')}", path)
    assert found is not None
    assert found.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def import_triton() -> None:
    """Raise `TritonMissingError` unless Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise TritonMissingError(
            f"GPU kernels need Triton, which cannot be imported ({error}); remedy: pip install 'fqt-compile[gpu]', or "
            'run without them, options={"lowering": "eager"}'
        ) from error


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. Decided when Triton is first imported."""
    return os.environ.get(INTERPRET, "0") not in ("", "0")
