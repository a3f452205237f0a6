"""The output folder of a run: lock, atomic files, checkpoints, state dicts."""

from __future__ import annotations

import fcntl
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import FQTError
from ..optional import optional_import
from ..results import OutputError, write_atomic

FORMAT = 1  # of the checkpoint file; raised whenever its keys change
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


class CheckpointError(FQTError, RuntimeError):
    """A checkpoint or a state dict is absent, broken, or belongs to other settings."""


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, atomically."""
    write_atomic(path, lambda file: torch.save(dict(state), file))


def load_state(path: Path, what: str) -> dict[str, Any]:
    """A dictionary written by ``torch.save``, loaded on the CPU with ``weights_only=True``.

    The file's checksums are verified first, so a flipped bit is noticed as well as a truncated file.

    Raises
    ------
    CheckpointError: absent, truncated, altered, not a dictionary; ``what`` names its role in the message.
    """
    if not path.is_file():
        raise CheckpointError(f"{what} {path}: no such file")
    remedy = "accepted: a dictionary written by torch.save; the file is unchanged, replace it by a good copy"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise CheckpointError(f"{what} {path}: wrong checksum of {broken}; {remedy}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises anything on a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{what} {path}: truncated or not readable ({reason}); {remedy}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{what} {path}: got {type(state).__name__}; {remedy}")
    return state


def read_weights(arch: str, weights: str) -> dict[str, Any]:
    """The state dict of ``--weights``: ``"DEFAULT"`` is torchvision's best for ``arch``, else a file.

    Raises
    ------
    CheckpointError: no pre-trained weights for ``arch``, not in torch's cache and no download; a broken file.
    """
    if weights != "DEFAULT":
        return load_state(Path(weights).expanduser(), "weights")
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

    Prefixes that ``torch.compile`` and ``DataParallel`` put before every name are removed. Returns one line
    for every entry of the head that keeps its fresh initialization.

    Raises
    ------
    CheckpointError: any other entry is absent, unexpected or of another shape.
    """
    given = dict(state)
    for prefix in ("_orig_mod.", "module."):
        torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(given, prefix)
    own = model.state_dict()
    of_head = {name for name in own if head is not None and name.startswith(f"{head}.")}
    notes, wrong = [], [f"{name} (not in the model)" for name in given if name not in own]
    for name, tensor in own.items():
        got = given.get(name)
        if isinstance(got, torch.Tensor) and got.shape == tensor.shape:
            continue
        shape = list(got.shape) if isinstance(got, torch.Tensor) else "nothing"
        line = f"{name} (got {shape}, the model has {list(tensor.shape)})"
        if name in of_head:
            notes.append(f"weights {source}: {line} is left at its fresh initialization")
            given.pop(name, None)
        else:
            wrong.append(line)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"weights {source} do not fit the model: {'; '.join(wrong[:3])}{more}; "
            "accepted: a state dict of the same --arch, where only the last linear layer may differ"
        )
    model.load_state_dict(given, strict=False)
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
        state = load_state(self.checkpoint, "checkpoint")
        if missing := sorted(KEYS - set(state)):
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: lacks {', '.join(missing)}; accepted: one of this command"
            )
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: got format {state['format']}; accepted: {FORMAT}; "
                "continue with the version that wrote it, or start again with --overwrite"
            )
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
    if overwrite:
        for name in (CHECKPOINT, RESULTS, PLOT):
            (folder / name).unlink(missing_ok=True)
