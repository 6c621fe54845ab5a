"""The base class of all rules, and how a rule is spelled."""

from __future__ import annotations

import math
import re
import sys
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar, Literal

from torch import Tensor

from torchlamp.rules.registry import rule_class
from torchlamp.rules.threshold import ThresholdForm
from torchlamp.rules.tile import Tile

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

Role = Literal["published", "ours", "control", "oracle", "static"]


class Rule(ABC):
    """Which entries of a tile to recompute: a pure function of the tile.

    A rule is a frozen dataclass with at most one field, its parameter, and a line in the package's `__init__`. Its
    spelling is `name` or `name:parameter`; `Rule.parse` reads it and `str` writes it.
    """

    #: The name in the spelling.
    name: ClassVar[str]
    #: Spellings of typical uses, at least one: the tests that hold for every rule run on these.
    examples: ClassVar[tuple[str, ...]]
    #: What the rule must see: any tile (its `gain`, scores, error), a softmax, an attention (a softmax over keys that
    #: have values and places), the blocks of one (`Tile.blocks`), an elementwise function, or an online softmax
    #: (`OnlineTile`).
    looks_through: Literal["any", "softmax", "attention", "blocks", "elementwise", "online"] = "softmax"
    #: Elementary operations per eligible entry that the look-ahead adds to the low pass and to f itself.
    operations: ClassVar[float] = 0.0
    #: Work of the look-ahead that isn't counted by entries, for the cost model: weighted sums of the values and their
    #: distances, norms of both operands.
    further_work: ClassVar[frozenset[Literal["distances", "norms"]]] = frozenset()
    #: Where the rule comes from: published; this project's own; a control without look-ahead; an oracle, which knows
    #: the true error as no hardware could; a static choice, made without looking at the scores.
    role: ClassVar[Role] = "ours"
    #: What must be known of the low pass before it runs; all else the tile computes when asked. "squares": sums of the
    #: squared partial sums, which `tile.error` is made of.
    byproducts: frozenset[Literal["squares"]] = frozenset()
    #: Whether the rule looks as far as the residual stream, which must be kept for `tile.distance`.
    reads_residual_stream: bool = False
    #: Whether `select` draws from `tile.generator`.
    needs_generator: bool = False

    @abstractmethod
    def select(self, tile: Tile) -> Tensor:
        """Entries to recompute: bool (..., rows, keys), True only where `tile.visible` is."""

    def stages(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """What `select` gives, and those entries that are recomputed after an online softmax's maximum is settled."""
        return self.select(tile), None

    def threshold_form(self) -> ThresholdForm | None:
        """The same rule as a weight and a threshold for the native kernel; None if it has no such form."""
        return None

    @property
    def parameter(self) -> str | None:
        """The parameter as it is spelled; None for a rule without one."""
        return None

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Build the rule from the spelling of its parameter (None: there was no colon).

        Raises
        ------
        ValueError
            If the parameter is missing, unwanted, unreadable or out of range.
        """
        if text is not None:
            raise ValueError(f"rule '{cls.name}:{text}': {cls.name} takes no parameter; write '{cls.name}'")
        return cls()

    @classmethod
    def parse(cls, spelling: str | Rule) -> Rule:
        """Read a rule such as 'strict:0.1', 'none' or 'random-like:strict:0.1'; a `Rule` comes back as it is.

        Raises
        ------
        ValueError
            If the name is unknown or the parameter is not allowed.
        TypeError
            If the spelling is neither a string nor a rule.
        """
        if isinstance(spelling, Rule):
            return spelling
        if not isinstance(spelling, str):
            raise TypeError(f"rule {spelling!r}: expected a string such as 'strict:0.1' or a Rule")
        name, colon, parameter = spelling.strip().partition(":")
        return rule_class(name).from_parameter(parameter if colon else None)

    def __str__(self) -> str:
        return self.name if self.parameter is None else f"{self.name}:{self.parameter}"


class NumberRule(Rule):
    """A rule whose parameter is one number in a closed range.

    A subclass is a frozen dataclass with one float field; the field is checked when the rule is made.

    Raises
    ------
    ValueError
        If the number is not finite or out of range.
    TypeError
        If it is not a number.
    """

    #: Smallest and largest parameter allowed; the largest may be infinite, the parameter never is.
    allowed: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def __post_init__(self) -> None:
        field = fields(self)[0].name  # type: ignore[arg-type]
        given = getattr(self, field)
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise TypeError(f"rule {self.name}: {field} must be a number, got {given!r}")
        if not self._allows(given):
            raise ValueError(f"rule '{self.name}:{given}': {self._expectation()}")
        object.__setattr__(self, field, float(given) + 0.0)  # -0.0 becomes 0.0: equal rules, one spelling

    @property
    def value(self) -> float:
        """The parameter, whatever its field is called."""
        return float(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    @property
    def parameter(self) -> str:
        """The parameter in its shortest spelling: '0.1', '50', '1e-05'."""
        return spelled(self.value)

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Build the rule from the spelling of its number."""
        if text is None or not text.strip():
            raise ValueError(f"rule '{cls.name}' lacks its number: {cls._expectation()}")
        if not _NUMBER.fullmatch(text.strip()) or not cls._allows(float(text)):
            raise ValueError(f"rule '{cls.name}:{text}': {cls._expectation()}")
        return cls(float(text))  # type: ignore[call-arg]

    @classmethod
    def _allows(cls, value: float) -> bool:
        lowest, highest = cls.allowed
        # Beyond float's range an int can't be converted, but it can be compared.
        return lowest <= value <= min(highest, sys.float_info.max)

    @classmethod
    def _expectation(cls) -> str:
        lowest, highest = cls.allowed
        limits = (
            f"in [{spelled(lowest)}, {spelled(highest)}]" if highest < math.inf else f">= {spelled(lowest)}"
        )
        return f"{cls.name} takes a finite number {limits}; write for example '{cls.examples[0]}'"


def spelled(value: float) -> str:
    """Shortest decimal that reads back as the same float; without '+', which separates a policy's parts."""
    return repr(float(value)).removesuffix(".0").replace("e+", "e")
