"""Small networks with the structures that make channel removal hard."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """Two residual blocks, one with a projection, flattened into a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.short = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        x = (self.short(x) + self.bn3(self.conv3(x))).relu()
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Concat(nn.Module):
    """Branches that are concatenated, a dense connection, BatchNorm over the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 10, 1)
        self.bn = nn.BatchNorm2d(16)
        self.mix = nn.Conv2d(16, 7, 3, padding=1)
        self.head = nn.Linear(23, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = self.bn(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.head(torch.cat([both, self.mix(both)], 1).mean((2, 3)))


class Mobile(nn.Module):
    """Inverted residual with a depthwise convolution and squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.bn1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.bn3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu6(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x + self.bn3(self.project(y))).mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt-like grouped convolution between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.last = nn.Conv2d(18, 9, 1)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.grouped(self.first(x).relu()).relu()).relu().mean((2, 3)))


class Gated(nn.Module):
    """A gated unit: both halves of a convolution's output belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(3, 20, 3, padding=1)
        self.mix = nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, 1)
        return self.head(self.mix(value * gate.sigmoid()).relu().mean((2, 3)))


class Decoder(nn.Module):
    """Transposed convolution and a skip connection; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.skip = nn.Conv2d(3, 6, 1)
        self.out = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.up(self.down(x).relu()) + self.skip(x)).relu())


class TwoOutputs(nn.Module):
    """Returns an inner feature map beside the logits, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 6, 3, padding=1)
        self.feature = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.feature(self.inner(x).relu())
        return {"feature": feature, "logits": self.head(feature.mean((2, 3)))}


class Attention(nn.Module):
    """Hand-written attention that views channels as heads: the inner width is fixed by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 24)
        self.project = nn.Linear(8, 16)
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        query, key, value = self.qkv(self.norm(x)).view(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape[0], 5, 8)
        x = x + self.project(mixed)
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean(1))


IMAGE = (2, 3, 8, 8)


def train_statistics(model: nn.Module) -> nn.Module:
    """Non-trivial BatchNorm parameters and averages, as after training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.3, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()
