import itertools
import math

import pytest
import torch
from rule_tiles import random_tile, row

from torchlamp.rules import Rule, Running, UpperRunning


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.01, 0.05])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sink", [None, 0.5])
def test_without_a_confidence_it_is_running(threshold, softcap, sink):
    sinks = None if sink is None else torch.full((2, 1, 1), sink)
    tile = random_tile(2, 2, 6, 9, softcap=softcap, sinks=sinks, dtype=torch.float64)
    assert torch.equal(UpperRunning((threshold, 0.0)).select(tile), Running(threshold).select(tile))


@pytest.mark.parametrize("sink", [None, 0.3])
@pytest.mark.parametrize("confidence", [0.5, 1.0, 3.0])
def test_the_weight_is_the_largest_that_logits_in_reach_give(confidence, sink):
    """Brute force: all combinations of ends, and for the own logit of points between."""
    y, r = [0.2, -1.0, 2.5, 0.4], [0.3, 0.1, 0.8, 0.5]
    weights = UpperRunning((0.0, confidence)).weight(row(y, error=r, sink=sink))[0]
    for j in range(len(y)):
        best = 0.0
        others = [k for k in range(len(y)) if k != j]
        for ends in itertools.product((-1, 0, 1), repeat=len(others)):
            rest = sum(math.exp(y[k] + e * confidence * r[k]) for k, e in zip(others, ends, strict=True))
            rest += 0.0 if sink is None else math.exp(sink)
            for step in range(-50, 51):
                own = math.exp(y[j] + step / 50 * confidence * r[j])
                z = own / (own + rest)
                best = max(best, 2 * z * (1 - z) * r[j])
        assert best <= float(weights[j]) * (1 + 1e-9)
        assert best >= float(weights[j]) * 0.99  # the points between are a grid


def test_a_hidden_key_is_found():
    """A wrong key has taken the probability by an error of three nats; the true ones look as if they didn't matter."""
    exact = torch.tensor([[0.0, 6.0, 5.5, -3.0]])
    low = row([9.0, 6.0, 5.5, -3.0], error=[3.0, 0.5, 0.5, 0.5])
    threshold = 0.1
    running, upper = Running(threshold).select(low)[0], UpperRunning((threshold, 2.0)).select(low)[0]
    assert running.tolist() == [True, False, False, False]
    assert upper.tolist() == [True, True, True, False]
    assert exact.argmax() == 1


def test_a_dominant_key_keeps_its_odds_in_float32():
    """1 - z is a rounding error of float32, the sum of the others isn't."""
    tile = row([30.0, 0.0, -1.0], error=[1.0, 1.0, 1.0])
    narrow = tile.replace(
        **{n: getattr(tile, n).float() for n in ("scores", "logits", "probabilities", "error")}
    )
    rule = UpperRunning((0.0, 1.0))
    torch.testing.assert_close(rule.weight(narrow).double(), rule.weight(tile), rtol=1e-5, atol=0)


def test_more_confidence_selects_more():
    tile = random_tile(2, 2, 8, 30, spread=5.0)
    counts = [int(UpperRunning((0.01, c)).select(tile).sum()) for c in (0.0, 1.0, 4.0, 16.0, 64.0)]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_a_single_key_needs_nothing():
    assert not UpperRunning((0.0, 2.0)).select(row([1.0], error=[5.0])).any()


@pytest.mark.parametrize("bad", ["0.1", "0.1,", "-1,2", "1,-2", "inf,1", "a,b", "1,2,3", ""])
def test_bad_parameters(bad):
    with pytest.raises(ValueError, match="upper-running takes two finite numbers >= 0, the threshold T"):
        Rule.parse(f"upper-running:{bad}")


def test_spelling():
    assert str(Rule.parse("upper-running: 0.10 , 1")) == "upper-running:0.1,1"
    with pytest.raises(ValueError, match="setting must be two finite numbers"):
        UpperRunning((0.1, -1.0))
