"""Which part of the large grids a run tests: another one every day, all of it with `make test-all`.

``FQT_COMPILE_TEST_SEED=20261127 pytest`` repeats the choice of that day (the number stands in the header of every run),
``pytest --all`` (or the seed ``all``) leaves nothing out. The choice depends on the seed and on names only, so that all
workers of a run agree about it.
"""

from __future__ import annotations

import datetime
import os
import zlib
from collections.abc import Sequence
from typing import TypeVar

ENVIRONMENT = "FQT_COMPILE_TEST_SEED"
ALL = "all"
T = TypeVar("T")


def seed() -> str:
    """Of this run: a number, or `ALL`. Set for the processes that the run starts, too."""
    return os.environ.setdefault(ENVIRONMENT, datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))


def everything() -> bool:
    return seed() == ALL


def number(name: str) -> int:
    """The same for the same name on one day."""
    return zlib.crc32(f"{seed()} {name}".encode())


def pick(name: str, items: Sequence[T]) -> T:
    """One of the items."""
    return items[number(name) % len(items)]


def shuffled(name: str, items: Sequence[T]) -> list[T]:
    """The items in the order of the day."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: number(f"{name} {i}"))]


def some(name: str, items: Sequence[T], count: int = 1) -> Sequence[T]:
    """One of the items, or ``count`` of them in their order; all with ``--all``."""
    chosen = set(shuffled(name, range(len(items)))[:count])
    return items if everything() else [item for i, item in enumerate(items) if i in chosen]


def one_in(count: int, name: str) -> bool:
    """Is ``name`` of the part that this run tests?"""
    return everything() or number(name) % count == 0


def turn(days: int, first: int, items: Sequence[T], in_a_row: int = 1) -> list[T]:
    """Every ``days``-th of the items, others on the next days: all in ``days`` days in a row; what so many have."""
    day = int(seed()) if seed().isdecimal() else number("day")
    return [item for i, item in enumerate(items) if everything() or (first + day + i) % days < in_a_row]
