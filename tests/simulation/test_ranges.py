"""Narrow ranges: centred scores don't overflow where the scores themselves do."""

import pytest
import torch

from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.transforms import Transform
from torchlamp.rules import Rule
from torchlamp.simulation.attention import attention

KEYS, SIZE = 48, 64


def operands():
    """Keys with a large common part, as a bias makes it: products of about 900, differences of about 10."""
    g = torch.Generator().manual_seed(2)
    common = torch.randn(SIZE, generator=g)
    common *= 8 / common.norm()
    query = torch.randn(1, 2, KEYS, SIZE, generator=g) * 1.2 + common * 14
    key = torch.randn(1, 1, KEYS, SIZE, generator=g) * 0.15 + common
    return query, key, torch.randn(1, 1, KEYS, SIZE, generator=g)


def run(accumulator, transforms, rule="none"):
    seen = []
    query, key, value = operands()
    result = attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse(accumulator),
        rule=Rule.parse(rule),
        scaling=SIZE**-0.5,
        causal=True,
        transforms=tuple(map(Transform.parse, transforms)),
        observe=lambda at: seen.append(at.tile.scores[at.tile.visible].clone()),
    )
    return result, torch.cat(seen)


@pytest.mark.parametrize("accumulator", ["e4m3fn", "e4m3fn-sat", "e4m3", "e4m3-sat"])
def test_centred_scores_stay_in_range(accumulator):
    exact = run("fp32", ())[0].output
    top = Accumulator.parse(accumulator).format.grid.max_value * SIZE**-0.5
    _, scores = run(accumulator, ())
    outside = ~scores.isfinite() if "sat" not in accumulator else scores.abs() >= 0.99 * top
    assert outside.float().mean() > 0.9
    result, scores = run(accumulator, ("center",))
    assert bool(scores.isfinite().all())
    assert float(scores.abs().max()) < top / 2
    assert float((result.output - exact).norm() / exact.norm()) < 0.3


def test_what_overflows_has_to_be_recomputed():
    """NaN is recomputed whatever the rule says, and a saturated sum is known to err: nearly all without `center`."""
    exact = run("fp32", ())[0].output
    rates, errors = {}, {}
    for accumulator in ("e4m3fn", "e4m3fn-sat"):
        for transforms in ((), ("center",)):
            result, _ = run(accumulator, transforms, "running:0.02")
            at = (accumulator, *transforms)
            rates[at] = float(result.selected.sum() / result.eligible.sum())
            errors[at] = float((result.output - exact).norm() / exact.norm())
    assert rates["e4m3fn",] > 0.95
    assert rates["e4m3fn-sat",] > 0.95
    assert rates["e4m3fn", "center"] < 0.7
    assert errors["e4m3fn", "center"] < 0.03
    assert rates["e4m3fn", "center"] == rates["e4m3fn-sat", "center"]
    assert errors["e4m3fn", "center"] == errors["e4m3fn-sat", "center"]


def test_saturated_scores_say_nothing():
    """Without a rule every row of saturated scores is uniform over its keys: attention is lost, not only inexact."""
    result, scores = run("e4m3fn-sat", ())
    exact = run("fp32", ())[0].output
    assert float((scores == scores.max()).float().mean()) > 0.9
    assert float((result.output - exact).norm() / exact.norm()) > 3 * float(
        (run("e4m3fn-sat", ("center",))[0].output - exact).norm() / exact.norm()
    )
