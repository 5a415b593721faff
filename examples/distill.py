"""Distil two networks into one that is 20 times smaller, without a single label, on scikit-learn's handwritten digits.

    python examples/distill.py          (about ten seconds on one CPU core; needs scikit-learn)

The teachers have seen 1,000 labelled digits. For the student only 100 labels are left, but all 1,000 images: trained on the
labels it stays mediocre, taught by the teachers on the unlabelled images it comes within about a percentage point of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pycompress.distillation import Distiller, FeatureLoss, KDLoss


def load_data() -> tuple[Tensor, Tensor, DataLoader]:
    """1,000 images (N, 1, 8, 8) in [0, 1] with labels to train on, and 797 held out."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1000], labels[:1000], DataLoader(TensorDataset(images[1000:], labels[1000:]), batch_size=400)


def make_network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


def one_cycle(steps: int) -> dict[str, Callable]:
    """Optimizer and scheduler for ``fit``: AdamW, the learning rate up to 0.02 and down to 0."""
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps),
        "scheduler_interval": "step",
    }


def main() -> None:
    images, labels, held_out = load_data()
    labelled = DataLoader(TensorDataset(images, labels), batch_size=50, shuffle=True)
    few_labels = DataLoader(TensorDataset(images[:100], labels[:100]), batch_size=50, shuffle=True)
    unlabelled = DataLoader(TensorDataset(images), batch_size=50, shuffle=True)
    from_labels = KDLoss(soft_weight=0.0, hard_weight=1.0)  # needs no teacher: plain training
    from_teachers = KDLoss(temperature=2.0, soft_weight=1.0, hard_weight=0.0)  # needs no labels
    models: dict[str, nn.Module] = {}

    # 1. Two teachers learn from 1,000 labels.
    teachers = [make_network(24, seed) for seed in (1, 2)]
    for i, teacher in enumerate(teachers, start=1):
        Distiller(teacher, None, from_labels).fit(labelled, epochs=6, **one_cycle(6 * len(labelled)))
        models[f"teacher {i}, 1,000 labels"] = teacher

    # 2. The same student three times: from 100 labels, from the teachers, and with a hint from inside the first teacher.
    student = models["student, 100 labels"] = make_network(6, seed=3)
    Distiller(student, None, from_labels).fit(few_labels, epochs=100, **one_cycle(100 * len(few_labels)))

    student = models["student, taught"] = make_network(6, seed=3)
    Distiller(student, teachers, from_teachers).fit(unlabelled, epochs=10, **one_cycle(10 * len(unlabelled)))

    student = models["student, taught with hint"] = make_network(6, seed=3)
    loss = from_teachers + FeatureLoss({"4": "models.0.4"}, loss="hint", weight=0.1)
    Distiller(student, teachers, loss).fit(unlabelled, epochs=10, **one_cycle(10 * len(unlabelled)))

    # 3. Compare on the held-out digits.
    print(f"{'model':28}{'parameters':>12}{'accuracy':>10}")
    for name, model in models.items():
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:28}{parameters:12,}{accuracy(model, held_out):10.1%}")


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = sum(int((model(images).argmax(-1) == labels).sum()) for images, labels in loader)
    return right / len(loader.dataset)


if __name__ == "__main__":
    main()
