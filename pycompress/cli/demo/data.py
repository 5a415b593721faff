"""The handwritten digits that scikit-learn ships (UCI ML repository, 1797 images of 8 x 8 by 43 writers), split three ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

HELD_OUT = 600
VALIDATION = 197


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 8, 8) in [0, 1] with their labels (n,)."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """In order, for validation and calibration."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


@dataclass(frozen=True)
class Digits:
    """``held_out`` is looked at for the table only: no training, no choice of epoch, no calibration sees it."""

    train: Split
    validation: Split
    held_out: Split


def load_digits(seed: int) -> Digits:
    """A split by seed, each digit equally frequent in all parts."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_digits()
    rows = range(len(bunch.target))
    rest, held_out = train_test_split(rows, test_size=HELD_OUT, stratify=bunch.target, random_state=seed)
    train, validation = train_test_split(rest, test_size=VALIDATION, stratify=bunch.target[rest], random_state=seed)
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    return Digits(*(Split(images[part], labels[part]) for part in (train, validation, held_out)))


class Shifted:
    """Shuffled training batches whose images are moved by up to one pixel in each direction. Every pass draws anew from ``generator``."""

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        self.split, self.batch_size = split, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.split.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.split.labels), generator=self.generator)
        for chosen in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self._shift(self.split.images[chosen]), self.split.labels[chosen]

    def _shift(self, images: Tensor) -> Tensor:
        n, size = len(images), images.shape[-1]
        offsets = torch.randint(3, (n, 2), generator=self.generator)
        row, column = (offsets[:, axis, None] + torch.arange(size) for axis in (0, 1))
        return pad(images, (1, 1, 1, 1))[torch.arange(n)[:, None, None], 0, row[:, :, None], column[:, None, :]].unsqueeze(1)
