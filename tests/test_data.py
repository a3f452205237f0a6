"""Data sets of the command line: contents, splits, errors."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import pytest
import torch

from fqt_compile.finetune import data, folders, sources
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
        ("x" * 300, "cannot be looked for"),
        ("~no-such-user/x", "cannot be looked for"),
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


def system_files(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "SYSTEM_FASHION_MNIST", folder)
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", torch.zeros(12, 28, 28, dtype=torch.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", torch.arange(12).remainder(10).to(torch.uint8))


@pytest.mark.parametrize("damage", ["flip", "text", "empty", "short", "long", "ints", "folder"])
def test_broken_idx_files_are_named(tmp_path, monkeypatch, damage):
    system_files(tmp_path, monkeypatch)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = bytearray(path.read_bytes())
    content = gzip.decompress(whole)
    whole[len(whole) // 2] ^= 255  # in the packed zeros
    damaged = {
        "flip": bytes(whole),
        "text": b"no archive",
        "empty": b"",
        "short": gzip.compress(content[:-1]),
        "long": gzip.compress(content + b"1"),
        "ints": gzip.compress(content[:2] + b"\x0c" + content[3:]),
    }
    path.unlink()
    if damage == "folder":
        path.mkdir()
        with pytest.raises(DataError, match=r"no readable t10k-images-idx3-ubyte or .*install the Debian package"):
            data.load("fashion-mnist", size=28)
        return
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is broken .*; remedy: replace it"):
        data.load("fashion-mnist", size=28)


def test_idx_files_that_do_not_belong_together(tmp_path, monkeypatch):
    system_files(tmp_path, monkeypatch)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    for wrong in (torch.arange(11), torch.arange(12), torch.arange(0)):
        write_idx(labels, wrong.to(torch.uint8))
        with pytest.raises(DataError, match=r"the part train .* has 12 images and \d+ labels up to \d+; accepted:"):
            data.load("fashion-mnist", size=28)


def test_unpacked_files_below_the_root(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    system_files(raw, monkeypatch)
    monkeypatch.setattr(sources, "SYSTEM_FASHION_MNIST", tmp_path / "none")
    for path in list(raw.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(data.load("fashion-mnist", root=tmp_path, size=8).train_labels) == 12


@pytest.mark.parametrize("target", [".", "..", "../../", "../b"])
def test_links_in_a_circle_are_refused(tmp_path, target):
    folder = write_images(tmp_path / "set", {"a": 2, "b": 2})
    (folder / "a" / "link").symlink_to(target)
    (folder / "b" / "link").symlink_to("../a")
    with pytest.raises(DataError, match=r"link is a symbolic link back to .*; remedy: remove the link"):
        data.load(str(folder), size=8)


@pytest.mark.parametrize("place", ["c", "a/c", "a/c.png"])
def test_a_link_to_itself_is_named(tmp_path, place):
    write_images(tmp_path, {"a": 2, "b": 2})
    (tmp_path / place).symlink_to(Path(place).name)
    with pytest.raises(DataError, match=rf"{place} is a symbolic link in a circle; .*remedy: remove it"):
        data.load(str(tmp_path), size=8)


def test_links_that_lead_elsewhere_are_followed(tmp_path):
    write_images(tmp_path / "elsewhere", {"a": 3, "b": 3})
    (tmp_path / "set" / "b").mkdir(parents=True)
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "set" / "b" / "more").symlink_to(tmp_path / "elsewhere" / "b")
    loaded = data.load(str(tmp_path / "set"), size=8)
    assert len(loaded.train_labels) + len(loaded.test_labels) == 6


def test_images_that_are_no_files(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "x.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"x\.png cannot be read"):
        data.load(str(tmp_path), size=8)
    (tmp_path / "a" / "x.png").unlink()
    os.mkfifo(tmp_path / "a" / "x.png")
    with pytest.raises(DataError, match=r"x\.png cannot be read \(it is no file\)"):
        data.load(str(tmp_path), size=8)


def test_the_same_images_in_the_same_order_as_torchvision(tmp_path):
    write_images(tmp_path, {"a": 3, "b/y": 12, "b/x": 3, "b/x/z": 2, "b/x-1": 2})
    theirs = pytest.importorskip("torchvision.datasets").ImageFolder(tmp_path)
    ours = folders.image_folder(tmp_path)
    assert list(ours.samples) == theirs.samples
    assert list(ours.classes) == theirs.classes


@pytest.mark.parametrize("parts", [["train"], ["val"], ["train", "validation"], ["Train", "Test"], ["train", "other"]])
def test_a_part_without_the_other(tmp_path, parts):
    for part in parts:
        write_images(tmp_path / part, {"a": 2, "b": 2})
    with pytest.raises(DataError, match=r"accepted: train/ together with val/ or test/.*; remedy: .*split 80/20"):
        data.load(str(tmp_path), size=8)


def test_a_class_may_be_called_train(tmp_path):
    loaded = data.load(str(write_images(tmp_path, {"car": 5, "train": 5})), size=8)
    assert loaded.classes == ("car", "train")


def test_limit_that_leaves_one_class(tmp_path):
    write_images(tmp_path, {"a": 5, "b": 5})
    with pytest.raises(DataError, match="all belong to one class"):
        data.load(str(tmp_path), size=8, limit=1)


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn .*pip install 'fqt-compile\[demo\]'"):
        data.load("digits")


def test_a_package_built_for_another_torch_names_the_remedy(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(MissingPackageError, match=r"torchvision .*nms does not exist\); install it"):
        data.load("digits")
