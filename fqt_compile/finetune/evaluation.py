"""The test accuracy of a fine-tuning run, with BatchNorm statistics that belong to the weights it has reached."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from ..recalibrate import recalibrate
from ..results import Step
from .data import ImageData
from .ranks import ALONE, Ranks


@contextlib.contextmanager
def recalibrated(
    step: Step, model: nn.Module, data: ImageData, *, batches: int, batch: int, seed: int, ranks: Ranks = ALONE
) -> Iterator[None]:
    """Within, the running statistics of ``model`` are those of ``batches`` training batches; after, as before.

    The training, and its continuation from a checkpoint, is the same with and without. ``batches`` 0 changes nothing,
    more than an epoch has are an epoch. The images are the first ones of a loader of its own in an order drawn by
    ``seed``: the same at every epoch and in every method, and nothing is drawn from the generators of the run.

    step: the compiled ``model``, which runs in the graph of its training. Of several processes each measures its share
        of these batches, as it is normalized in training; all of them have the mean.
    """
    ranks.lend_buffers(model)
    if not batches:
        yield
        return
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    assert isinstance(step, nn.Module)  # as `torch.compile` makes of a module
    loader = data.train_loader(batch, torch.Generator().manual_seed(seed), ranks)
    try:
        recalibrate(step, itertools.islice(loader, batches))
        ranks.average_buffers(model)
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def evaluate(step: Step, model: nn.Module, data: ImageData, batch: int, ranks: Ranks = ALONE) -> float:
    """The fraction of test images classified correctly, in [0, 1], by the compiled model in eval mode.

    Of several processes each classifies its share; all return the fraction of all images.
    """
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in data.test_batches(batch, ranks):
            correct += int((step(images)[: len(labels)].argmax(1) == labels).sum())
    return ranks.total(correct) / len(data.test_labels)
