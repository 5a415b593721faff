"""Tiny models and real data for the distillation tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class MLP(nn.Module):
    """64 -> width -> 10, with dropout (randomness) and batch norm (buffers) so that seeds and checkpoints matter."""

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.first(x)))))


def make_mlp(width: int, seed: int = 0, dropout: float = 0.1) -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(width, dropout)


@pytest.fixture
def mlp():
    return make_mlp


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's handwritten digits: (train inputs, train labels, validation inputs, validation labels)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1300], y[:1300], x[1300:], y[1300:]


@pytest.fixture
def loaders(digits):
    """(train, validation) loaders over the first ``rows`` digits, shuffled by the global generator."""

    def make(rows: int = 256, generator: torch.Generator | None = None):
        train = DataLoader(TensorDataset(digits[0][:rows], digits[1][:rows]), batch_size=64, shuffle=True, generator=generator)
        return train, DataLoader(TensorDataset(digits[2][:rows], digits[3][:rows]), batch_size=100)

    return make


@pytest.fixture(scope="session")
def teacher(digits):
    """A trained teacher. Tests must leave it as it is; one test checks that fit does."""
    from pycompress.distillation import Distiller, KDLoss

    model = make_mlp(128, seed=7)
    train = DataLoader(TensorDataset(digits[0], digits[1]), batch_size=64, shuffle=True)
    Distiller(model, None, KDLoss(soft_weight=0.0, hard_weight=1.0)).fit(train, epochs=15, seed=0)
    return model.eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def is_same_state():
    return same_state
