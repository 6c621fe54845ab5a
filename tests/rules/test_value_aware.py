import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_tiles import random_tile

from torchlamp.rules import BridgeResidual, OracleResidual, Rule, RunningOutput, RunningResidual, Tile
from torchlamp.rules.value_aware import response

values = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def output(logits):
    return logits.softmax(-1) @ values


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=9, max_size=9), st.integers(0, 8), st.floats(0, 20))
def test_the_response_is_the_exact_mean_change_of_the_output(scores, key, error):
    """Moving one score by +-r moves the output by exactly response * (v_j - o), on the mean of both signs."""
    y = torch.tensor([scores], dtype=torch.float64)
    errors = torch.zeros_like(y)
    errors[0, key] = error
    o = output(y[0])
    away = float((values[key] - o).norm())
    moved = [float((output(y[0] + sign * errors[0]) - o).norm()) for sign in (1, -1)]
    got = float(response(Tile.from_scores(y), errors)[0, key]) * away
    assert got == pytest.approx(sum(moved) / 2, rel=1e-9, abs=1e-12)


def test_small_errors_give_the_derivative():
    tile = random_tile(2, 2, 5, 9, dtype=torch.float64, softcap=3.0)
    small = tile.error * 1e-6
    expected = tile.probabilities * tile.slope * small
    torch.testing.assert_close(response(tile, small), expected, rtol=1e-5, atol=0)


def test_running_output_is_its_formula():
    tile = random_tile(2, 3, 5, 9, seed=3, softcap=2.5)
    weight = tile.probabilities * tile.slope * tile.distance * tile.error
    assert torch.equal(RunningOutput(0.004).select(tile), (weight > 0.004) & tile.visible)


def test_residual_rules_differ_in_the_error_they_are_given():
    tile = random_tile(2, 3, 5, 9, seed=4)
    assert torch.equal(RunningResidual(0.01).select(tile), BridgeResidual(0.01).select(tile))


def test_the_oracle_weighs_the_signed_error():
    tile = random_tile(1, 1, 4, 9, seed=5, dtype=torch.float64)
    weight = OracleResidual(0.0).weight(tile)
    for row, key in ((3, 0), (2, 4), (1, 2)):
        y = tile.scores[0, 0, row][tile.visible[0, 0, row]]
        z = y.softmax(-1)
        better = y.clone()
        better[key] = tile.exact[0, 0, row, key]
        moved = float((better.softmax(-1)[key] - z[key]).abs() / (1 - z[key]))
        assert float(weight[0, 0, row, key]) == pytest.approx(moved * float(tile.distance[0, 0, row, key]))


@pytest.mark.parametrize("spelling", ["running-residual:0.1", "oracle-residual:0.1"])
def test_huge_errors_are_no_nan(spelling):
    tile = random_tile(1, 1, 4, 9, seed=6)
    wild = Tile.from_scores(tile.scores, tile.visible, error=torch.tensor(1e30))
    wild = wild.replace(exact=tile.scores + 1e30, distance=tile.distance)
    weight = Rule.parse(spelling).weight(wild)
    assert not weight[tile.visible].isnan().any()
    assert math.isfinite(float(weight[tile.visible].max()))


@pytest.mark.parametrize("rule", [RunningResidual(1e-6), OracleResidual(1e-6)])
def test_a_row_with_one_key_needs_nothing_however_large_its_error(rule):
    tile = Tile.from_scores(torch.tensor([[3.0]]), error=torch.tensor([[40.0]]))
    tile = tile.replace(exact=torch.tensor([[-40.0]]), distance=torch.zeros(1, 1))
    assert not rule.select(tile).any()
