"""The threshold that gives a wanted recompute rate, found by bisection in its logarithm."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

#: Thresholds beyond these are as good as 0 and infinity.
_SMALLEST, _LARGEST = 1e-30, 1e30
_DIGITS = 6


@dataclass(frozen=True)
class Found:
    """A threshold, the rate that it gave, and how many rates were asked for."""

    threshold: float
    rate: float
    tries: int


class _Search:
    """Asks for rates, and remembers them."""

    def __init__(self, rate: Callable[[float], float]) -> None:
        self._rate = rate
        self.known: dict[float, float] = {}

    def __call__(self, threshold: float) -> float:
        if threshold not in self.known:
            self.known[threshold] = self._rate(threshold)
        return self.known[threshold]


def find_threshold(
    rate: Callable[[float], float],
    target: float,
    allowed: tuple[float, float] = (0.0, math.inf),
    start: float = 0.1,
    tolerance: float = 0.02,
) -> Found:
    """Find T with ``|rate(T) - target| <= tolerance * target``.

    First T goes up or down from `start` by growing factors until the target lies between two rates; then the
    interval is divided, in log T, where the straight line through both ends in log T and log rate meets the target,
    kept within the middle 80 %, and in every third step halved. Thresholds have 6 significant digits.

    Parameters
    ----------
    rate : callable
        Recompute rate in [0, 1] at a threshold; monotone. It may fall with T (as most rules' do) or rise.
    target : float
        In (0, 1).
    allowed : tuple of float
        Smallest and largest T.
    start : float
        Where to begin.
    tolerance : float
        Relative.

    Raises
    ------
    ValueError
        No allowed T gives the target; the message says which rates can be reached.
    """
    search = _Search(rate)
    low, high = max(allowed[0], _SMALLEST), min(allowed[1], _LARGEST)
    first = min(max(_short(start), low), high)
    # In the direction in which rates fall: +1 for rules whose rate falls with T.
    falling = _direction(search, first, low, high)
    ends = _bracket(search, first, target, (low, high), falling)
    if ends is None:
        limits = sorted(search(t) for t in (allowed[0], min(allowed[1], _LARGEST)))
        raise ValueError(
            f"target rate {target:g} can't be reached: thresholds in [{allowed[0]:g}, {allowed[1]:g}] give rates from "
            f"{limits[0]:.4g} to {limits[1]:.4g} on the calibration windows"
        )
    for step in range(200):
        best = min(search.known, key=lambda t: abs(search.known[t] - target))
        if abs(search.known[best] - target) <= tolerance * target:
            return Found(best, search.known[best], len(search.known))
        middle = _short(_divide(search, ends, target, halve=step % 3 == 2))
        if middle in ends:
            break
        ends = (middle, ends[1]) if search(middle) > target else (ends[0], middle)
    above, below = (search(t) for t in ends)
    raise ValueError(
        f"target rate {target:g} can't be reached to {100 * tolerance:g} %: around threshold {ends[0]:g} the "
        f"rate jumps from {above:.4g} to {below:.4g} on the calibration windows"
    )


def _direction(search: _Search, first: float, low: float, high: float) -> int:
    second = first * 4 if first * 4 <= high else max(first / 4, low)
    change = (search(second) - search(first)) * (second - first)
    return -1 if change > 0 else 1


def _bracket(
    search: _Search, first: float, target: float, limits: tuple[float, float], falling: int
) -> tuple[float, float] | None:
    """A threshold with a rate above the target and one with a rate at most it; None if one is missing."""
    above = search(first) > target
    # Upwards if the rate is too high and falls with T, or is too low and rises with it.
    upwards = above == (falling > 0)
    here, factor = first, 4.0
    for step in itertools.count(1):
        there = _short(here * factor if upwards else here / factor)
        there = min(max(there, limits[0]), limits[1])
        if there == here:
            return None
        if (search(there) > target) != above:
            return (here, there) if above else (there, here)
        # A bracket of a factor 4 needs few divisions; where that leads nowhere, the steps grow fast.
        here, factor = there, factor**2 if step % 3 == 0 else factor
    raise AssertionError


def _divide(search: _Search, ends: tuple[float, float], target: float, *, halve: bool) -> float:
    start, end = (math.log(t) for t in ends)
    above, below = (search(t) for t in ends)
    share = 0.5
    if not halve and below > 0:
        share = math.log(above / target) / math.log(above / below)
    return math.exp(start + min(max(share, 0.1), 0.9) * (end - start))


def _short(threshold: float) -> float:
    """In 6 significant digits, so that a spelling is readable."""
    return float(f"{threshold:.{_DIGITS}g}")
