"""The tables of docs/models.md: rows made of the records of `models.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

Row = tuple[str, ...]
COMPARED = {"oracle - eager": "oracle and definition", "kernels - oracle": "kernels", "native - oracle": "compiled"}
VERDICTS = ("equal", "rounding", "explained", "unexplained")


def models(report: dict[str, Any]) -> Iterator[Row]:
    """One row a model."""
    yield ("model", "input", "packed", "others", *COMPARED.values(), "passes, s", "compile, s (Inductor)")
    for name, record in report["models"].items():
        failed = {error_of(part) for part in record["errors"]}
        compared = ("failed" if key in failed else shown(record.get(key)) for key in COMPARED)
        others = ", ".join(f"{count} {reason}" for reason, count in record.get("reasons", {}).items()) or "-"
        packed = f"{record['packed']} of {record['layers']}" if "layers" in record else "failed"
        yield (
            name.partition("/")[2],
            record.get("input", "-"),
            packed,
            others,
            *compared,
            f"{record['passes_s']:.1f}" if "passes_s" in record else "-",
            compile_times(record),
        )


def error_of(part: str) -> str:
    """The comparison that a failed part leaves out."""
    part = part.removesuffix(" compared")
    return next((key for key in COMPARED if part in (key, key.partition(" - ")[0])), "oracle - eager")


def shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return found["verdict"] if found["verdict"] == "equal" else f"{found['verdict']}, {largest(found):.0e}"


def largest(found: dict[str, Any]) -> float:
    return max(float(found["largest"]), float(found["loss"]))


def compile_times(record: dict[str, Any]) -> str:
    times = record.get("compile_s", {})
    ours, inductor = (f"{times[way]:.0f}" if way in times else "-" for way in ("native", "inductor"))
    return "-" if ours == inductor == "-" else f"{ours} ({inductor})"


def summary(report: dict[str, Any]) -> Iterator[Row]:
    """Counts: one row a group of models."""
    yield (
        "models",
        "number",
        "layers packed",
        "failed",
        *(f"{what}: {', '.join(VERDICTS)}" for what in COMPARED.values()),
    )
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in report["models"].values():
        groups.setdefault(record["group"], []).append(record)
    for group, records in [*groups.items(), ("all", list(report["models"].values()))]:
        packed, layers = (sum(record.get(key, 0) for record in records) for key in ("packed", "layers"))
        failed = sum(bool(record["errors"]) for record in records)
        verdicts = (Counter(r[key]["verdict"] for r in records if key in r) for key in COMPARED)
        counts = (" / ".join(str(counted[verdict]) for verdict in VERDICTS) for counted in verdicts)
        yield (group, f"{len(records)}", f"{packed} of {layers}", f"{failed}", *counts)


def failures(report: dict[str, Any]) -> Iterator[Row]:
    """Every error and every difference without an explanation."""
    yield ("model", "part", "what")
    found = [(name, *row) for name, record in report["models"].items() for row in failures_of(record)]
    yield from found or [("none", "-", "-")]


def failures_of(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for part, error in record["errors"].items():
        yield part, f"{error['line']} ({error['frame']})".replace("|", "\\|")
    for key in COMPARED:
        if record.get(key, {}).get("verdict") == "unexplained":
            yield key, f"{largest(record[key]):.1e}, most in `{record[key]['where']}`"
