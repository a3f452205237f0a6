"""Where images come from: scikit-learn, the system's packages, torchvision's files and folders of images."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FQTError, did_you_mean
from ..optional import optional_import

DATASETS = ("digits", "fashion-mnist", "cifar10")
SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
FASHION_MNIST_REMEDY = (
    "install the Debian package dataset-fashion-mnist, or give --data-root with the folder that holds FashionMNIST/raw"
)
TEST_FRACTION = 0.2  # of a data set that comes in one piece
DIGITS_WHITE = 16  # the brightest pixel of scikit-learn's digits
RESIZE_CHUNK = 4096  # images resized at a time, which bounds the memory of the resize

Part = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W] and labels int64 [N]
Loaded = tuple[Part, Part, Sequence[str]]  # training part, test part, class names


class DataError(FQTError, ValueError):
    """A data set is unknown, absent, unreadable or too small."""


def _chosen(count: int, limit: int | None, seed: int) -> Tensor:
    """Indices [min(count, limit)] of a subset drawn by ``seed``; all in order without a limit."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]


def _split(count: int, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Training and test indices of a set in one piece: shuffled by ``seed``, the last fifth is the test."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tests = max(1, round(TEST_FRACTION * count))
    return order[: count - tests][:limit], order[count - tests :][:limit]


def _resized(part: Part, indices: Tensor, size: int) -> Part:
    """Some of the images, uint8 [N, 1 or 3, H, W] -> uint8 [n, 3, size, size], and their labels."""
    functional = optional_import("torchvision.transforms.v2.functional")
    images, labels = part
    chunks = images[indices].split(RESIZE_CHUNK)
    resized = torch.cat([functional.resize(chunk, [size, size], antialias=True) for chunk in chunks])
    return resized.expand(-1, 3, -1, -1).contiguous(), labels[indices]


def load_digits(size: int, limit: int | None, seed: int) -> Loaded:
    """scikit-learn's 1797 handwritten digits."""
    digits = optional_import("sklearn.datasets").load_digits()
    images = (torch.from_numpy(digits.images) * (255 / DIGITS_WHITE)).round().to(torch.uint8)[:, None]
    part = images, torch.from_numpy(digits.target).long()
    train, test = _split(len(images), limit, seed)
    classes = [str(name) for name in digits.target_names]
    return _resized(part, train, size), _resized(part, test, size), classes


@contextmanager
def _fashion_mnist_root(root: Path | None) -> Iterator[Path]:
    """A torchvision root: the system package's files unpacked into a temporary one, else ``root``."""
    archives = sorted(SYSTEM_FASHION_MNIST.glob("*-ubyte.gz"))
    if not archives:
        if root is None:
            raise DataError(
                f"data 'fashion-mnist': no files in {SYSTEM_FASHION_MNIST} and no --data-root; {FASHION_MNIST_REMEDY}"
            )
        yield root
        return
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        for archive in archives:
            try:
                with gzip.open(archive) as packed, (raw / archive.stem).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            except (OSError, EOFError) as error:
                raise DataError(
                    f"data 'fashion-mnist': {archive} is broken ({error}); reinstall the package"
                ) from error
        yield Path(folder)


def load_fashion_mnist(root: Path | None, size: int, limit: int | None, seed: int) -> Loaded:
    """Fashion-MNIST, of the system's package or below ``root``."""
    FashionMNIST = optional_import("torchvision.datasets").FashionMNIST
    with _fashion_mnist_root(root) as found:
        try:
            parts = [FashionMNIST(found, train=train, download=False) for train in (True, False)]
        except Exception as error:  # torchvision's parser raises anything on a broken file
            raise DataError(
                f"data 'fashion-mnist': {found} has no readable FashionMNIST/raw ({error}); {FASHION_MNIST_REMEDY}"
            ) from error
    train, test = (
        _resized((part.data[:, None], part.targets.long()), _chosen(len(part), limit, seed), size) for part in parts
    )
    return train, test, parts[0].classes


def load_cifar10(root: Path | None, size: int, limit: int | None, seed: int) -> Loaded:
    """CIFAR-10 below ``root``."""
    remedy = "give --data-root with the folder that holds cifar-10-batches-py (of cifar-10-python.tar.gz)"
    if root is None:
        raise DataError(f"data 'cifar10': no --data-root; {remedy}")
    CIFAR10 = optional_import("torchvision.datasets").CIFAR10
    try:
        parts = [CIFAR10(root, train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision's parser raises anything on a broken file
        raise DataError(f"data 'cifar10': nothing readable below {root} ({error}); {remedy}") from error
    train, test = (
        _resized(
            (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)),
            _chosen(len(part), limit, seed),
            size,
        )
        for part in parts
    )
    return train, test, parts[0].classes


def existing_folder(name: str) -> Path:
    """The folder called ``name``, or the error for what it is instead."""
    accepted = f"{', '.join(DATASETS)}, or a folder of images"
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"data: {name!r} is a file; accepted: {accepted}")
    if path.name != name:
        raise DataError(f"data: the folder {name!r} does not exist; accepted: {accepted}")
    raise DataError(f"data: unknown data set or folder {name!r}{did_you_mean(name, DATASETS)}; accepted: {accepted}")


def _image_folder(folder: Path) -> Any:
    """torchvision's ``ImageFolder`` (with ``samples``: (file, class index) pairs), or a clear error."""
    try:
        found = optional_import("torchvision.datasets").ImageFolder(folder)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data {str(folder)!r}: {reason}; accepted: one folder per class with image files, "
            f"such as {folder}/cat/1.png, or such folders below train/ and val/ (or test/)"
        ) from error
    if len(found.classes) < 2:
        raise DataError(f"data {str(folder)!r}: got one class ({found.classes[0]!r}); accepted: two classes or more")
    return found


def _decoded(samples: Sequence[tuple[str, int]], size: int) -> Part:
    """Image files -> uint8 [N, 3, size, size] and labels int64 [N]."""
    v2 = optional_import("torchvision.transforms.v2")
    decode = optional_import("torchvision.datasets.folder").default_loader
    to_tensor = v2.Compose([v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    for row, (file, _) in zip(images, samples, strict=True):
        try:
            row.copy_(to_tensor(decode(file)))
        except Exception as error:  # each decoder has its own errors; all mean an unreadable file
            raise DataError(f"data: the image {file} cannot be read ({error}); repair or remove it") from error
    return images, torch.tensor([label for _, label in samples])


def load_folder(folder: Path, size: int, limit: int | None, seed: int) -> Loaded:
    """A folder of images, one folder per class, with or without a test part of its own."""
    test_folder = next((folder / part for part in ("val", "test") if (folder / part).is_dir()), None)
    if (folder / "train").is_dir() and test_folder:
        train_set, test_set = _image_folder(folder / "train"), _image_folder(test_folder)
        if train_set.classes != test_set.classes:
            differing = sorted(set(train_set.classes) ^ set(test_set.classes))
            raise DataError(
                f"data {str(folder)!r}: train and {test_folder.name} must have the same classes; "
                f"only one of them has {', '.join(differing)}"
            )
        train, test = _chosen(len(train_set), limit, seed), _chosen(len(test_set), limit, seed)
    else:
        train_set = test_set = _image_folder(folder)
        train, test = _split(len(train_set), limit, seed)
    return (
        _decoded([train_set.samples[i] for i in train.tolist()], size),
        _decoded([test_set.samples[i] for i in test.tolist()], size),
        train_set.classes,
    )
