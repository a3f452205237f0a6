"""Operands by name: ``Call(node).g`` instead of ``node.args[0]``.

The names are those of the operator's schema, ATen's and ours alike; operands that a call leaves out have the schema's
default. The items of an operator with several results are calls of ``getitem``, with operands ``source`` and ``index``.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from ..errors import PassError


@dataclasses.dataclass(frozen=True)
class _Parameter:
    position: int
    keyword_only: bool = False
    default: Any = None


@functools.cache
def _parameters(target: Any) -> Mapping[str, _Parameter]:
    """Of an operator, in order; none of what has no schema (arithmetic of symbolic sizes)."""
    if target is operator.getitem:
        return {"source": _Parameter(0), "index": _Parameter(1)}
    schema = getattr(target, "_schema", None)
    declared = () if schema is None else enumerate(schema.arguments)
    return {a.name: _Parameter(i, a.kwarg_only, a.default_value) for i, a in declared}


def takes(node: fx.Node, *names: str) -> bool:
    """Does the node call an operator that has operands of all these names?"""
    return node.op == "call_function" and all(name in _parameters(node.target) for name in names)


class Call:
    """A node's operands by name. Raises `PassError` for a name that the operator does not have."""

    __slots__ = ("node",)

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __getitem__(self, name: str) -> Any:
        parameter = self._parameter(name)
        if parameter.position < len(self.node.args) and not parameter.keyword_only:
            return self.node.args[parameter.position]
        return self.node.kwargs.get(name, parameter.default)

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def replace(self, /, **changes: Any) -> None:
        """Change operands of the node in place."""
        self.node.args, self.node.kwargs = self.changed(**changes)

    def changed(self, /, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's args and kwargs with some operands changed. What can stand by position does."""
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        for name, new in changes.items():
            parameter = self._parameter(name)
            if parameter.keyword_only:
                kwargs[name] = new
                continue
            for earlier, left_out in list(_parameters(self.node.target).items())[len(args) : parameter.position + 1]:
                args.append(kwargs.pop(earlier, left_out.default))
            args[parameter.position] = new
        return tuple(args), kwargs

    def _parameter(self, name: str) -> _Parameter:
        known = _parameters(self.node.target)
        if name not in known:
            accepted = ", ".join(known) or "none"
            raise PassError(f"{self.node.name}: got operand {name!r}; {self.node.target} has {accepted}")
        return known[name]
