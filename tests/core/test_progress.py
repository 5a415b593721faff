"""Progress bars change nothing about what is iterated."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from pycompress.progress import track


class Counted:
    """Counts how often an iterator is asked for."""

    def __init__(self):
        self.iterators = 0

    def __len__(self):
        return 3

    def __iter__(self):
        self.iterators += 1
        return iter(range(3))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(4))


@pytest.mark.parametrize("progress", [True, False, None])
def test_one_iterator_is_taken(progress, capsys):
    items = Counted()
    assert list(track(items, "test", progress=progress)) == [0, 1, 2] and items.iterators == 1
    if progress:
        assert "/3 " in capsys.readouterr().err  # the length is known to the bar


def test_items_without_a_length():
    assert list(track((i for i in range(3)), "test", progress=False)) == [0, 1, 2]
    assert len(list(track(DataLoader(Endless(), batch_size=2), "test", progress=False))) == 2
