"""Everything once, on scikit-learn's handwritten digits: train, distil, prune, quantize, look, save, load.

python examples/quickstart.py          (about ten seconds; needs scikit-learn)
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pycompress as pc


def network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )


def accuracy(model, data):
    with torch.no_grad():
        return sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in data) / sum(len(y) for _, y in data)


def main():
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train = DataLoader(TensorDataset(images[order[:1200]], labels[order[:1200]]), batch_size=60, shuffle=True)
    test = DataLoader(TensorDataset(images[order[1200:]], labels[order[1200:]]), batch_size=199)
    x = images[:64]

    # A teacher, trained from the labels alone, and a student that learns from it.
    teacher, student = network(48), network(12)
    pc.Distiller(teacher, None, pc.KDLoss(soft_weight=0.0, hard_weight=1.0)).fit(train, epochs=6)
    pc.Distiller(student, teacher, pc.KDLoss(temperature=4.0, soft_weight=0.9, hard_weight=0.1)).fit(train, epochs=12)
    print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(student, test):.1%}")

    # Half of its channels go for good; a few epochs repair what that broke.
    pc.prune(student, x, pattern="channel", ratio=0.5, ignore=["7"])
    pc.Distiller(student, teacher, pc.KDLoss(temperature=4.0, soft_weight=0.9, hard_weight=0.1)).fit(train, epochs=12)
    print(f"pruned  {accuracy(student, test):.1%}")

    # int8 weights and activations; ranges from the training images.
    small = pc.quantize(student, pc.Int8Static(), data=train)
    print(f"int8    {accuracy(small, test):.1%}\n")
    print(pc.report(small, x))

    with tempfile.TemporaryDirectory() as folder:
        path = pc.save(small, Path(folder) / "small.safetensors")
        same = pc.load(path, network(12))
        print(f"\n{path.stat().st_size} bytes on disk, identical after loading: {torch.equal(same(x), small.eval()(x))}")


if __name__ == "__main__":
    main()
