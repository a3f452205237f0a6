"""Trainers of other packages, where they are installed: ``model.compile(backend="fqt1bit")``, then hand the model over.

Each test is the example of docs/usage.md with a small network and ``lowering="eager"``. CI does not install them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.nets import SmallNet, small_batch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fqt_compile import backend

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]  # these packages have warnings of their own
ROOT = Path(__file__).parents[1]
EAGER = {"lowering": "eager"}
PACKED = ["conv1", "conv2", "fc1"]


@pytest.fixture(autouse=True)
def _without_the_checkout(monkeypatch):
    """transformers imports a package ``kernels`` where it finds one, and would take this repository's folder for it."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != ROOT])


@pytest.fixture
def graphs(monkeypatch) -> list[list[str]]:
    """The packed layers of every graph that is compiled for training."""
    found: list[list[str]] = []
    run_pipeline = backend.run_pipeline

    def noted(*args, **kwargs):
        state = run_pipeline(*args, **kwargs)
        if any(site.trained for site in state.sites):
            found.append([site.name for site in state.sites if site.packed])
        return state

    monkeypatch.setattr(backend, "run_pipeline", noted)
    return found


def images() -> TensorDataset:
    return TensorDataset(*small_batch(32))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_trained(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter.cpu(), before[name]), name


def test_lightning(graphs, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = SmallNet()
            self.model.compile(backend="fqt1bit", options=EAGER)

        def training_step(self, batch, index):
            images, labels = batch
            return nn.functional.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    module = Classifier()
    before = weights(module)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(images(), batch_size=8, drop_last=True))
    assert graphs == [PACKED]
    assert_trained(module, before)


def test_transformers(graphs, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        """What the Trainer asks of a model: the loss first, if it gets labels."""

        def __init__(self):
            super().__init__()
            self.model = SmallNet()
            self.model.compile(backend="fqt1bit", options=EAGER)

        def forward(self, images, labels=None):
            logits = self.model(images)
            return (nn.functional.cross_entropy(logits, labels), logits) if labels is not None else (logits,)

    module = Classifier()
    before = weights(module)
    rows = [{"images": x, "labels": y} for x, y in images()]
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    settings = transformers.TrainingArguments(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=8, dataloader_drop_last=True, **quiet
    )
    transformers.Trainer(module, settings, train_dataset=rows).train()
    assert graphs == [PACKED]
    assert_trained(module, before)


def test_accelerate(graphs):
    accelerate = pytest.importorskip("accelerate")
    model = SmallNet()
    model.compile(backend="fqt1bit", options=EAGER)
    before = weights(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    accelerator = accelerate.Accelerator(cpu=True)
    step, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(images(), batch_size=8))
    for batch, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(step(batch), labels))
        optimizer.step()
    assert graphs == [PACKED]
    assert_trained(model, before)
