"""Prune a small image classifier three ways: scattered zeros, 2:4 zeros, and fewer channels.

    python examples/prune.py

Real data (scikit-learn's handwritten digits), a few seconds on a CPU.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import pycompress as pc
from pycompress.pruning import recalibrate_batchnorm


def digits():
    """Images (N, 1, 8, 8) in [0, 1] and labels: 1,400 to train on, 397 held out."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(data.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


class Net(nn.Module):
    """A residual block, so that channels have to be removed in several layers together."""

    def __init__(self, width=32):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 4, 10)

    def forward(self, x):
        x = F.max_pool2d(self.bn0(self.stem(x)).relu(), 2)
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        return self.head(F.max_pool2d(x, 2).flatten(1))


def train(model, data, epochs, pruner=None, lr=2e-3):
    images, labels = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if pruner is not None and pruner.step().structure_changed:
                optimizer = torch.optim.AdamW(model.parameters(), lr=lr)  # new, smaller Parameters


def show(name, model, test):
    with torch.no_grad():
        accuracy = (model.eval()(test[0]).argmax(1) == test[1]).float().mean().item()
    parameters = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    print(f"{name:<38} {accuracy:8.1%} {parameters:>10,} {zeros / parameters:8.1%}")


def main():
    torch.manual_seed(0)
    training, test = digits()
    dense = Net()
    train(dense, training, epochs=5)
    print(f"{'':<38} {'accuracy':>8} {'parameters':>10} {'zeros':>8}")
    show("dense", dense, test)

    # Scattered zeros: 90% of the weights, a little more at each of 20 steps while training goes on.
    model = copy.deepcopy(dense)
    pruner = pc.Pruner(model, test[0][:1], ratio=0.9, scope="global", schedule="cubic", steps=20, frequency=2)
    train(model, training, epochs=4, pruner=pruner)
    show("90% unstructured, gradual", pruner.convert(), test)

    # Two of four: the pattern that sparse kernels run, chosen with the activations of the training loop itself.
    model = copy.deepcopy(dense)
    pruner = pc.Pruner(model, test[0][:1], pattern="2:4", criterion="wanda", steps=10, ignore=["stem"])
    train(model, training, epochs=2, pruner=pruner)
    print()
    print(pruner.summary())
    print()
    show("2:4, wanda", pruner.convert(), test)

    # Half of the channels at once: a smaller dense network that runs faster everywhere. One call, then repair.
    model = pc.prune(
        copy.deepcopy(dense), test[0][:1], pattern="channel", ratio=0.5, criterion="taylor", data=[training], loss_fn=F.cross_entropy
    )
    show("half the channels, not repaired", model, test)
    recalibrate_batchnorm(model, training[0].split(200))
    show("half the channels, BatchNorm repaired", model, test)
    train(model, training, epochs=4)
    show("half the channels, fine-tuned", model, test)


if __name__ == "__main__":
    main()
