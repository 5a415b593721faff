"""Small models with the shapes that quantization meets: convolutions, normalization, residuals, shared and tied layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Reproducible weights and BatchNorm statistics; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def convnet() -> nn.Module:
    """Input (N, 3, 9, 7)."""
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
    )


def mlp(width: int = 16) -> nn.Module:
    """Input (N, 7)."""
    return seeded(nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3)))


class Tied(nn.Module):
    """An embedding that is also the output layer, and a block used twice. Input (N, L) int."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.relu(self.block(self.embed(x)))))


def encoder() -> nn.Module:
    """Input (N, L, 8)."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return seeded(nn.TransformerEncoder(layer, 2))
