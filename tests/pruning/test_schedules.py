"""Contract of every schedule, and the numbers of the published ones."""

import itertools
import math

import pytest

from pycompress.pruning import SCHEDULES

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
