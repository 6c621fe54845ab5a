"""Random baselines: a given share of the entries, or as many as a rule takes, but any of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchlamp.rules.rule import NumberRule, Rule
from torchlamp.rules.threshold import ThresholdForm
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class Random(NumberRule):
    """`random:R`: recompute every visible entry with probability R, independently.

    R in [0, 1] is the expected recompute rate. All sequences of a batch see the same draws, so that the
    result of one doesn't depend on its neighbours.

    Source: derived; unlike the published baseline it never spends a draw on a masked key.
    """

    rate: float
    name = "random"
    role = "control"
    examples = ("random:0.01", "random:0.5")
    looks_through = "any"
    allowed = (0.0, 1.0)
    needs_generator = True

    def select(self, tile: Tile) -> Tensor:
        """Visible entries whose draw is below R.

        Raises
        ------
        ValueError
            If the tile has no `generator`, or one that is not on the CPU.
        """
        # float64: a float32 draw is a multiple of 2^-24, too coarse for small rates.
        return (_draw(tile, self, torch.float64) < self.rate).to(tile.scores.device) & tile.visible


@dataclass(frozen=True)
class RandomLike(Rule):
    """`random-like:RULE`: in every row as many entries as RULE takes, uniformly without replacement.

    Only visible entries are drawn, and the count per row is RULE's exactly. What RULE gains over this is what
    its choice within the row is worth, at equal cost. The draws are shared by the sequences of a batch.

    The parameter is the spelling of any rule but random-like.

    Source: derived; the published baseline permutes a row's selection over all keys, so that picks fall on
    masked keys and are wasted, about half of them over a causal triangle.

    Raises
    ------
    ValueError
        If RULE is itself random-like.
    TypeError
        If RULE is no rule.
    """

    rule: Rule
    name = "random-like"
    role = "control"
    examples = ("random-like:strict:0.1", "random-like:running:0.001", "random-like:all")
    needs_generator = True

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule random-like: expected a Rule to imitate, got {self.rule!r}")
        if isinstance(self.rule, RandomLike):
            raise ValueError(f"rule '{self}': random-like can't imitate random-like; write '{self.rule}'")
        # What a site must know of the imitated rule before it runs.
        for name in ("looks_through", "byproducts", "reads_residual_stream"):
            object.__setattr__(self, name, getattr(self.rule, name))

    def select(self, tile: Tile) -> Tensor:
        """As many visible entries of each row as the imitated rule selects.

        Raises
        ------
        ValueError
            If the tile has no `generator`, or one that is not on the CPU.
        """
        counts = self.rule.select(tile).sum(dim=-1)
        return _lowest(_draw(tile, self, torch.float32).to(tile.scores.device), tile.visible, counts)

    def threshold_form(self) -> ThresholdForm | None:
        """The imitated rule's form, drawn; None if it has none."""
        form = self.rule.threshold_form()
        return None if form is None else replace(form, drawn=True)

    @property
    def parameter(self) -> str:
        """The imitated rule's spelling."""
        return str(self.rule)

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Build the rule from the spelling of the rule to imitate."""
        if text is None or not text.strip():
            raise ValueError(f"rule '{cls.name}' lacks its rule; write for example '{cls.examples[0]}'")
        return cls(Rule.parse(text))


def _draw(tile: Tile, rule: Rule, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1) on the CPU for every entry, batch size 1: all sequences share them."""
    if tile.generator is None:
        raise ValueError(f"rule '{rule}' needs random numbers: give the tile a torch.Generator")
    if tile.generator.device.type != "cpu":
        raise ValueError(f"rule '{rule}': its generator is on {tile.generator.device}, it must be on the CPU")
    shape = tile.scores.shape
    drawn = torch.Size((1, *shape[1:])) if len(shape) > 2 else shape
    return torch.rand(drawn, generator=tile.generator, dtype=dtype)


def _lowest(draw: Tensor, visible: Tensor, counts: Tensor) -> Tensor:
    """The `counts` visible entries of each row with the lowest draws, equal draws in the order of their keys.

    A top-k over whole rows costs several times the draw itself. So only candidates are sorted: entries with a
    draw below a level under which a row of n draws almost surely has its c lowest. Where it has not, the
    row's level is raised to include everything; the result is exact either way.

    Parameters
    ----------
    draw
        Float32 (1, ..., rows, keys) or (rows, keys), in [0, 1).
    visible
        Bool (..., rows, keys).
    counts
        Int64 (..., rows), at most the number of visible keys.
    """
    wanted = counts.flatten()
    # Mean and six standard deviations of a Poisson count, and a little for the smallest: misses are rare.
    level = (counts + 6 * counts.sqrt() + 8) / visible.sum(dim=-1)
    level.masked_fill_(counts == 0, 0.0)
    candidates, rows, found = _candidates(draw, visible, level)
    short = found < wanted
    if bool(short.any()):
        level.masked_fill_(short.view_as(level), 2.0)
        candidates, rows, found = _candidates(draw, visible, level)
    # The draws of a batch repeat, hence the remainder. A float32 draw is a multiple of 2^-24, so the key
    # orders by row first and by draw second without any rounding.
    draws = draw.flatten()[candidates % max(draw.numel(), 1)]
    order = (rows * 2**24 + (draws * 2**24).to(torch.int64)).argsort(stable=True)
    first_of_row = found.cumsum(dim=0) - found
    rank = torch.arange(len(rows), device=rows.device) - first_of_row[rows]
    chosen = candidates[order[rank < wanted[rows]]]
    selected = torch.zeros(visible.numel(), dtype=torch.bool, device=visible.device)
    selected[chosen] = True
    return selected.view(visible.shape)


def _candidates(draw: Tensor, visible: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Visible entries with a draw below their row's level: flat positions, rows, and number per row."""
    positions = ((draw < level.unsqueeze(-1)) & visible).flatten().nonzero()[:, 0]
    rows = positions // max(visible.shape[-1], 1)
    return positions, rows, torch.bincount(rows, minlength=level.numel())
