"""Rules for linear layers on tiles made by hand; their numbers come from tests/simulation."""

import pytest
import torch

from torchlamp.rules import ElementTile, Rule

ROWS, OUTPUTS = 4, 11


def tile(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    scores, gain, condition, numerator, cheap_condition, cheap_numerator = (
        torch.randn(ROWS, OUTPUTS, generator=g, dtype=dtype) for _ in range(6)
    )
    return ElementTile(
        scores=scores,
        visible=torch.rand(ROWS, OUTPUTS, generator=g) < 0.8,
        gain=gain.abs(),
        condition=condition.abs(),
        numerator=numerator.abs(),
        cheap_condition=cheap_condition.abs(),
        cheap_numerator=cheap_numerator.abs(),
        error=scores.abs() / 30,
        exact=scores + 0.01 * numerator,
        generator=g,
    )


WEIGHTS = {
    "condition": lambda t: t.condition,
    "condition-cheap": lambda t: t.cheap_condition,
    "output": lambda t: t.gain * t.numerator,
    "output-cheap": lambda t: t.gain * t.cheap_numerator,
    "strict": lambda t: t.gain * t.scores.abs(),
    "running": lambda t: t.gain * t.error,
    "oracle": lambda t: t.gain * (t.scores - t.exact).abs(),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_threshold_on_the_weight(name):
    t = tile()
    weight = WEIGHTS[name](t)
    for threshold in weight[t.visible].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist():
        chosen = Rule.parse(f"{name}:{threshold!r}").select(t)
        assert torch.equal(chosen, (weight > threshold) & t.visible)
        assert 0 < chosen.sum() < t.visible.sum()


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_no_number_is_selected_where_it_is_visible(name):
    t = tile(dtype=torch.float32)
    scores = t.scores.clone()
    scores[0, 0], scores[1, 1], scores[2, 2] = torch.nan, torch.inf, -torch.inf
    chosen = Rule.parse(f"{name}:1e30").select(t.replace(scores=scores))
    assert torch.equal(chosen, ~scores.isfinite() & t.visible)


@pytest.mark.parametrize("rule", ["running-budget:0.1", "random:0.5", "random-like:strict:0.2", "all"])
def test_other_rules_that_look_through_anything_run_on_it(rule):
    t, parsed = tile(), Rule.parse(rule)
    assert parsed.looks_through == "any"
    chosen = parsed.select(t)
    assert 0 < chosen.sum() <= t.visible.sum()
    assert not (chosen & ~t.visible).any()


def test_a_random_baseline_imitates_a_rule_with_all_its_needs():
    imitation = Rule.parse("random-like:output-cheap:0.3")
    assert imitation.looks_through == "elementwise"
    t = tile()
    assert torch.equal(imitation.select(t).sum(-1), Rule.parse("output-cheap:0.3").select(t).sum(-1))


def test_refused():
    t = tile()
    with pytest.raises(ValueError, match="the tile has no `condition`"):
        Rule.parse("condition:4").select(t.replace(condition=None))
    with pytest.raises(ValueError, match="the tile has no `numerator`"):
        Rule.parse("output:4").select(t.replace(numerator=None))
    with pytest.raises(ValueError, match=r"gain has shape \(4, 3\), scores \(4, 11\)"):
        t.replace(gain=t.gain[:, :3])
    with pytest.raises(ValueError, match="at least"):
        ElementTile(torch.ones(3), torch.ones(3, dtype=torch.bool), torch.ones(3))
    with pytest.raises(ValueError, match=r"must be torch.bool"):
        t.replace(visible=t.scores)


def test_to():
    t = tile()
    moved = t.to("cpu")
    assert moved.generator is t.generator
    assert torch.equal(moved.condition, t.condition)
