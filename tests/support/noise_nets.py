"""Small nets of the kinds that differ in how rows interact, and batches of digits for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqt_compile

BATCH, SIZE = 64, 14


def convolution(inputs: int, outputs: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()]


def classifier(*body: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a skip connection; BatchNorm behind each, or (``pre``) in front of each."""

    def __init__(self, channels: int, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def depthwise(inputs: int, outputs: int) -> list[nn.Module]:
    first = [nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6()]
    return [*first, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6()]


def vgg_like() -> nn.Module:
    pool = nn.MaxPool2d(2)
    first = [*convolution(3, 32), pool, *convolution(32, 64), *convolution(64, 64), pool]
    return classifier(*first, *convolution(64, 128), *convolution(128, 128), channels=128)


def resnet_like() -> nn.Module:
    return classifier(*convolution(3, 64), nn.MaxPool2d(2), Residual(64, False), Residual(64, False), channels=64)


def pre_activation() -> nn.Module:
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.MaxPool2d(2)]
    return classifier(*stem, Residual(64, True), Residual(64, True), nn.BatchNorm2d(64), nn.ReLU(), channels=64)


def depthwise_mixed() -> nn.Module:
    body = [*depthwise(64, 64), *depthwise(64, 128), *depthwise(128, 128)]
    return classifier(*convolution(3, 64), nn.MaxPool2d(2), *body, channels=128)


def layer_norm() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, activation in ((3 * SIZE * SIZE, nn.ReLU()), (128, nn.GELU()), (128, nn.ReLU())):
        layers += [nn.Linear(inputs, 128), nn.LayerNorm(128), activation]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def group_norm() -> nn.Module:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels)

    body = [*convolution(32, 64, norm), *convolution(64, 64, norm), *convolution(64, 64, norm)]
    return classifier(*convolution(3, 32, norm), nn.MaxPool2d(2), *body, channels=64)


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg_like,
    "resnet": resnet_like,
    "pre-activation": pre_activation,
    "depthwise": depthwise_mixed,
    "layer norm": layer_norm,
    "group norm": group_norm,
}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as images ``[1797, 3, 14, 14]``, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE)).expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(data.target)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = digits()
    return list(zip(images.split(BATCH)[:count], labels.split(BATCH)[:count], strict=True))


def trained(build: Callable[[], nn.Module], steps: int) -> nn.Module:
    """After a few steps with exact gradients of the binary net."""
    torch.manual_seed(3)
    model, (images, labels) = build(), digits()
    step = fqt_compile.eager(model, {"grad": "exact"})
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        index = torch.randint(0, len(labels), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(step(images[index]), labels[index]).backward()
        optimizer.step()
    return model
