"""Folders of images: one folder per class, with or without a test part of its own."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import did_you_mean
from ..optional import optional_import
from .sources import DATASETS, DataError, Loaded, Part, chosen, split

TEST_PARTS = ("val", "test")
PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""What folders of parts of a data set are called, none of them a class if it holds folders."""
Sample = tuple[str, int]  # file, index of its class


@dataclass(frozen=True)
class ImageFolder:
    """classes: names of the folders, in order. samples: of all classes, in the order of torchvision's ImageFolder."""

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]


def existing_folder(name: str) -> Path:
    """The folder called ``name``, or the error for what it is instead."""
    accepted = f"{', '.join(DATASETS)}, or a folder of images"
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user who is unknown
        raise DataError(f"data: {name!r} cannot be looked for ({error}); accepted: {accepted}") from error
    if exists:
        raise DataError(f"data: {name!r} is a file; accepted: {accepted}")
    if path.name != name:
        raise DataError(f"data: the folder {name!r} does not exist; accepted: {accepted}")
    raise DataError(f"data: unknown data set or folder {name!r}{did_you_mean(name, DATASETS)}; accepted: {accepted}")


def load_folder(folder: Path, size: int, limit: int | None, seed: int) -> Loaded:
    """A folder of images, one folder per class, with or without a test part of its own."""
    test_folder = next((folder / part for part in TEST_PARTS if (folder / part).is_dir()), None)
    if (folder / "train").is_dir() and test_folder:
        train_set, test_set = image_folder(folder / "train"), image_folder(test_folder)
        if train_set.classes != test_set.classes:
            differing = sorted(set(train_set.classes) ^ set(test_set.classes))
            raise DataError(
                f"data {str(folder)!r}: train and {test_folder.name} must have the same classes; "
                f"only one of them has {', '.join(differing)}"
            )
        train, test = chosen(len(train_set.samples), limit, seed), chosen(len(test_set.samples), limit, seed)
    else:
        _refuse_parts(folder)
        train_set = test_set = image_folder(folder)
        train, test = split(len(train_set.samples), limit, seed)
    return (
        _decoded([train_set.samples[i] for i in train.tolist()], size),
        _decoded([test_set.samples[i] for i in test.tolist()], size),
        train_set.classes,
    )


def image_folder(folder: Path) -> ImageFolder:
    """The images of a folder with one folder per class.

    torchvision's ImageFolder finds the same ones, but follows links in circles.
    """
    folders = [path for path in _entries(folder) if _is_folder(path)]
    accepted = (
        f"accepted: one folder per class with image files, such as {folder}/cat/1.png, or such folders below train/ "
        "and val/ (or test/)"
    )
    if not folders:
        raise DataError(f"data {str(folder)!r}: got no folder in it; {accepted}")
    images = [_images(path, (os.path.realpath(folder),)) for path in folders]
    empty = [path.name for path, files in zip(folders, images, strict=True) if not files]
    if empty:
        raise DataError(f"data {str(folder)!r}: got no image in {', '.join(empty)}; {accepted}")
    if len(folders) < 2:
        raise DataError(f"data {str(folder)!r}: got one class ({folders[0].name!r}); accepted: two classes or more")
    samples = [(file, label) for label, files in enumerate(images) for file in files]
    return ImageFolder(tuple(path.name for path in folders), tuple(samples))


def _refuse_parts(folder: Path) -> None:
    """A training part alone would be taken for a class, and its classes for nothing."""
    parts = []
    for path in _entries(folder):
        if path.name.lower() in PARTS and _is_folder(path):
            inside = _entries(path)
            if any(map(_is_folder, inside)) and not any(map(_is_image, inside)):
                parts.append(path)
    if parts:
        names = " and ".join(f"{path.name}/" for path in parts)
        raise DataError(
            f"data {str(folder)!r}: got {names} with folders in it; accepted: train/ together with val/ or test/, or "
            f"one folder per class; remedy: add or rename the missing part, or give --data {parts[0]}, which is "
            "split 80/20"
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise _unusable(folder, error) from error


def _is_folder(path: Path) -> bool:
    """False for a link that leads nowhere; what a link in a circle would be is not known."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> DataError:
    if error.errno == errno.ELOOP:
        return DataError(f"data: {path} is a symbolic link in a circle; accepted: files and folders; remedy: remove it")
    return DataError(f"data: {path} cannot be read ({error.strerror or error}); remedy: repair or remove it")


def _is_image(path: Path) -> bool:
    extensions: tuple[str, ...] = optional_import("torchvision.datasets.folder").IMG_EXTENSIONS
    return path.name.lower().endswith(extensions) and not _is_folder(path)


def _images(folder: Path, above: Sequence[str]) -> list[str]:
    """Image files in and below a folder, by folder and then by name; ``above``: the real folders that it lies in."""
    found: list[tuple[str, list[str]]] = []
    _collect(folder, above, found)
    return [file for _, files in sorted(found) for file in files]


def _collect(folder: Path, above: Sequence[str], found: list[tuple[str, list[str]]]) -> None:
    real = os.path.realpath(folder)
    if any(os.path.commonpath([real, outer]) == real for outer in above):
        raise DataError(
            f"data: {folder} is a symbolic link back to {real}, in which it lies itself; accepted: links to folders "
            "elsewhere; remedy: remove the link"
        )
    entries = _entries(folder)
    found.append((str(folder), [str(path) for path in entries if _is_image(path)]))
    for path in entries:
        if _is_folder(path):
            _collect(path, (*above, real), found)


def _decoded(samples: Sequence[Sample], size: int) -> Part:
    """Image files -> uint8 [N, 3, size, size] and labels int64 [N]."""
    v2 = optional_import("torchvision.transforms.v2")
    decode = optional_import("torchvision.datasets.folder").default_loader
    to_tensor = v2.Compose([v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    for row, (file, _) in zip(images, samples, strict=True):
        try:
            if os.path.exists(file) and not os.path.isfile(file):
                raise OSError("it is no file")  # reading a pipe would wait forever
            row.copy_(to_tensor(decode(file)))
        except Exception as error:  # each decoder has its own errors; all mean an unreadable file
            raise DataError(f"data: the image {file} cannot be read ({error}); repair or remove it") from error
    return images, torch.tensor([label for _, label in samples])
