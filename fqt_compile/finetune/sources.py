"""Where images come from: scikit-learn, the system's packages and torchvision's files (folders: `folders`)."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FQTError
from ..optional import optional_import

DATASETS = ("digits", "fashion-mnist", "cifar10")
SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
FASHION_MNIST_REMEDY = (
    "install the Debian package dataset-fashion-mnist, or give --data-root with the folder that holds FashionMNIST/raw"
)
TEST_FRACTION = 0.2  # of a data set that comes in one piece
UNSIGNED_BYTE = 8  # the type code of the format idx
DIGITS_WHITE = 16  # the brightest pixel of scikit-learn's digits
RESIZE_CHUNK = 4096  # images resized at a time, which bounds the memory of the resize

Part = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W] and labels int64 [N]
Loaded = tuple[Part, Part, Sequence[str]]  # training part, test part, class names


class DataError(FQTError, ValueError):
    """A data set is unknown, absent, unreadable or too small."""


def chosen(count: int, limit: int | None, seed: int) -> Tensor:
    """Indices [min(count, limit)] of a subset drawn by ``seed``; all in order without a limit."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]


def split(count: int, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
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
    train, test = split(len(images), limit, seed)
    classes = [str(name) for name in digits.target_names]
    return _resized(part, train, size), _resized(part, test, size), classes


def _fashion_mnist_folder(root: Path | None) -> tuple[Path, str]:
    """Where the files are: a folder that exists for the user, and the way from there."""
    if any(SYSTEM_FASHION_MNIST.glob("*-ubyte.gz")):
        return SYSTEM_FASHION_MNIST, ""
    if root is None:
        raise DataError(
            f"data 'fashion-mnist': no files in {SYSTEM_FASHION_MNIST} and no --data-root; {FASHION_MNIST_REMEDY}"
        )
    return root, "FashionMNIST/raw/"


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The values of a file in the format idx, uint8, packed by gzip where its name ends so.

    Raises `DataError`: not readable, another format, other dimensions, too short or too long.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data: {path} is broken ({error}); remedy: replace it by a good copy") from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(content) != start + math.prod(shape):
        raise DataError(
            f"data: {path} is broken (got {len(content)} bytes that begin with {content[:start].hex()}); accepted: the "
            f"format idx, unsigned bytes in {dimensions} dimensions; remedy: replace it by a good copy"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


def _fashion_mnist_part(base: Path, way: str, part: str, classes: int) -> Part:
    def read(kind: str, dimensions: int) -> Tensor:
        name = f"{way}{part}-{kind}-idx{dimensions}-ubyte"
        for path in (base / name, base / f"{name}.gz"):
            if path.is_file():
                return read_idx(path, dimensions)
        raise DataError(f"data 'fashion-mnist': {base} has no readable {name} or {name}.gz; {FASHION_MNIST_REMEDY}")

    images, labels = read("images", 3), read("labels", 1).long()
    if len(images) != len(labels) or not len(labels) or int(labels.max()) >= classes:
        raise DataError(
            f"data 'fashion-mnist': the part {part} in {base} has {len(images)} images and {len(labels)} labels up to "
            f"{max(labels.tolist(), default=0)}; accepted: as many, and labels below {classes}; {FASHION_MNIST_REMEDY}"
        )
    return images[:, None], labels


def load_fashion_mnist(root: Path | None, size: int, limit: int | None, seed: int) -> Loaded:
    """Fashion-MNIST, of the system's package or below ``root``."""
    classes = optional_import("torchvision.datasets").FashionMNIST.classes
    base, way = _fashion_mnist_folder(root)
    parts = [_fashion_mnist_part(base, way, part, len(classes)) for part in ("train", "t10k")]
    train, test = (_resized(part, chosen(len(part[1]), limit, seed), size) for part in parts)
    return train, test, classes


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
            chosen(len(part), limit, seed),
            size,
        )
        for part in parts
    )
    return train, test, parts[0].classes
