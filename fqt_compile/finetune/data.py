"""Image data sets for the command line, in memory as uint8, normalized batch by batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

from ..optional import optional_import
from .folders import existing_folder, load_folder
from .ranks import ALONE, Ranks
from .sources import DataError, load_cifar10, load_digits, load_fashion_mnist


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """A classification set, split into training and test part.

    ``train_images``, ``test_images``: uint8 [N, 3, size, size], 0..255, contiguous.
    ``train_labels``, ``test_labels``: int64 [N], indices into ``classes``.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...] = dataclasses.field(init=False)
    std: tuple[float, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        mean, std = _channel_statistics(self.train_images)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def normalize(self, images: Tensor) -> Tensor:
        """``(images / 255 - mean) / std`` with the training set's statistics per channel.

        uint8 [N, 3, H, W] -> float32 [N, 3, H, W], channels_last.
        """
        functional = optional_import("torchvision.transforms.v2.functional")
        scaled = functional.to_dtype(images, torch.float32, scale=True)
        normalized: Tensor = functional.normalize(scaled, list(self.mean), list(self.std))
        return normalized.contiguous(memory_format=torch.channels_last)

    def train_loader(self, batch: int, generator: torch.Generator, ranks: Ranks = ALONE) -> DataLoader[Any]:
        """Shuffled full batches ``(float32 [batch, 3, size, size], int64 [batch])``; the rest is dropped.

        Of several processes each gets its share of the same batches, ``batch / ranks.world`` images. The order depends
        on ``generator`` only, so its state, which is that of all processes, is all that an exact resume has to restore.
        """
        dataset = TensorDataset(self.train_images, self.train_labels)
        batches = BatchSampler(RandomSampler(dataset, generator=generator), batch, drop_last=True)
        return DataLoader(
            dataset,
            sampler=_Shares(batches, ranks),
            batch_size=None,
            generator=generator,
            collate_fn=lambda pair: (self.normalize(pair[0]), pair[1]),
        )

    def test_batches(self, batch: int, ranks: Ranks = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order as ``(float32 [batch, 3, size, size], int64 [n])`` with n <= batch.

        Of several processes each gets every ``ranks.world``-th of these batches.

        Every image tensor has ``batch`` entries, so that a compiled model keeps its static shape: the last
        one is filled up with images from the start of the test set. Only the first n predictions count.
        """
        for start in range(ranks.rank * batch, len(self.test_labels), ranks.world * batch):
            indices = torch.arange(start, start + batch) % len(self.test_labels)
            yield self.normalize(self.test_images[indices]), self.test_labels[start : start + batch]

    def fingerprint(self) -> str:
        """A hash of all images, labels and class names."""
        digest = hashlib.blake2b("\0".join(self.classes).encode(), digest_size=16)
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


class _Shares(Sampler[Any]):
    """One process's shares of batches of indices."""

    def __init__(self, batches: BatchSampler, ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks

    def __iter__(self) -> Iterator[Any]:
        return map(self.ranks.share, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def load(name: str, *, root: Path | None = None, size: int = 32, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load a data set by name (`sources.DATASETS`) or a folder of images.

    Parameters
    ----------
    name: ``digits`` (scikit-learn), ``fashion-mnist`` (system folder, else ``root``), ``cifar10`` (``root``),
        or a folder: ``train/`` and ``val/`` (or ``test/``) with one folder per class each, or one folder per
        class, split 80/20.
    root: the ``root`` of ``torchvision.datasets``; nothing is ever downloaded.
    size: images are resized (bilinear, antialiased) to size x size pixels; those of a folder so that the
        shorter side fits, then cropped in the middle. Grayscale is repeated to 3 channels.
    limit: keep at most this many training and this many test images, chosen by ``seed``.
    seed: of the split and of ``limit``.

    Raises
    ------
    DataError: unknown name, absent, empty or broken data, fewer than two classes.
    MissingPackageError: torchvision or scikit-learn is not installed.
    """
    optional_import("torchvision")
    if name == "digits":
        train, test, classes = load_digits(size, limit, seed)
    elif name == "fashion-mnist":
        train, test, classes = load_fashion_mnist(root, size, limit, seed)
    elif name == "cifar10":
        train, test, classes = load_cifar10(root, size, limit, seed)
    else:
        train, test, classes = load_folder(existing_folder(name), size, limit, seed)
    if len(train[1].unique()) < 2:
        raise DataError(
            f"data {name!r}: the {len(train[1])} training images all belong to one class; "
            "accepted: two classes or more; add classes or images, or raise --limit"
        )
    return ImageData(
        name=name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=tuple(classes),
    )


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 [N, C, H, W] / 255; of a constant channel 1."""
    channels = images.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = counts.double() / counts.sum(1, keepdim=True)
    mean = (weights * values).sum(1)
    std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())
