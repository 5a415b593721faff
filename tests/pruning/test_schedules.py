"""Contract of every schedule, and the numbers of the published ones."""

import itertools
import math

import pytest
import torch
from support.prunable import mlp

from pycompress.pruning import SCHEDULES, Pruner

POINTS = [i / 97 for i in range(98)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_starts_at_nothing_and_ends_at_all(name):
    assert SCHEDULES[name](0.0) == 0
    assert SCHEDULES[name](1.0) == 1
    assert SCHEDULES[name](1 / 97) > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_never_falls(name):
    shares = [SCHEDULES[name](point) for point in POINTS]
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert all(0 <= share <= 1 for share in shares)


def test_values():
    assert SCHEDULES["linear"](0.25) == 0.25
    assert SCHEDULES["cubic"](0.5) == 1 - 0.5**3
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)
    assert SCHEDULES["one_shot"](0.01) == 1
    # constant share of what is left to go, up to the stretch to exactly 1
    rest = [1 - SCHEDULES["exponential"](p) * (1 - math.exp(-5)) for p in (0.2, 0.4, 0.6)]
    assert rest[1] / rest[0] == pytest.approx(rest[2] / rest[1]) == pytest.approx(math.exp(-1))
    # steepest where the logistic curve has its middle
    slopes = [SCHEDULES["one_cycle"](p + 0.01) - SCHEDULES["one_cycle"](p) for p in POINTS[:-2]]
    assert POINTS[slopes.index(max(slopes))] == pytest.approx(3 / 7, abs=0.02)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown pruning schedule 'agp', expected one of cosine, cubic"):
        SCHEDULES["agp"]


def test_a_schedule_that_changes_its_mind_is_noticed_before_it_prunes():
    answers = iter([0.5, 1.0, 1.5])  # two at the check, one at the first event
    model = mlp(6, 8, 3)
    pruner = Pruner(model, torch.randn(2, 6), pattern="channel", ratio=0.5, steps=2, schedule=lambda progress: next(answers))
    with pytest.raises(ValueError, match=r"Pruner.step: schedule must stay in \[0, 1\], the share of the ratio, got 1.5 at progress 0.5"):
        pruner.step()
    assert model[0].out_features == 8


def test_rounding_at_the_ends_is_no_error():
    pruner = Pruner(mlp(6, 8, 3), torch.randn(2, 6), ratio=0.5, steps=2, schedule=lambda progress: progress * (1 + 1e-12) - 1e-12)
    assert [pruner.step().done for _ in range(2)] == [False, True]
    assert pruner.summary().sparsity == 0.5
