"""A fine-tuning job that is over in a second."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from fqt_compile.config import FQTConfig
from fqt_compile.finetune import FinetuneSettings
from fqt_compile.finetune import training as job

TINY = f"{__file__}:tiny"


def tiny(num_classes: int) -> nn.Module:
    """Has dropout, so that an exact resume needs torch's generator, and BatchNorm, which has buffers."""
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))


def not_a_model(num_classes: int) -> str:
    return "text"


@pytest.fixture
def uncompiled(monkeypatch):
    """The seam: every method trains the plain model, except that FQT's gradients are not quantized."""
    seen: list[FQTConfig | None] = []

    def compile_step(model, config):
        seen.append(config)
        return model

    monkeypatch.setattr(job, "compile_step", compile_step)
    return seen


@pytest.fixture
def settings(tmp_path):
    return FinetuneSettings(
        arch=TINY, size=8, limit=100, batch=16, epochs=2, qat_epochs=2, lr=1e-2, out=tmp_path / "run"
    )


def again(settings: FinetuneSettings, **changes: object) -> FinetuneSettings:
    return job.dataclasses.replace(settings, **changes)


def quiet() -> Console:
    return Console(quiet=True)


def state_of(settings: FinetuneSettings, name: str) -> dict:
    return torch.load(settings.out / name, weights_only=True)


def interrupt_after(monkeypatch, epochs: int) -> None:
    """Raise KeyboardInterrupt in the middle of the epoch after ``epochs`` finished ones."""
    finished, train_epoch = [0], job.Running.train_epoch

    def interrupted(self, where, advance):
        if finished[0] == epochs:
            next(iter(self.loader))
            torch.rand(7)
            raise KeyboardInterrupt
        finished[0] += 1
        return train_epoch(self, where, advance)

    monkeypatch.setattr(job.Running, "train_epoch", interrupted)
