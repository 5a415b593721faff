"""The networks of the demo."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """``relu(x + f(x))``: channel removal must shrink both sides of the sum alike."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = block(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


def teacher() -> nn.Module:
    """One of the ensemble: 168 thousand parameters."""
    return nn.Sequential(
        block(1, 32),
        block(32, 64, stride=2),
        Residual(64),
        block(64, 128, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def student() -> nn.Module:
    """22 thousand parameters, less than a twentieth of three teachers."""
    return nn.Sequential(
        block(1, 16),
        block(16, 24, stride=2),
        Residual(24),
        block(24, 32, stride=2),
        nn.Flatten(),
        nn.Linear(32 * 4, 10),
    )
