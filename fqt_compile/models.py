"""The networks of the command line: torchvision classifiers, users' factories and a small one for the demo."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from .errors import ConfigError, FQTError, did_you_mean
from .optional import optional_import


def small_vgg(num_classes: int) -> nn.Module:
    """The demo network: [N, 3, H, W] -> [N, num_classes], H and W at least 4.

    Five convolutions 3x3 of 32, 64, 64, 128 and 128 channels with BatchNorm and ReLU; the first and the
    linear layer stay in float, the four between them are packed.
    """
    layers: list[nn.Module] = []
    width = 3
    for channels, pool in ((32, True), (64, False), (64, True), (128, False), (128, False)):
        layers += [nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def vgg16_cifar(num_classes: int = 10) -> nn.Module:
    """VGG-16 for 32 px images, [N, 3, 32, 32] -> [N, num_classes]: 13 convolutions with BatchNorm, one linear layer.

    The network of the paper's speed measurement (arXiv 2408.14267, VGG-16 on CIFAR-10).
    """
    layers: list[nn.Module] = []
    width = 3
    for channels in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if channels:
            layers += [nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, num_classes))


def make_model(arch: str, *, classes: int, size: int) -> nn.Module:
    """A classifier [N, 3, size, size] -> [N, classes], freshly initialized from torch's default generator.

    ``arch`` is the name of a torchvision classifier, or ``module:factory`` or ``path/to/file.py:factory``,
    where ``factory(num_classes=classes)`` returns the module.

    Raises `ConfigError`: unknown name, factory that fails, model that does not map the shapes above.
    """
    try:
        model = _from_factory(arch, classes) if ":" in arch else _from_torchvision(arch, classes, size)
    except FQTError:
        raise
    except Exception as error:  # of the user's code
        raise ConfigError(f"arch {arch!r}: building it failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"arch {arch!r}: the factory returned {type(model).__name__}; accepted: a torch.nn.Module")
    trial = copy.deepcopy(model).train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = trial(torch.zeros(2, 3, size, size))
    except Exception as error:  # of the model's layers
        raise ConfigError(
            f"arch {arch!r} does not accept images of {size} x {size} pixels ({error}); give another --size"
        ) from error
    if not isinstance(output, torch.Tensor) or output.shape != (2, classes):
        got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ConfigError(f"arch {arch!r}: output for 2 images: got {got}; accepted: a tensor [2, {classes}]")
    return model


def head_name(model: nn.Module) -> str | None:
    """The module path of the last linear layer; None without one."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


def _from_torchvision(arch: str, classes: int, size: int) -> nn.Module:
    models = optional_import("torchvision.models")
    names = models.list_models(module=models)
    if arch not in names:
        hint = did_you_mean(arch, names)
        raise ConfigError(
            f"arch: unknown torchvision classifier {arch!r}{hint}; accepted: a classification model of "
            "torchvision.models, module:factory or path/to/file.py:factory"
        )
    extra = {"image_size": size} if arch.startswith("vit_") else {}  # its position embedding has a fixed size
    model: nn.Module = models.get_model(arch, weights=None, num_classes=classes, **extra)
    return model


def _from_factory(arch: str, classes: int) -> nn.Module:
    """Import ``module:factory`` (the working directory counts) or ``file.py:factory`` and call it."""
    source, _, name = arch.rpartition(":")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    except Exception as error:  # of the user's module
        raise ConfigError(
            f"arch {arch!r}: {source!r} cannot be imported: {type(error).__name__}: {error}; "
            "accepted: an importable module or a Python file"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"arch {arch!r}: {source!r} has no callable {name!r}{did_you_mean(name, dir(module))}")
    model: nn.Module = factory(num_classes=classes)
    return model


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fqt1bit_arch_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
