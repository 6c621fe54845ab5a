import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_tiles import from_probabilities, random_tile, row

from torchlamp.rules import TopZ


def test_it_selects_what_exceeds_the_threshold():
    tile = from_probabilities([0.5, 0.25, 0.125, 0.125])
    assert TopZ(0.25).select(tile).tolist() == [[True, False, False, False]]
    assert TopZ(0.125).select(tile).tolist() == [[True, True, False, False]]
    assert TopZ(0).select(tile).all()
    assert not TopZ(1).select(from_probabilities([1.0])).any()


def test_a_common_offset_changes_nothing():
    y = [0.5, -1.0, 2.0]
    assert torch.equal(TopZ(0.2).select(row(y)), TopZ(0.2).select(row([v - 16 for v in y])))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_selected(bad):
    assert TopZ(1).select(row([1.0, bad, 0.5]))[0, 1]


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_larger_threshold_selects_a_subset(a, b):
    tile = random_tile(1, 2, 5, 9)
    less, more = TopZ(max(a, b)).select(tile), TopZ(min(a, b)).select(tile)
    assert not (less & ~more).any()
