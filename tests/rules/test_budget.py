import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jacobians import jacobian, low_sets
from rule_tiles import causal, from_probabilities, random_tile, row

from torchlamp.rules import Budget, Rule, RunningBudget

entries = st.lists(st.tuples(st.floats(-6, 6), st.floats(0, 2)), min_size=1, max_size=6)


def most_left_low(columns, allowed):
    """Over all subsets: how many columns can stay low while their 1-norms add up to at most what is allowed."""
    costs = [(float((columns * g).abs().sum()), int(g.sum())) for g in low_sets(columns.shape[1])]
    assume(all(abs(cost - allowed) > 1e-9 for cost, _ in costs))  # no set feasible by rounding alone
    return max(size for cost, size in costs if cost <= allowed)


@settings(max_examples=80, deadline=None)
@given(entries, st.floats(0.001, 1.0), st.none() | st.floats(-4, 4), st.none() | st.floats(1.0, 10.0))
def test_budget_is_the_optimum_of_its_problem(row_entries, budget, sink, softcap):
    """max 1^T g subject to half the sum of the 1-norms of J's columns left low <= T."""
    y = [score for score, _ in row_entries]
    J = jacobian(torch.tensor(y, dtype=torch.float64), sink, softcap)
    low = ~Budget(budget).select(row(y, sink=sink, softcap=softcap))[0]
    assert int(low.sum()) == most_left_low(J, 2 * budget)
    assert float((J * low).abs().sum()) <= 2 * budget


@settings(max_examples=80, deadline=None)
@given(entries, st.floats(0.001, 1.0), st.none() | st.floats(-4, 4), st.none() | st.floats(1.0, 10.0))
def test_running_budget_is_the_optimum_of_its_problem(row_entries, budget, sink, softcap):
    """max 1^T g subject to the sum of the 1-norms of the columns of J diag(r) left low <= T."""
    y, r = (list(column) for column in zip(*row_entries, strict=True))
    J = jacobian(torch.tensor(y, dtype=torch.float64), sink, softcap) * torch.tensor(r, dtype=torch.float64)
    low = ~RunningBudget(budget).select(row(y, error=r, sink=sink, softcap=softcap))[0]
    assert int(low.sum()) == most_left_low(J, budget)
    assert float((J * low).abs().sum()) <= budget


@pytest.mark.parametrize(
    "spelling", ["budget:0.05", "budget:0.4", "running-budget:0.01", "running-budget:0.1"]
)
def test_what_stays_low_fits_and_one_more_would_not(spelling):
    rule = Rule.parse(spelling)
    tile = random_tile(2, 3, 20, 30, spread=1.0, dtype=torch.float64)
    weight = tile.gain / 2 if spelling.startswith("budget") else tile.gain * tile.error
    selected = rule.select(tile)
    low = (weight * (tile.visible & ~selected)).sum(dim=-1)
    next_one = weight.masked_fill(~selected, math.inf).amin(dim=-1)
    assert (low <= rule.value).all()
    assert (low + next_one > rule.value).all()
    cheapest = weight.masked_fill(~(tile.visible & ~selected), -math.inf).amax(dim=-1)
    assert (cheapest <= next_one).all()


def test_sums_are_formed_in_float64():
    """Small weights behind a larger sum would be lost in float32: 4096 times 2^-26 beside 2^-2."""
    tile = random_tile(1, 1, 1, 4097, visible=causal(1, 4097), spread=0.0)
    error = torch.full((1, 1, 1, 4097), 2.0**-26)
    error[..., 0] = 0.25
    gain = tile.gain.double()
    tile = tile.replace(error=error)
    total = float((gain * error.double()).sum())
    assert not RunningBudget(total * (1 + 1e-9)).select(tile).any()
    assert RunningBudget(total * (1 - 1e-9)).select(tile).nonzero().tolist() == [[0, 0, 0, 0]]


def test_equal_weights_stay_low_in_the_order_of_their_keys():
    tile = from_probabilities([0.125] * 8)  # z (1 - z) = 7 / 64 each
    assert Budget(3.5 * 7 / 64).select(tile).tolist() == [[False] * 3 + [True] * 5]
    many = from_probabilities([2.0**-12] * 4096)  # an unstable sort of so many does move equal entries
    weight = 2.0**-12 * (1 - 2.0**-12)
    assert torch.equal(Budget(1000.5 * weight).select(many)[0], torch.arange(4096) >= 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(dtype):
    tile = random_tile(2, 3, 40, 40, spread=3.0, dtype=dtype)
    assert not Budget(1).select(tile).any()
    assert not RunningBudget(1e300).select(tile).any()
    assert torch.equal(Budget(0).select(tile), tile.visible & (tile.gain > 0))


@pytest.mark.parametrize("spelling", ["budget:1", "running-budget:10"])
def test_what_is_not_finite_is_selected(spelling):
    rule, error = Rule.parse(spelling), [0.1, 0.1, 0.1]
    assert rule.select(row([1.0, -math.inf, 0.5], error=error)).tolist() == [[False, True, False]]
    for bad in (math.nan, math.inf):  # the probabilities of the whole row are unknown
        assert rule.select(row([1.0, bad, 0.5], error=error)).all()


def test_an_unknown_error_is_selected():
    for bad in (math.nan, math.inf):
        selected = RunningBudget(10).select(row([1.0, 0.2, 0.5], error=[0.1, bad, 0.1]))
        assert selected.tolist() == [[False, True, False]]


def test_a_common_offset_changes_nothing():
    y = [0.5, -1.0, 2.0, 0.25, 1.5]
    for budget in (0.05, 0.2, 0.4):
        shifted = Budget(budget).select(row([v - 16 for v in y]))
        assert torch.equal(Budget(budget).select(row(y)), shifted)


def test_missing_error_says_what_to_do():
    words = "the tile has no `error`, the expected rounding error of each score: give the tile `error`"
    with pytest.raises(ValueError, match=words):
        RunningBudget(0.5).select(row([1.0, 2.0]))


def test_a_device_without_float64_lets_the_cpu_do_it(monkeypatch):
    tile = random_tile(2, 3, 5, 9)
    expected = Budget(0.1).select(tile)
    monkeypatch.setattr("torchlamp.rules.budget.WITHOUT_FLOAT64", {"cpu"})
    assert torch.equal(Budget(0.1).select(tile), expected)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_budget_selects_a_superset(a, b):
    tile = random_tile(1, 2, 5, 9)
    more, less = Budget(min(a, b)).select(tile), Budget(max(a, b)).select(tile)
    assert not (less & ~more).any()
