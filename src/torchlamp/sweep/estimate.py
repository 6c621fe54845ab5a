"""An estimate of the seconds that the points of a sweep will take, from those that are done."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torchlamp.sweep.points import Point
from torchlamp.sweep.policies import sample


class Estimate:
    """Seconds per token, averaged over points of the same kind where there are any, else of the same model.

    Points are of one kind if they share model, window length, sites, rule names, and whether they are calibrated.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        #: Seconds and tokens of each kind and each model.
        self._totals: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for record in records:
            seconds = record.get("seconds")
            if record.get("status") != "done" or not isinstance(seconds, int | float):
                continue
            try:
                point = Point.from_dict(record["point"])
            except TypeError:  # another version's: it teaches nothing
                continue
            self.add(point, seconds)

    def add(self, point: Point, seconds: float) -> None:
        """Learn from a finished point."""
        for kind in _kinds(point):
            self._totals[kind][0] += seconds
            self._totals[kind][1] += _tokens(point)

    def seconds(self, points: Iterable[Point]) -> float | None:
        """Estimate for all of these one after the other; None as long as no point at all is done."""
        total = 0.0
        for point in points:
            known = next((self._totals[kind] for kind in _kinds(point) if kind in self._totals), None)
            if known is None:
                return None
            total += known[0] / known[1] * _tokens(point)
        return total


def _kinds(point: Point) -> list[tuple[Any, ...]]:
    """Keys that a point shares with others, from the most particular to the one that all share."""
    rules = tuple((site, part.rule.name) for site, part in sample(point.policy).sites.items())
    calibrated = point.target_rate is not None
    return [
        (point.model, point.window_length, rules, calibrated),
        (point.model, point.window_length, calibrated),
        (point.model,),
        (),
    ]


def _tokens(point: Point) -> int:
    return point.windows * point.window_length
