"""ResNet, MobileNetV2 and MobileNetV3 with the blocks of torchvision, narrow and on small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = nn.ReLU):
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


class BasicBlock(nn.Module):
    """He et al. 2015, figure 5 left; 1 x 1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 32, 1))
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.hardsigmoid(self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, figure 3; with squeeze-excite Howard et al. 2019, figure 4."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: type[nn.Module], kernel: int = 3, squeeze: bool = False) -> None:
        super().__init__()
        hidden = inputs * 4
        self.residual = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            conv_bn(inputs, hidden, 1, activation=activation),
            conv_bn(hidden, hidden, kernel, stride, groups=hidden, activation=activation),
            SqueezeExcite(hidden) if squeeze else nn.Identity(),
            conv_bn(hidden, outputs, 1, activation=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNet(nn.Module):
    def __init__(self, v3: bool, classes: int = 10) -> None:
        super().__init__()
        activation = nn.Hardswish if v3 else nn.ReLU6
        self.features = nn.Sequential(
            conv_bn(3, 8, 3, 2, activation=activation),
            InvertedResidual(8, 8, 1, nn.ReLU if v3 else activation),
            InvertedResidual(8, 16, 2, activation, 5 if v3 else 3, v3),
            InvertedResidual(16, 16, 1, activation, 5 if v3 else 3, v3),
            conv_bn(16, 64, 1, activation=activation),
        )
        self.classifier = nn.Sequential(nn.Linear(64, 32), activation(), nn.Dropout(0.2), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


MODELS = {"resnet": ResNet, "mobilenet_v2": lambda: MobileNet(v3=False), "mobilenet_v3": lambda: MobileNet(v3=True)}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights and settled BatchNorm statistics, in eval mode, and a batch of 4 images 40 x 40."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
    x = torch.randn(4, 3, 40, 40, generator=generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # a plain mean over the batches
        for _ in range(3):
            model.train()(torch.randn(16, 3, 40, 40, generator=generator))
    return model.eval(), x
