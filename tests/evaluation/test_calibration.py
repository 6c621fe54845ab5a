import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from torchlamp.evaluation.calibration import find_threshold


def power(exponent: float, scale: float):
    """A rate that falls with T like a power, and is 1 at most."""
    return lambda t: min(1.0, scale * t**-exponent) if t > 0 else 1.0


@given(
    exponent=st.floats(0.3, 4),
    scale=st.floats(1e-5, 1e5),
    target=st.floats(1e-4, 0.9),
    start=st.sampled_from([1e-3, 0.1, 4]),
)
def test_falling_rates(exponent, scale, target, start):
    assume((scale / target) ** (1 / exponent) < 1e29)  # larger thresholds aren't looked for
    asked = []

    def rate(t: float) -> float:
        asked.append(t)
        return power(exponent, scale)(t)

    found = find_threshold(rate, target, start=start)
    assert abs(found.rate - target) <= 0.02 * target
    assert rate(found.threshold) == found.rate
    assert found.tries == len(set(asked)) == len(asked) - 1
    assert float(f"{found.threshold:.6g}") == found.threshold


@given(target=st.floats(1e-3, 0.9), exponent=st.floats(0.3, 3))
def test_rising_rates(target, exponent):
    found = find_threshold(lambda t: t**exponent, target, allowed=(0, 1), start=0.5)
    assert abs(found.rate - target) <= 0.02 * target


def test_a_usual_curve_takes_few_forward_passes():
    """A logistic curve in log T, as rates of real rules look."""
    for target in (0.001, 0.005, 0.02, 0.1, 0.3):
        found = find_threshold(lambda t: 1 / (1 + (t / 0.003) ** 1.2), target, start=0.1)
        assert abs(found.rate - target) <= 0.02 * target
        assert found.tries <= 10


@pytest.mark.parametrize(
    ("rate", "allowed", "said"),
    [
        (lambda t: 0.3, (0, math.inf), "in [0, inf] give rates from 0.3 to 0.3"),
        (lambda t: 0.2 * max(0, 1 - t), (0, 1), "in [0, 1] give rates from 0 to 0.2"),
        (lambda t: 0.6 + 0.4 * (t < 1), (0, math.inf), "give rates from 0.6 to 1"),
        (lambda t: t * 0.1, (0, 1), "give rates from 0 to 0.1"),
    ],
)
def test_a_rate_out_of_reach_says_what_is_in_reach(rate, allowed, said):
    with pytest.raises(ValueError, match=r"target rate 0\.5 can't be reached") as error:
        find_threshold(rate, 0.5, allowed)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_rate_that_is_jumped_over():
    with pytest.raises(ValueError, match=r"around threshold .* the rate jumps from 0\.9 to 0\.1"):
        find_threshold(lambda t: 0.9 if t < 0.037 else 0.1, 0.5)
    assert find_threshold(lambda t: 0.505 if t < 0.037 else 0.1, 0.5).rate == 0.505
