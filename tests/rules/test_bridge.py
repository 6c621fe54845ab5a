import math

import pytest
import torch
from rule_tiles import generator, random_tile, row

from torchlamp.arithmetic import Accumulator
from torchlamp.rules import Bridge, BridgeResidual, Rule, Running, RunningResidual
from torchlamp.simulation.ahead import bridge_error
from torchlamp.simulation.attention import attention


def estimate(query, keys, scaling=1.0, bits=4):
    """The bridge estimate of float32 scores (heads, rows, keys)."""
    return bridge_error(query, keys, query @ keys * scaling, scaling, 2.0 ** -(bits + 1))


def sums_of_squares(query, key):
    """Y and sum_k a_k^2 of the exact partial sums a_k of products, by a loop; (rows, keys)."""
    partial = torch.zeros(len(query), len(key), dtype=torch.float64)
    squares = torch.zeros_like(partial)
    for q, k in zip(query.double().T, key.double().T, strict=True):
        partial += q[:, None] * k
        squares += partial.square()
    return partial, squares


@pytest.mark.parametrize("size", [64, 256])
def test_the_estimate_is_the_expected_sum_of_squares_of_random_products(size):
    """Monte Carlo: the mean of sum_k a_k^2 over Gaussian walks, for small, middle and large sums alike."""
    query = torch.randn(100, size, generator=generator(size))
    key = torch.randn(400, size, generator=generator(size + 1))
    total, squares = sums_of_squares(query, key)
    unit = 2.0**-5
    guess = estimate(query[None], key.T[None])[0].double() / (unit / 2)
    for low, high in ((0.0, 0.3), (0.3, 0.9), (0.9, 1.6), (1.6, 3.0)):
        share = total.abs() / math.sqrt(size)
        inside = (share >= low) & (share < high)
        assert float(guess[inside].square().mean() / squares[inside].mean()) == pytest.approx(1, abs=0.06)


def test_it_knows_what_the_finished_sum_says():
    """For a given |q| and |k| the estimate follows the sums: far better correlated with them than a constant."""
    query = torch.randn(50, 128, generator=generator(1))
    key = torch.randn(300, 128, generator=generator(2))
    _, squares = sums_of_squares(query, key)
    guess = estimate(query[None], key.T[None])[0].double()
    both = torch.stack([squares.sqrt().flatten(), guess.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.7


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
def test_the_formula_with_grouped_keys(heads, key_heads):
    query = torch.randn(heads, 5, 16, generator=generator(3))
    keys = torch.randn(key_heads, 16, 7, generator=generator(4))
    scaling, unit = -0.3, 2.0**-6
    each = keys.repeat_interleave(heads // key_heads, dim=0)
    scores = (query @ each) * scaling
    got = bridge_error(query, keys, scores, scaling, unit)
    for h in range(heads):
        for i in range(5):
            for j in range(7):
                y, q, k = scores[h, i, j] / scaling, query[h, i], each[h, :, j]
                inner = 16 * y**2 / 3 + q.norm() ** 2 * k.norm() ** 2 / 6
                assert float(got[h, i, j]) == pytest.approx(float(unit / 2 * inner.sqrt() * 0.3), rel=1e-5)


def attended(rule, **others):
    query = torch.randn(1, 4, 40, 64, generator=generator(5)) * 2
    key, value = (torch.randn(1, 2, 40, 64, generator=generator(s)) for s in (6, 7))
    ps4, parsed = Accumulator.parse("ps4"), Rule.parse(rule)
    return attention(query, key, value, accumulator=ps4, rule=parsed, scaling=0.125, causal=True, **others)


def observed(rule, error):
    tiles = []
    result = attended(
        rule, observe=lambda seen: tiles.append((getattr(seen.tile, error)[0], seen.tile.visible[0]))
    )
    return result, *tiles[0]


def test_in_attention_it_is_close_to_the_running_error():
    bridged, one, visible = observed("bridge:0.02", "bridge_error")
    run, other, _ = observed("running:0.02", "error")
    ratio = (one / other)[visible]
    assert 0.9 < float(ratio.median()) < 1.1
    assert float(ratio.quantile(0.05)) > 0.5
    assert float(ratio.quantile(0.95)) < 2
    # The same entries, but for those near the threshold.
    assert 0 < int(run.selected.sum()) < int(run.eligible.sum())
    assert int((bridged.selected - run.selected).abs().sum()) < 0.2 * int(run.selected.sum())


def test_random_like_takes_as_many():
    like = attended("random-like:bridge:0.02", generator=generator())
    assert torch.equal(attended("bridge:0.02").selected, like.selected)


def test_given_the_same_error_it_is_the_running_rule():
    tile = random_tile(2, 3, 5, 9, softcap=3.0)
    for threshold in (0.0, 0.005, 0.05):
        assert torch.equal(Bridge(threshold).select(tile), Running(threshold).select(tile))
        far = (BridgeResidual(threshold), RunningResidual(threshold))
        assert torch.equal(far[0].select(tile), far[1].select(tile))


def test_it_asks_for_no_by_product():
    for name in ("bridge:1", "bridge-residual:1"):
        assert not Rule.parse(name).byproducts


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_selected(bad):
    assert bool(Bridge(10).select(row([1.0, bad, 0.5]).replace(bridge_error=torch.full((1, 3), 0.1)))[0, 1])
