"""The output folder of a run: lock, atomic files, checkpoints, state dicts."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..optional import optional_import
from ..results import TEMPORARY, OutputError
from ..weights import CheckpointError, fit, plain_names, read, unpack

FORMAT = 2  # of the checkpoint file; raised whenever its keys change
CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"
PLOT = "results.png"
LOCK = ".lock"
ADDED = {"processes": 1}  # settings that older checkpoints do not name, and what they had
KEYS = {
    "format",
    "settings",
    "data",
    "stage",
    "model",
    "optimizer",
    "scheduler",
    "rng",
    "loader",
    "history",
}


def read_weights(arch: str, weights: str) -> dict[str, Any]:
    """The state dict of ``--weights``: ``"DEFAULT"`` is torchvision's best for ``arch``, else a file.

    Raises
    ------
    CheckpointError: no pre-trained weights for ``arch``, not in torch's cache and no download; a broken file.
    """
    if weights != "DEFAULT":
        return read(Path(weights).expanduser(), "weights")
    models = optional_import("torchvision.models")
    if arch not in models.list_models(module=models):
        raise CheckpointError(
            f"--weights DEFAULT: torchvision has no weights for {arch!r}; accepted with it: --arch of a "
            "torchvision classifier; give a file with a state dict, or none"
        )
    entry = models.get_model_weights(arch).DEFAULT
    try:
        state: dict[str, Any] = entry.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no network, no space, a wrong hash
        cache = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)
        raise CheckpointError(
            f"--weights DEFAULT: {entry} is not in torch's cache and cannot be downloaded ({error}); "
            f"put the file at {cache}, or give --weights a file"
        ) from error
    return state


def load_weights(model: torch.nn.Module, state: Mapping[str, Any], head: str | None, source: str) -> list[str]:
    """Copy a state dict into ``model``; entries of the module ``head`` may be absent or of another shape.

    ``state``: plain, or a file of `fqt_compile.save` or of this command. Returns one line about how its weights were
    trained, if it says so, and one for every entry of the head that keeps its fresh initialization.

    Raises
    ------
    CheckpointError: any other entry is absent, unexpected, of another shape or kind, or not finite.
    """
    weights = unpack(state, source)
    own = plain_names(model.state_dict())
    of_head = {name for name in own if head is not None and name.startswith(f"{head}.")}
    fitting, absent = fit(model, weights.tensors, source, of_head)
    model.load_state_dict(fitting, strict=False)
    notes = [f"weights {source}: {line} is left at its fresh initialization" for line in absent]
    if weights.config is not None:
        notes.insert(0, f"weights {source}: trained with 1-bit layers, {weights.config.canonical()}")
    return notes


class Workspace:
    """The locked output folder of one run. Build it with `open_workspace`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def stage_file(self, stage: str) -> Path:
        """Where the state dict at the end of ``stage`` is kept."""
        return self.folder / f"{stage}.pt"

    def load_checkpoint(self, settings: Mapping[str, Any], data: str) -> dict[str, Any]:
        """The checkpoint, if it was written with the same settings and data.

        Raises `CheckpointError` naming the first differing setting; no file is changed.
        """
        state = read(self.checkpoint, "checkpoint")
        if (got := state.get("format", FORMAT)) != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: got format {got}; accepted: {FORMAT}; "
                "continue with the version that wrote it, or start again with --overwrite"
            )
        if missing := sorted(KEYS - set(state)):
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: lacks {', '.join(missing)}; accepted: one of this command"
            )
        _check_kinds(state, self.checkpoint)
        for name in sorted({*settings, *state["settings"]}):
            was, now = state["settings"].get(name, ADDED.get(name)), settings.get(name)
            if was != now:
                raise CheckpointError(
                    f"--resume: setting {name!r} is {now!r}, but the checkpoint was written with {was!r}; "
                    "give it as before, or start again with another --out or --overwrite"
                )
        if state["data"] != data:
            raise CheckpointError(
                "--resume: the data set has other contents than when the checkpoint was written; "
                "restore them, or start again with another --out or --overwrite"
            )
        return state


def _check_kinds(state: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` for contents that only another program can have written, and for NaN in them."""
    records = state["history"].values() if isinstance(state["history"], dict) else [None]
    wrong = [name for name in ("settings", "model", "optimizer", "scheduler") if not isinstance(state[name], dict)]
    wrong += [] if all(isinstance(r, dict) and isinstance(r.get("epochs"), list) for r in records) else ["history"]
    for name in ("model", "optimizer"):
        tensors = [leaf for leaf in tree_leaves(state[name]) if isinstance(leaf, torch.Tensor)]
        wrong += [name] if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors) else []
    if wrong:
        raise CheckpointError(
            f"checkpoint {path}: {', '.join(wrong)} cannot have been written by this command, or have NaN; accepted: a "
            "checkpoint as it was written; remedy: a good copy, or start again with --overwrite"
        )


@contextmanager
def open_workspace(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[Workspace]:
    """Create and lock ``folder``; the lock ends with the block, or with the process however it ends.

    Raises
    ------
    OutputError: not writable; in use by another process; holds a run already and neither ``resume`` nor
        ``overwrite`` is given (the latter removes that run); ``resume`` and there is nothing to resume.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise OutputError(f"--out {folder}: cannot be written ({error}); choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"--out {folder}: in use by another fqt1bit process; wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise OutputError(f"--out {folder}: cannot be locked ({error}); choose a folder on another disk") from error
        _check_contents(folder, resume, overwrite)
        yield Workspace(folder)


def _check_contents(folder: Path, resume: bool, overwrite: bool) -> None:
    files = [file for file in (folder / CHECKPOINT, folder / RESULTS) if file.exists()]
    if resume and not (folder / CHECKPOINT).exists():
        raise OutputError(f"--resume: {folder} has no {CHECKPOINT}; start the run without --resume")
    if files and not resume and not overwrite:
        raise OutputError(
            f"--out {folder}: already holds {files[0].name}; continue that run with --resume, replace it "
            "with --overwrite, or choose another folder"
        )
    left = [folder / TEMPORARY.format(name) for name in (CHECKPOINT, RESULTS, PLOT)]  # by a killed process
    replaced = [folder / name for name in (CHECKPOINT, RESULTS, PLOT)] if overwrite else []
    try:
        for file in (*left, *replaced):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"--out {folder}: {file.name} cannot be removed ({error}); choose another folder") from error
