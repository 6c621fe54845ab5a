import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_tiles import causal, random_tile, row

from torchlamp.rules import REFERENCE_LENGTH, Relaxed, RelaxedLength, Strict, Tile

shares = st.floats(0, 1)


def unshifted(tile: Tile, threshold: float | torch.Tensor) -> torch.Tensor:
    """The formula as published: |y| e^y > T max_i |y_i| e^(y_i)."""
    weight = (tile.scores.abs() * tile.scores.exp()).masked_fill(~tile.visible, 0.0)
    return weight > threshold * weight.amax(dim=-1, keepdim=True)


@given(st.integers(0, 10**6), st.floats(0.01, 100), shares)
def test_it_is_the_published_formula_where_that_does_not_overflow(seed, spread, threshold):
    tile = random_tile(2, 2, 4, 9, seed=seed, spread=spread, dtype=torch.float64)
    selected, expected = Relaxed(threshold).select(tile), unshifted(tile, threshold)
    # The two round differently: the one is checked against the other with thresholds just beside.
    assert not (selected & ~unshifted(tile, threshold * (1 - 1e-9))).any()
    assert not (expected & ~Relaxed(threshold * (1 - 1e-9)).select(tile)).any()


@pytest.mark.parametrize("shift", [1e4, 1e3, 0.0, -1e3, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_scores_neither_overflow_nor_vanish(shift, dtype):
    """Against the same comparison in logarithms, where nothing can overflow."""
    offsets = torch.tensor([[0.0, -0.25, -1.0, -3.0, -8.0, -50.0, -5000.0]], dtype=dtype)
    tile = Tile.from_scores(offsets * 1.0 + shift)
    y = tile.scores.double()
    logarithm = y.abs().log() + y
    for threshold in (0.9, 0.3, 0.03, 9e-5):
        expected = logarithm > math.log(threshold) + logarithm.amax(dim=-1, keepdim=True)
        assert torch.equal(Relaxed(threshold).select(tile), expected)
        assert 1 <= int(expected.sum()) < 7


def test_a_bound_on_the_strict_weight():
    """2 z (1 - z) |y| <= 2 z |y|, which is the relaxed weight times a factor common to the row."""
    tile = random_tile(1, 2, 6, 9, dtype=torch.float64)
    z, y = tile.probabilities, tile.scores.abs()
    bound = 2 * (z * y).amax(dim=-1, keepdim=True)
    for threshold in (0.5, 0.03):
        left = ~Relaxed(threshold).select(tile) & tile.visible
        assert ((2 * z * (1 - z) * y)[left] <= (threshold * bound).expand_as(z)[left]).all()


def test_every_row_recomputes_at_least_one_entry():
    tile = random_tile(2, 3, 16, 16)
    assert Relaxed(0.999).select(tile).any(dim=-1).all()
    assert not Strict(0.1).select(tile).any(dim=-1).all()


def test_ends():
    tile = random_tile(2, 3, 6, 9)
    assert not Relaxed(1).select(tile).any()
    assert torch.equal(Relaxed(0).select(tile), tile.visible)
    assert not Relaxed(0).select(row([0.0, 0.0])).any()


def test_the_score_is_no_shift_invariant_weight():
    """The largest probability is passed over when its logit is near 0."""
    tile = row([0.01] + [-1.0] * 5)
    assert int(tile.probabilities.argmax()) == 0
    assert Relaxed(0.5).select(tile).tolist() == [[False] + [True] * 5]


def test_the_slope_of_a_softcap_counts():
    tile = row([20.0, 19.0, 1.0], softcap=5.0)
    weight = tile.scores.abs() * tile.slope * tile.logits.exp()
    for threshold in (0.9, 0.5, 0.1):
        assert torch.equal(Relaxed(threshold).select(tile), weight > threshold * weight.max())


@pytest.mark.parametrize("kind", [Relaxed, RelaxedLength])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_whose_largest_weight_is_unknown_is_recomputed(kind, bad):
    assert kind(1).select(row([1.0, bad, 0.5])).all()


@pytest.mark.parametrize("kind", [Relaxed, RelaxedLength])
@given(a=shares, b=shares)
def test_a_larger_threshold_selects_a_subset(kind, a, b):
    tile = random_tile(1, 2, 5, 9, spread=4.0)
    less, more = kind(max(a, b)).select(tile), kind(min(a, b)).select(tile)
    assert not (less & ~more).any()


@pytest.mark.parametrize("threshold", [0.9, 0.3, 0.03, 9e-5])
def test_length_sets_the_threshold_row_by_row(threshold):
    keys = 2100
    tile = random_tile(1, 1, keys, keys, spread=3.0)
    selected = RelaxedLength(threshold).select(tile)
    for i in (0, 1, 7, 8, 63, 92, 93, 500, 1022, 1023, 1024, 2099):
        share = min(1.0, threshold * math.sqrt(1024 / (i + 1)))
        one = Tile.from_scores(tile.scores[..., i : i + 1, :], tile.visible[..., i : i + 1, :])
        assert torch.equal(Relaxed(share).select(one), selected[..., i : i + 1, :])
    assert torch.equal(selected[..., 1023, :], Relaxed(threshold).select(tile)[..., 1023, :])


def test_length_counts_visible_keys_wherever_they_are():
    visible = torch.zeros(1, 64, dtype=torch.bool)
    visible[0, 40:49] = True
    window = random_tile(1, 1, 1, 64, visible=visible)
    alone = Tile.from_scores(window.scores[..., 40:49])
    assert torch.equal(RelaxedLength(0.05).select(window)[..., 40:49], RelaxedLength(0.05).select(alone))


def test_short_rows_reach_the_clamp():
    """n <= 1024 T^2 visible keys: nothing is recomputed; that is 8 rows at T = 0.09 and none at 0.03."""
    tile = random_tile(1, 1, 64, 64, spread=3.0)
    assert RelaxedLength(0.09).select(tile).any(dim=-1)[0, 0].tolist() == [False] * 8 + [True] * 56
    assert RelaxedLength(0.03).select(tile).any(dim=-1).all()


@pytest.mark.parametrize(("threshold", "mean"), [(0.09, 0.171), (0.03, 0.0586)])
def test_mean_threshold_over_a_causal_triangle(threshold, mean):
    """By row, the mean over 1024 rows weighted with nothing; a figure of docs/method.md."""
    lengths = torch.arange(1, REFERENCE_LENGTH + 1, dtype=torch.float64)
    share = (threshold * (REFERENCE_LENGTH / lengths).sqrt()).clamp(max=1)
    assert float(share.mean()) == pytest.approx(mean, rel=5e-3)


def test_a_device_without_float64_lets_the_cpu_do_it(monkeypatch):
    tile = random_tile(2, 3, 5, 9)
    expected = RelaxedLength(0.03).select(tile)
    monkeypatch.setattr("torchlamp.rules.relaxed.WITHOUT_FLOAT64", {"cpu"})
    assert torch.equal(RelaxedLength(0.03).select(tile), expected)


def test_causal_rows_have_their_own_lengths():
    assert causal(3, 5).sum(dim=-1).tolist() == [3, 4, 5]
