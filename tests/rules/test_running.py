import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobians import jacobian, low_sets, one_norm
from rule_tiles import random_tile, row

from torchlamp.rules import Running, Strict, Tile

entries = st.lists(st.tuples(st.floats(-8, 8), st.floats(0, 2)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(entries, st.floats(0.001, 1.0), st.none() | st.floats(-4, 4), st.none() | st.floats(1.0, 10.0))
def test_it_is_the_optimum_of_its_problem(row_entries, threshold, sink, softcap):
    """max 1^T g subject to ||J diag(r) diag(g)||_{1->1} <= T: the strict problem with absolute errors r."""
    y, r = (list(column) for column in zip(*row_entries, strict=True))
    scaled = jacobian(torch.tensor(y, dtype=torch.float64), sink, softcap) * torch.tensor(
        r, dtype=torch.float64
    )
    selected = Running(threshold).select(row(y, error=r, sink=sink, softcap=softcap))[0]
    assert one_norm(scaled * (~selected).double()) <= threshold * (1 + 1e-9)
    norms = [(one_norm(scaled * g), int(g.sum())) for g in low_sets(len(y))]
    best = max(size for norm, size in norms if norm <= threshold * (1 - 1e-9))
    assert int((~selected).sum()) >= best


def test_with_the_error_of_the_relative_model_it_is_the_strict_rule():
    tile = random_tile(2, 2, 5, 9)
    relative = random_tile(2, 2, 5, 9).scores.abs()
    for threshold in (0.01, 0.1, 1.0):
        running = Running(threshold).select(
            Tile(tile.scores, tile.logits, tile.probabilities, tile.visible, error=relative)
        )
        assert torch.equal(running, Strict(threshold).select(tile))


def test_a_common_offset_changes_nothing():
    y, r = [0.5, -1.0, 2.0, 0.25], [0.1, 0.2, 0.05, 0.3]
    for threshold in (0.001, 0.01, 0.05):
        shifted = [value - 16 for value in y]
        selected = Running(threshold).select(row(y, error=r))
        assert torch.equal(selected, Running(threshold).select(row(shifted, error=r)))


def test_no_error_no_recomputation():
    assert not Running(0).select(row([1.0, 2.0], error=[0.0, 0.0])).any()


def test_missing_error_says_what_to_do():
    with pytest.raises(
        ValueError, match="the tile has no `error`, the expected rounding error of each score: give the tile"
    ):
        Running(0.5).select(row([1.0, 2.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_selected(bad):
    assert Running(1e30).select(row([1.0, bad, 0.5], error=[0.1, 0.1, 0.1]))[0, 1]
    assert Running(1e30).select(row([1.0, 1.0, 0.5], error=[0.1, abs(bad), 0.1])).tolist() == [
        [False, True, False]
    ]


@given(st.floats(0, 0.1), st.floats(0, 0.1))
def test_a_larger_threshold_selects_a_subset(a, b):
    tile = random_tile(1, 2, 5, 9)
    less, more = Running(max(a, b)).select(tile), Running(min(a, b)).select(tile)
    assert not (less & ~more).any()


def test_the_estimate_has_the_size_of_the_error():
    """r = (u / 2) sqrt(sum a_k^2) is the error's standard deviation within a factor 1.5, at ps4."""
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(20000, 64, generator=generator, dtype=torch.float64)
    total, squares = torch.zeros(20000, dtype=torch.float64), torch.zeros(20000, dtype=torch.float64)
    for k in range(64):
        mantissa, exponent = torch.frexp(total + products[:, k])
        total = torch.ldexp((mantissa * 32).round() / 32, exponent)  # 5 significant bits: ps4
        squares += total.square()
    error = total - products.sum(dim=-1)
    estimate = 2.0**-5 / 2 * squares.sqrt()
    ratio = float(error.square().mean().sqrt() / estimate.square().mean().sqrt())
    assert 1 / 1.5 < ratio < 1.5
