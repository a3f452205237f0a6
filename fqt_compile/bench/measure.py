"""`bench`: whole training steps of eager, Inductor and fqt1bit, with their memory, on one model.

A step is ``zero_grad(set_to_none=True)``, forward, cross-entropy, ``backward()`` and fused Adam, on
channels_last images. This module has everything measured (`turns`, in processes that run `worker`) and computes the
ratios; `tables` shows them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import results
from ..models import make_model
from .settings import ALLOCATORS, BFLOAT16, CACHE, CLASSES, FLOAT32, OURS, OWN, SAVED_BASELINE, BenchSettings
from .turns import BenchError, measure_steps, start_worker


def bench(settings: BenchSettings, say: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Measure and return the report; ``say`` receives a line for everything that takes time.

    Keys (times in seconds, memory in bytes; "per variant" is a dictionary by name of the variant)
    ----
    model, batch, size, threads, rounds, warm, options, versions, cpu: what ran where.
    steps: per variant ``median_s``, ``min_s``, ``max_s``, and ``all_s`` in the order measured.
    speedup_fp32, speedup_bf16: median of the best float32 (bf16) variant / median of ``"fqt1bit"``; None without.
    ratios: per variant the same two quotients, ``fp32`` and ``bf16``; below 1 the variant is slower.
    compile: per variant ``compile_s`` (first step minus a median step) and ``compile_cached``.
    failed: per variant that could not take all its steps, why; it is missing everywhere else.
    saved_bytes: per variant, what autograd holds between forward and backward, without parameters, buffers, images.
    saved_ratio: per variant, how many times less that is than Inductor's float32; None without it.
    peak_rss: per variant, peak resident memory of a process that runs warm steps of nothing else.
    memory: per variant ``start`` (resident before the first step), ``warm`` (between steps), ``peak``, ``ru_maxrss``.
    allocator: the setting that ``steps`` ... ``compile`` belong to; ``allocators`` has them for every setting.
    phases: per own variant, see `phases.measure_phases`; only if asked for.
    """
    torch.manual_seed(0)
    make_model(settings.arch, classes=CLASSES, size=settings.size)  # mistakes are answered before anything runs
    with tempfile.TemporaryDirectory() as folder:
        cache = {CACHE: folder} if settings.cold else {}
        timed = {name: _timed(settings, name, cache, say) for name in settings.allocators}
        first = settings.allocators[0]
        report = _header(settings) | {"allocator": first, **timed[first], "allocators": timed}
        environment = {**ALLOCATORS[first], **cache}
        if settings.memory:
            say("peak memory")
            memory = {name: ask_worker("memory", settings, name, environment) for name in report["steps"]}
            report |= {"peak_rss": {name: figures["peak"] for name, figures in memory.items()}, "memory": memory}
        if settings.phases:
            say("phases")
            ours = [name for name in OWN if name in report["steps"]]
            report["phases"] = {name: ask_worker("phases", settings, name, environment) for name in ours}
    return report


def ratios(medians: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """Per variant: ``fp32`` and ``bf16``, the best median of that arithmetic / the variant's median."""
    best = {}
    for key, names in {"fp32": FLOAT32, "bf16": BFLOAT16}.items():
        best[key] = min((medians[name] for name in names if name in medians), default=None)
    return {
        variant: {key: None if value is None else value / median for key, value in best.items()}
        for variant, median in medians.items()
    }


def ask_worker(request: str, settings: BenchSettings, variant: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """The answer of a fresh process to one request; `BenchError` with the reason when it fails."""
    try:
        with start_worker(settings, variant, environment) as worker:
            answer: dict[str, Any] = worker.ask(request)
            return answer
    except BenchError as error:
        raise BenchError(
            f"measuring {request} of {variant} failed: {error}; accepted: a model that trains with every variant; "
            "remedy: a smaller --batch if memory ran out, --no-baselines to leave out eager and Inductor"
        ) from error


def _timed(
    settings: BenchSettings, allocator: str, cache: Mapping[str, str], say: Callable[[str], object]
) -> dict[str, Any]:
    """Times, ratios and saved bytes under one allocator setting."""
    say(f"steps of {len(settings.variants)} variants, {allocator} allocator")
    timed = measure_steps(settings, {**ALLOCATORS[allocator], **cache}, say)
    if OURS in timed["failed"]:
        raise BenchError(
            f"{OURS} failed: {timed['failed'][OURS]}; accepted: a model that trains with it; remedy: fqt1bit "
            "explain shows what is done with it"
        )
    quotients = ratios({name: step["median_s"] for name, step in timed["steps"].items()})
    headline = {f"speedup_{key}": value for key, value in quotients[OURS].items()}
    baseline = timed["saved_bytes"].get(SAVED_BASELINE)
    saved = {name: baseline / size if baseline and size else None for name, size in timed["saved_bytes"].items()}
    return {**timed, **headline, "ratios": quotients, "saved_ratio": saved}


def _header(settings: BenchSettings) -> dict[str, Any]:
    from ..backend import source_hash

    record = settings.record()
    machine = results.environment()
    shown = {name: record[name] for name in ("model", "batch", "size", "threads", "rounds", "warm", "baselines")}
    versions = {**machine["versions"], "source": source_hash()[:12]}
    return {**shown, "options": record["config"], "versions": versions, "cpu": machine["cpu"]}
