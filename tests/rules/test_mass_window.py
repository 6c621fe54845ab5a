import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jacobians import inf_norm, jacobian, low_sets, probabilities
from rule_tiles import from_probabilities, random_tile, row

from torchlamp.rules import Mass, MassWindow

scores = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(scores, st.floats(0.0, 1.0), st.none() | st.floats(-4, 4))
def test_it_is_the_optimum_of_its_problem(y, mass, sink):
    """Over all subsets: max 1^T g subject to ||diag(z)^-1 J diag(g)||_inf <= 2 - P."""
    values = torch.tensor(y, dtype=torch.float64)
    K = jacobian(values, sink) / probabilities(values, sink)[:, None]
    norms = [(inf_norm(K * g), int(g.sum())) for g in low_sets(len(y))]
    assume(all(abs(norm - (2 - mass)) > 1e-9 for norm, _ in norms))  # no set feasible by rounding alone
    low = ~MassWindow(mass).select(row(y, sink=sink))[0]
    assert inf_norm(K * low) <= 2 - mass
    assert int(low.sum()) == max(size for norm, size in norms if norm <= 2 - mass)


def test_the_documented_example():
    """With tau = 1.064 the prefix rule recomputes 5, the best set 4: the three largest and the smallest."""
    tile = from_probabilities([0.004, 0.080, 0.107, 0.113, 0.330, 0.366])
    assert MassWindow(2 - 1.064).select(tile).tolist() == [[True, False, False, True, True, True]]
    assert Mass(2 - 1.064).select(tile).tolist() == [[False, True, True, True, True, True]]


def test_it_never_takes_more_than_the_best_prefix():
    tile = random_tile(2, 3, 30, 30, spread=1.0, dtype=torch.float64)
    fewer = 0
    for mass in (0.05, 0.5, 0.9, 0.99, 1.0):
        window, prefix = (rule(mass).select(tile).sum(dim=-1) for rule in (MassWindow, Mass))
        assert (window <= prefix).all()
        fewer += int((window < prefix).sum())
    assert fewer > 0


def test_what_stays_low_is_a_window_of_the_ascending_order():
    tile = random_tile(1, 2, 20, 25, spread=0.7, dtype=torch.float64)
    low = tile.visible & ~MassWindow(0.97).select(tile)
    for z, seen, stays in zip(
        *(t.flatten(0, -2) for t in (tile.probabilities, tile.visible, low)), strict=True
    ):
        ranks = stays[seen][z[seen].argsort()].nonzero().flatten()
        assert len(ranks) == int(ranks[-1] - ranks[0]) + 1


def test_of_equal_windows_the_smallest_entries_stay_low():
    """Any two of these fit, P = 0.7 asks for sum_S z <= 0.3 + 2 min_S z; three never do."""
    tile = from_probabilities([0.40, 0.35, 0.25])
    assert MassWindow(0.7).select(tile).tolist() == [[True, False, False]]
    equal = from_probabilities([0.125] * 8)  # four of them fit
    assert MassWindow(0.75).select(equal).tolist() == [[False] * 4 + [True] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.1, 6.0])
def test_no_mass_asks_for_nothing(dtype, spread):
    """Float32 probabilities add up to a little more than 1 in many rows; that is no reason to recompute."""
    tile = random_tile(1, 2, 300, 300, spread=spread, dtype=dtype)
    if dtype == torch.float32:
        assert (tile.probabilities.double().sum(dim=-1) > 1 + 1e-9).any()
    assert not MassWindow(0).select(tile).any()


def test_a_row_with_one_key_needs_nothing():
    assert not MassWindow(1).select(row([3.0])).any()


def test_masked_keys_have_no_say():
    visible = torch.tensor([[True, True, True, True, False]])
    tile = random_tile(1, 1, 1, 5, visible=visible, spread=0.0)
    assert MassWindow(0.5).select(tile).tolist() == [[[[False] * 5]]]
    assert MassWindow(0.75).select(tile).tolist() == [[[[False, False, False, True, False]]]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_score_that_is_not_finite_is_recomputed(bad):
    assert MassWindow(0).select(row([1.0, bad, 0.5])).all()


def test_a_device_without_float64_lets_the_cpu_do_it(monkeypatch):
    tile = random_tile(2, 3, 5, 9)
    expected = MassWindow(0.9).select(tile)
    monkeypatch.setattr("torchlamp.rules.mass_window.WITHOUT_FLOAT64", {"cpu"})
    assert torch.equal(MassWindow(0.9).select(tile), expected)
