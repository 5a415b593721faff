"""Masks as functions of scores: counts are exact, groups are respected, ties are decided the same way every time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycompress.pruning import nm_mask, unstructured_mask
from pycompress.pruning.patterns import NM, parse_pattern
from pycompress.pruning.ranking import lowest, lowest_across


@st.composite
def nm_cases(draw):
    m = draw(st.integers(2, 9))
    n = draw(st.integers(1, m - 1))
    shape = draw(st.sampled_from([(1, 1), (3, 4), (5, 7), (2, 16), (4, 3, 3), (3, 2, 3, 3), (2, 1, 1, 1), (4, 13)]))
    # few distinct values: ties everywhere
    flat = draw(st.lists(st.integers(0, 3), min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel()))
    return n, m, torch.tensor(flat, dtype=torch.float32).view(shape)


@settings(max_examples=150, deadline=None)
@given(nm_cases())
def test_nm_keeps_the_n_best_of_every_group(case):
    n, m, scores = case
    mask = nm_mask(scores, n, m)
    assert mask.shape == scores.shape and mask.dtype == torch.bool
    for score_row, mask_row in zip(scores.flatten(1), mask.flatten(1), strict=True):
        for score, kept in zip(score_row.split(m), mask_row.split(m), strict=True):
            assert int(kept.sum()) == min(n, score.numel())
            if not kept.all():
                assert score[kept].min() >= score[~kept].max()
    assert int((~mask).sum()) == NM(n, m).removable(scores.shape, 0.0)
    assert torch.equal(mask, nm_mask(scores.clone(), n, m))


@settings(max_examples=100, deadline=None)
@given(nm_cases(), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_gradual_nm_ends_at_exact_nm_and_never_brings_a_weight_back(case, shares):
    n, m, scores = case
    pattern = NM(n, m)
    kept = torch.ones_like(scores, dtype=torch.bool)
    total = pattern.removable(scores.shape, 0.0)
    for share in [*sorted(shares), 1.0]:
        candidates = pattern.candidates(scores, kept)
        assert not (candidates & ~kept).any()
        before = kept
        kept = kept & ~lowest(scores, candidates, round(share * total) - int((~kept).sum()))
        assert not (kept & ~before).any()
        scores = scores.roll(1, 0)  # the next event sees other scores
    assert int((~kept).sum()) == total
    for row in kept.flatten(1):
        for group in row.split(m):
            assert int(group.sum()) == min(n, group.numel())


def test_groups_run_over_channels_and_kernel_positions():
    scores = torch.arange(2 * 2 * 2 * 2, dtype=torch.float32).view(2, 2, 2, 2)
    flat = nm_mask(scores, 2, 4).reshape(2, 8)
    assert flat.tolist() == [[False, False, True, True] * 2] * 2


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7])
def test_tail_group_counts_as_padded_with_zeros(width):
    tail = width % 4
    assert int((~nm_mask(torch.rand(3, width), 2, 4)).sum()) == 3 * (width // 4 * 2 + max(0, tail - 2))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.floats(0, 0.999))
def test_unstructured_count_is_exact_in_spite_of_ties(values, ratio):
    scores = torch.tensor(values, dtype=torch.float32)
    mask = unstructured_mask(scores, ratio)
    assert int((~mask).sum()) == round(ratio * len(values))
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


def test_ties_go_to_the_lower_index_and_the_earlier_layer():
    ones = torch.ones(4)
    everything = torch.ones(4, dtype=torch.bool)
    assert lowest(ones, everything, 2).tolist() == [True, True, False, False]
    first, second = lowest_across([ones.view(2, 2), ones], [everything.view(2, 2), everything], 5)
    assert first.tolist() == [[True, True], [True, True]] and second.tolist() == [True, False, False, False]


def test_strided_scores():
    scores = torch.rand(8, 6).T[:, ::2]
    assert torch.equal(nm_mask(scores, 1, 4), nm_mask(scores.contiguous(), 1, 4))


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4"])
def test_impossible_nm(pattern):
    with pytest.raises(ValueError, match=rf"pattern 'N:M' must have 0 < N < M, got '{pattern}'"):
        parse_pattern("Pruner", pattern)


def test_unknown_pattern_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown pruning pattern 'block', expected one of N:M, channel, unstructured"):
        parse_pattern("Pruner", "block")
    with pytest.raises(ValueError, match="needs numbers, such as '2:4'"):
        parse_pattern("Pruner", "N:M")
    with pytest.raises(TypeError, match=r"pattern must be a name .*, got tuple"):
        parse_pattern("Pruner", (2, 4))
