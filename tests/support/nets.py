"""A small net with everything that the passes meet, a batch for it, and one step of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SmallNet(nn.Module):
    """Two packed convolutions around a skip connection, a down-sampling branch and a packed linear layer."""

    def __init__(self, norm: bool = False, channels: int = 32, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.conv2 = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=False)
        self.down = nn.Conv2d(c, 2 * c, 1, stride=2)
        self.fc1 = nn.Linear(2 * c * 4, 64)
        self.fc2 = nn.Linear(64, 10)
        self.norm1 = nn.BatchNorm2d(c) if norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(2 * c) if norm else nn.Identity()
        self.act = activation()
        for module in self.modules():
            # A channel whose normalized output is exactly 0 sits on the ReLU's corner, where the last bit decides.
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, 0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        x = x + self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)) + self.down(x))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.fc2(self.act(self.fc1(x)))


def small_batch(batch: int = 8, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels for `SmallNet`."""
    return torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))


def step_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int = 5):
    """Loss and parameter gradients of one cross-entropy step from a fixed generator state."""
    torch.manual_seed(seed)
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    gradients = {
        name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return loss.item(), gradients


def compiled(model: nn.Module, **options: object) -> Any:
    """The model as its users compile it."""
    return torch.compile(model, backend="fqt1bit", options=options)


class PreActivation(nn.Module):
    """BatchNorm on the way around a packed layer: rows without gradient get values again, which must not be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(3))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.blocks, self.norms, strict=True):
            x = x + conv(torch.relu(norm(x)))
        return self.fc(x.mean((2, 3)))
