import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobians import jacobian, low_sets, one_norm
from rule_tiles import from_probabilities, random_tile, row

from torchlamp.rules import Strict

scores = st.lists(st.floats(-8, 8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    scores,
    st.floats(0.001, 4.0),
    st.none() | st.floats(-4, 4),
    st.none() | st.floats(1.0, 10.0),
)
def test_it_is_the_optimum_of_its_problem(y, threshold, sink, softcap):
    """max 1^T g subject to ||J diag(y) diag(g)||_{1->1} <= T, over all g in {0, 1}^n."""
    values = torch.tensor(y, dtype=torch.float64)
    J = jacobian(values, sink, softcap)
    norms = [(one_norm(J * values * g), g) for g in low_sets(len(y))]
    selected = Strict(threshold).select(row(y, sink=sink, softcap=softcap))[0]
    own = one_norm(J * values * (~selected).double())
    assert own <= threshold * (1 + 1e-9)
    # The margin leaves out sets that are feasible or not by rounding alone.
    best = max(int(g.sum()) for norm, g in norms if norm <= threshold * (1 - 1e-9))
    assert int((~selected).sum()) >= best


def test_the_weight_is_the_column_norm():
    y = torch.tensor([1.5, -2.0, 0.3, 4.0], dtype=torch.float64)
    columns = (jacobian(y) * y).abs().sum(dim=0)
    for j, norm in enumerate(columns.tolist()):
        assert not Strict(norm * (1 + 1e-12)).select(row(y.tolist()))[0, j]
        assert Strict(norm * (1 - 1e-12)).select(row(y.tolist()))[0, j]


def test_flat_and_saturated_rows_may_get_nothing():
    assert not Strict(0.1).select(row([1.0] * 100)).any()
    assert not Strict(0.1).select(row([30.0, 0.0, 0.0])).any()
    assert not Strict(0.0).select(row([3.0])).any()  # one key: its probability is 1 whatever its score


def test_at_most_half_the_score():
    """2 z (1 - z) <= 1/2, so that T = 50 fires for |y| > 100 only."""
    assert not Strict(50).select(row([100.0, 100.0])).any()
    assert Strict(50).select(row([100.1, 100.1])).all()


def test_it_is_not_shift_invariant():
    tile, shifted = row([0.0, 0.0]), row([6.0, 6.0])
    assert torch.equal(tile.probabilities, shifted.probabilities)
    assert not Strict(0.1).select(tile).any()
    assert Strict(0.1).select(shifted).all()


def test_equal_is_not_exceeding():
    tile = from_probabilities([0.5, 0.5])
    edge = 0.5 * math.log(2)
    assert not Strict(edge).select(tile).any()
    assert Strict(math.nextafter(edge, 0)).select(tile).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_selected(bad, softcap):
    assert Strict(1e30).select(row([1.0, bad, 0.5], softcap=softcap))[0, 1]


def test_one_entry_overflowing_downwards_leaves_the_others_alone():
    assert Strict(1e30).select(row([1.0, -math.inf, 0.5])).tolist() == [[False, True, False]]


@given(st.floats(0, 10), st.floats(0, 10))
def test_a_larger_threshold_selects_a_subset(a, b):
    tile = random_tile(1, 2, 5, 9, spread=4.0)
    less, more = Strict(max(a, b)).select(tile), Strict(min(a, b)).select(tile)
    assert not (less & ~more).any()
