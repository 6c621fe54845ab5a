"""The points of a sweep: what is computed for one line of its results, and the key that identifies it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

#: Stands in a policy for a threshold that is to be found.
HOLE = "{}"
REAL, SHUFFLED = "real", "shuffled"


class Group(NamedTuple):
    """The key of points that are compared with the same float32 logits."""

    model: str
    text: str
    windows: int
    window_length: int
    #: Seed of the shuffling; None for tokens in their real order.
    shuffle: int | None


@dataclass(frozen=True)
class Calibration:
    """The text on which the threshold for a target rate is found, and the tolerance."""

    #: Name of the text.
    text: str
    #: Windows of its start that are left out, since points are evaluated on them.
    start: int
    windows: int
    #: Largest relative deviation from the target rate on these windows.
    tolerance: float


@dataclass(frozen=True)
class Point:
    """One policy on the windows of one text of one model; everything that its result depends on."""

    model: str
    text: str
    #: `REAL`, or `SHUFFLED`: all tokens of the windows permuted by a generator with `seed`.
    tokens: str
    windows: int
    window_length: int
    #: Spelling of the policy, with `HOLE` for a threshold that is given by `target_rate`.
    policy: str
    #: Only these layers run under the policy; None: all.
    layers: tuple[int, ...] | None
    seed: int
    target_rate: float | None = None
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; the inverse of `from_dict`."""
        record = asdict(self)
        record["layers"] = None if self.layers is None else list(self.layers)
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Point":
        """The inverse of `to_dict`; TypeError if keys are missing or unknown."""
        layers, calibration = record.get("layers"), record.get("calibration")
        changes: dict[str, Any] = {
            "layers": None if layers is None else tuple(layers),
            "calibration": None if calibration is None else Calibration(**calibration),
        }
        return cls(**(record | changes))

    @property
    def key(self) -> str:
        """Identifies the point: 16 hexadecimal digits."""
        return digest(self.to_dict())

    @property
    def group(self) -> Group:
        """Points of one group share their reference."""
        shuffle = self.seed if self.tokens == SHUFFLED else None
        return Group(self.model, self.text, self.windows, self.window_length, shuffle)

    def __str__(self) -> str:
        parts = [self.model, self.text]
        if self.tokens != REAL:
            parts.append(self.tokens)
        parts.append(self.policy)
        if self.target_rate is not None:
            parts.append(f"at {100 * self.target_rate:g} %")
        if self.layers is not None:
            parts.append(f"in layer {', '.join(map(str, self.layers))}")
        if self.seed:
            parts.append(f"seed {self.seed}")
        return " ".join(parts)


def digest(record: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def in_order(points: Iterable[Point]) -> list[Point]:
    """Every point once: models together, within a model groups together, in the order of first appearance."""
    unique = list(dict.fromkeys(points))
    models = {model: index for index, model in enumerate(dict.fromkeys(p.model for p in unique))}
    groups = {group: index for index, group in enumerate(dict.fromkeys(p.group for p in unique))}
    return sorted(unique, key=lambda p: (models[p.model], groups[p.group]))
