import math
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jacobians import inf_norm, jacobian, low_sets, probabilities
from rule_tiles import from_probabilities, random_tile, row

from torchlamp.rules import Mass

scores = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


def relative_jacobian(y: torch.Tensor, sink: float | None = None) -> torch.Tensor:
    """diag(z)^-1 J: relative changes of the probabilities (and the sink's) per absolute change of a score."""
    return jacobian(y, sink) / probabilities(y, sink)[:, None]


@settings(max_examples=100, deadline=None)
@given(scores, st.floats(0.001, 1.0), st.none() | st.floats(-4, 4))
def test_it_is_the_smallest_feasible_prefix(y, mass, sink):
    """Over all prefixes H of the descending order: ||diag(z)^-1 J diag(g)||_inf <= 2 - P, g = 1 outside H."""
    values = torch.tensor(y, dtype=torch.float64)
    K = relative_jacobian(values, sink)
    order = probabilities(values, sink)[: len(y)].argsort(descending=True, stable=True)
    norms = []
    for size in range(len(y) + 1):
        low = torch.ones(len(y), dtype=torch.float64)
        low[order[:size]] = 0.0
        norms.append(inf_norm(K * low))
    assume(all(abs(norm - (2 - mass)) > 1e-9 for norm in norms))  # no prefix feasible by rounding alone
    size = next(size for size, norm in enumerate(norms) if norm <= 2 - mass)
    expected = torch.zeros(len(y), dtype=torch.bool)
    expected[order[:size]] = True
    assert torch.equal(Mass(mass).select(row(y, sink=sink))[0], expected)


@pytest.mark.parametrize("sink", [None, 0.7])
@pytest.mark.parametrize("keys", [1, 2, 3, 5])
def test_the_norm_in_closed_form(keys, sink):
    """||diag(z)^-1 J diag(g)||_inf = sum_S z + max(0, max_S (1 - 2 z)), the 0 only if a row is outside S."""
    for seed in range(5):
        y = torch.randn(keys, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
        z = probabilities(y, sink)[:keys]
        for g in low_sets(keys):
            inside = g.bool()
            terms = (1 - 2 * z[inside]).tolist()
            if sink is not None or not inside.all():
                terms.append(0.0)
            expected = float(z[inside].sum()) + max(terms)
            assert inf_norm(relative_jacobian(y, sink) * g) == pytest.approx(expected, abs=1e-12)
            if int(inside.sum()) >= 2:
                assert expected == pytest.approx(float(z[inside].sum() + 1 - 2 * z[inside].min()), abs=1e-12)


def test_the_best_prefix_is_not_always_the_best_set():
    """With tau = 1.064 the prefix takes 5, but 4 are enough if the smallest is among them."""
    z = [0.004, 0.080, 0.107, 0.113, 0.330, 0.366]
    tau = 1.064
    tile = from_probabilities(z)
    prefix = Mass(2 - tau).select(tile)[0]
    assert prefix.tolist() == [False, True, True, True, True, True]
    K = torch.eye(6, dtype=torch.float64) - tile.probabilities  # I - 1 z^T

    def feasible(high: tuple[int, ...]) -> bool:
        low = torch.ones(6, dtype=torch.float64)
        low[list(high)] = 0.0
        return inf_norm(K * low) <= tau

    assert feasible((1, 2, 3, 4, 5))
    best = next(size for size in range(7) if any(feasible(high) for high in combinations(range(6), size)))
    assert best == 4
    assert feasible((0, 3, 4, 5))
    assert all(0 in high for high in combinations(range(6), 4) if feasible(high))


def test_the_rule_as_it_is_stated():
    """Mark the k-th largest iff (sum of the larger ones) + 2 z_min < P, by a loop in float64."""
    tile = random_tile(2, 3, 9, 12, spread=1.0, dtype=torch.float64)
    for mass in (0.05, 0.5, 0.9, 0.99):
        expected = torch.zeros_like(tile.visible)
        for at in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(9)).tolist():
            z, seen = tile.probabilities[tuple(at)], tile.visible[tuple(at)]
            larger = 0.0
            for j in sorted(seen.nonzero().flatten().tolist(), key=lambda j: -float(z[j])):
                expected[(*at, j)] = larger + 2 * float(z[seen].min()) < mass
                larger += float(z[j])
        assert torch.equal(Mass(mass).select(tile), expected)


def test_masked_keys_have_no_say_in_the_smallest():
    visible = torch.tensor([[True, True, True, True, False]])
    tile = random_tile(1, 1, 1, 5, visible=visible, spread=0.0)
    assert Mass(0.5).select(tile).tolist() == [[[[False] * 5]]]  # 2 z_min is 0.5 already
    assert Mass(0.75).select(tile).tolist() == [[[[True, False, False, False, False]]]]


def test_equal_probabilities_go_in_the_order_of_their_keys():
    tile = from_probabilities([0.125] * 8)
    assert Mass(0.75).select(tile).tolist() == [[True] * 4 + [False] * 4]
    assert Mass(1).select(tile).tolist() == [[True] * 6 + [False] * 2]
    many = from_probabilities([2.0**-12] * 4096)  # an unstable sort of so many does move equal entries
    assert torch.equal(Mass(0.5).select(many)[0], torch.arange(4096) < 2046)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(dtype):
    tile = random_tile(2, 3, 40, 40, spread=6.0, dtype=dtype)
    assert not Mass(0).select(tile).any()
    left = tile.visible & ~Mass(1).select(tile)
    smallest = tile.probabilities.masked_fill(~tile.visible, 1.0).amin(dim=-1)
    # What stays low holds at most twice the smallest, up to the rounding of the softmax.
    assert ((tile.probabilities * left).sum(dim=-1) <= 2 * smallest + 2e-7).all()
    assert (left.sum(dim=-1) >= 1).all()


def test_a_probability_that_underflowed_stays_low():
    tile = row([0.0, -1e4, -1e4, -1.0])
    assert Mass(1).select(tile).tolist() == [[True, False, False, True]]


def test_a_row_with_one_key_needs_nothing():
    assert not Mass(1).select(row([3.0])).any()


def test_a_common_offset_changes_nothing():
    y = [0.5, -1.0, 2.0, 0.25, 1.5]
    for mass in (0.2, 0.6, 0.95):
        assert torch.equal(Mass(mass).select(row(y)), Mass(mass).select(row([v - 16 for v in y])))


def test_the_mass_of_a_sink_is_exact_already():
    y = [1.0, 0.0, 0.5]
    assert int(Mass(0.9).select(row(y, sink=-30.0)).sum()) == 2
    assert int(Mass(0.9).select(row(y, sink=4.0)).sum()) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_unknown_probabilities_is_recomputed(bad):
    assert Mass(0.1).select(row([1.0, bad, 0.5])).all()


def test_an_entry_overflowing_downwards_is_recomputed():
    assert Mass(0).select(row([1.0, -math.inf, 0.5])).tolist() == [[False, True, False]]


def test_a_device_without_float64_lets_the_cpu_do_it(monkeypatch):
    tile = random_tile(2, 3, 5, 9)
    expected = Mass(0.9).select(tile)
    monkeypatch.setattr("torchlamp.rules.mass.WITHOUT_FLOAT64", {"cpu"})
    assert torch.equal(Mass(0.9).select(tile), expected)


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_mass_selects_a_superset(a, b):
    tile = random_tile(1, 2, 5, 9)
    less, more = Mass(min(a, b)).select(tile), Mass(max(a, b)).select(tile)
    assert not (less & ~more).any()
