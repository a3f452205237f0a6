"""The options of `FQTConfig` on the command line: flags for the most used, ``--option NAME=VALUE`` for all."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .config import MEANINGS, PRESET_MEANING, FQTConfig
from .errors import ConfigError

WORDS = {"none": None, "true": True, "false": False}
Bits = Annotated[int | None, typer.Option(help=MEANINGS["bits"])]
Keep = Annotated[float | None, typer.Option(help=MEANINGS["keep"])]
Scope = Annotated[str | None, typer.Option(help=MEANINGS["scope"])]
Grad = Annotated[str | None, typer.Option(help=MEANINGS["grad"])]
Preset = Annotated[str | None, typer.Option(help=PRESET_MEANING)]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help=f"repeatable; lists as a,b; names: {', '.join(MEANINGS)}"),
]


def parse_options(texts: Sequence[str], flags: dict[str, Any]) -> FQTConfig:
    """``NAME=VALUE`` texts and flags that are not None, validated by `FQTConfig.from_options`.

    A value is a Python literal, ``none``, ``true`` or ``false``, values separated by commas, or else text.

    Raises `ConfigError`: no ``=``, a name given twice, and all that `FQTConfig` refuses.
    """
    options = {name: value for name, value in flags.items() if value is not None}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--option: got {text!r}; accepted: NAME=VALUE such as bits=4")
        if name in options:
            raise ConfigError(f"option {name!r} is given twice; give it once")
        options[name] = _skip_list(value) if name == "skip" else _parse(value)
    return FQTConfig.from_options(options)


def _parse(text: str) -> Any:
    """A number, a boolean, None, a list of these, or the text itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [_parse(part) for part in text.split(",")] if "," in text else text


def _skip_list(text: str) -> Any:
    """``skip`` takes a list of names: ``a,b``, a single name, or nothing at all."""
    value = _parse(text)
    if isinstance(value, str):
        return [value] if value else []
    return value
