"""Quantize a small image classifier: one line, calibrated, in two bits with and without training, mixed precision.

    python examples/quantize.py

Real data (scikit-learn's handwritten digits), a few seconds on a CPU.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import pycompress as pc
from pycompress.quantization import FakeQuant, mixed_precision, sensitivity


def digits():
    """Images (N, 1, 8, 8) in [0, 1] and labels: 1,400 to train on, 397 held out."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(data.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def classifier():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def train(model, images, labels, epochs, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean().item()


def main():
    torch.manual_seed(0)
    (images, labels), test = digits()
    model = train(classifier(), images, labels, epochs=8, lr=3e-3)
    batches = list(images[:500].split(100))  # calibration data needs no labels

    def show(name, quantized):
        print(f"{name:<34}{accuracy(quantized, *test):7.1%}")

    show("float32", model)
    show("int8, dynamic", pc.quantize(model, pc.Int8Dynamic()))
    show("int8, static", pc.quantize(model, pc.Int8Static(), data=batches))
    show("int8, static, percentile", pc.quantize(model, pc.Int8Static(observer="percentile"), data=batches))

    # Fewer bits than a kernel executes, simulated in float layers.
    two = FakeQuant(bits=2, activation_bits=8)
    show("2 bits, rounded to nearest", pc.quantize(model, two))
    show("2 bits, GPTQ + bias correction", pc.quantize(model, two, data=batches, algorithms=["gptq", "bias_correction"]))
    quantizer = pc.Quantizer(two)
    trained = train(quantizer.prepare(model, images[:1], qat="lsq"), images, labels, epochs=3, lr=1e-3)
    show("2 bits, trained", quantizer.convert(trained))
    choice = mixed_precision(model, [FakeQuant(bits=b, activation_bits=8) for b in (2, 3, 4, 8)], batches, bits=3)
    show("3 bits on average, mixed", pc.quantize(model, choice))

    print("\nmost sensitive to 2 bits:")
    for entry in sensitivity(model, two, batches)[:3]:
        print(f"  layer {entry.layer:<4} relative output error {entry.loss:.3f}, {entry.weights:,} weights")


if __name__ == "__main__":
    main()
