"""Data sets of the command line: contents, splits, errors."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch

from fqt_compile.finetune import data, sources
from fqt_compile.finetune.sources import DataError
from fqt_compile.optional import MissingPackageError

to_pil_image = pytest.importorskip("torchvision.transforms.functional").to_pil_image


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (10, 12)) -> Path:
    """``classes``: number of random PNG files per class."""
    generator = torch.Generator().manual_seed(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
            to_pil_image(image).save(folder / name / f"{index}.png")
    return folder


def test_digits_are_resized_and_split_by_seed():
    pytest.importorskip("sklearn")
    loaded = data.load("digits", size=16, seed=3)
    assert loaded.train_images.shape == (1438, 3, 16, 16)
    assert loaded.test_images.shape == (359, 3, 16, 16)
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.classes == tuple("0123456789")
    assert loaded.fingerprint() == data.load("digits", size=16, seed=3).fingerprint()
    assert loaded.fingerprint() != data.load("digits", size=16, seed=4).fingerprint()


def test_normalized_training_set_has_mean_0_and_deviation_1():
    pytest.importorskip("sklearn")
    loaded = data.load("digits", size=8, limit=100)
    images = loaded.normalize(loaded.train_images)
    assert len(images) == 100
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert abs(images.mean().item()) < 1e-5
    assert abs(images.std(correction=0).item() - 1) < 1e-5


def test_loader_repeats_with_its_generator_and_drops_the_rest(tmp_path):
    loaded = data.load(str(write_images(tmp_path, {"a": 9, "b": 9})), size=8)
    orders = []
    for _ in range(2):
        batches = list(loaded.train_loader(4, torch.Generator().manual_seed(1)))
        assert [len(labels) for _, labels in batches] == [4, 4, 4]
        orders.append(torch.cat([images for images, _ in batches]))
    assert torch.equal(*orders)


def test_test_batches_keep_their_shape_and_lose_no_image(tmp_path):
    loaded = data.load(str(write_images(tmp_path, {"a": 15, "b": 15})), size=8)
    batches = list(loaded.test_batches(4))
    assert [len(images) for images, _ in batches] == [4, 4]
    assert torch.equal(torch.cat([labels for _, labels in batches]), loaded.test_labels)
    real = torch.cat([images[: len(labels)] for images, labels in batches])
    assert torch.equal(real, loaded.normalize(loaded.test_images))


def test_folder_with_train_and_val(tmp_path):
    write_images(tmp_path / "train", {"a": 3, "b": 2})
    write_images(tmp_path / "val", {"a": 1, "b": 1})
    loaded = data.load(str(tmp_path), size=8, limit=4)
    assert loaded.train_images.shape == (4, 3, 8, 8)
    assert loaded.test_labels.tolist() == [0, 1]
    assert loaded.classes == ("a", "b")


def test_train_and_val_with_different_classes(tmp_path):
    write_images(tmp_path / "train", {"a": 1, "b": 1})
    write_images(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="same classes; only one of them has b, c"):
        data.load(str(tmp_path), size=8)


def test_broken_image_is_named(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})
    broken = tmp_path / "a" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"a/1\.png cannot be read"):
        data.load(str(tmp_path), size=8)


def test_folder_without_classes_and_with_one(tmp_path):
    with pytest.raises(DataError, match="one folder per class"):
        data.load(str(tmp_path), size=8)
    write_images(tmp_path, {"only": 3})
    with pytest.raises(DataError, match=r"one class \('only'\)"):
        data.load(str(tmp_path), size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        data.load(str(tmp_path), size=8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", r"unknown data set or folder 'digit' \(did you mean 'digits'\?\)"),
        ("no/such/folder", "the folder 'no/such/folder' does not exist"),
        (__file__, "is a file; accepted: digits"),
        ("cifar10", "no --data-root"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(DataError, match=message):
        data.load(name)


def test_absent_cifar10_and_fashion_mnist(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nothing readable below .*cifar-10-batches-py"):
        data.load("cifar10", root=tmp_path)
    monkeypatch.setattr(sources, "SYSTEM_FASHION_MNIST", tmp_path)
    with pytest.raises(DataError, match="install the Debian package dataset-fashion-mnist"):
        data.load("fashion-mnist")
    with pytest.raises(DataError, match="no readable FashionMNIST/raw"):
        data.load("fashion-mnist", root=tmp_path)


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.numpy().tobytes())


def test_fashion_mnist_from_the_system_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SYSTEM_FASHION_MNIST", tmp_path)
    for part, count in (("train", 20), ("t10k", 6)):
        images = torch.arange(count * 784).remainder(256).to(torch.uint8).reshape(count, 28, 28)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", torch.arange(count).remainder(10).to(torch.uint8))
    loaded = data.load("fashion-mnist", size=28)
    assert torch.equal(loaded.train_images[1, 2].flatten(), torch.arange(784, 1568).remainder(256).byte())
    assert loaded.test_labels.tolist() == [0, 1, 2, 3, 4, 5]
    broken = tmp_path / "train-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:30])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is broken"):
        data.load("fashion-mnist", size=28)


def test_limit_that_leaves_one_class(tmp_path):
    write_images(tmp_path, {"a": 5, "b": 5})
    with pytest.raises(DataError, match="all belong to one class"):
        data.load(str(tmp_path), size=8, limit=1)


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn .*pip install 'fqt-compile\[demo\]'"):
        data.load("digits")
