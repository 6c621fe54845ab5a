"""Counts of what a rule selected, per layer, head and position: the one place where a run keeps state."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Counts:
    """Sums over any number of query rows, one column per head or per position.

    `table` is int64 (4, columns): eligible entries, selected entries, rows, and rows with a selected entry.
    """

    table: Tensor

    @classmethod
    def zeros(cls, columns: int) -> "Counts":
        """Nothing counted yet."""
        return cls(torch.zeros(4, columns, dtype=torch.int64))

    @property
    def eligible(self) -> Tensor:
        """Visible entries, int64 (columns,)."""
        return self.table[0]

    @property
    def selected(self) -> Tensor:
        """Recomputed entries, int64 (columns,)."""
        return self.table[1]

    @property
    def rows(self) -> Tensor:
        """Rows with a visible entry, int64 (columns,)."""
        return self.table[2]

    @property
    def touched(self) -> Tensor:
        """Rows with a recomputed entry, int64 (columns,)."""
        return self.table[3]

    def make_room(self, columns: int) -> None:
        """Widen the table to so many columns or more: it doubles at least, so that decoding rarely copies."""
        have = self.table.shape[1]
        if columns > have:
            self.table = torch.nn.functional.pad(self.table, (0, max(columns, 2 * have) - have))


@dataclass(eq=False)
class Statistics:
    """Eligible and selected entries of every layer that ran, over all calls since the start or the last
    `reset`.

    An entry (query, key) is eligible in a head when the query may see the key; a row is one query in one
    head, and counts when it has at least one eligible entry, so padding and hidden cache slots never enter a
    rate. Memory grows with layers x (heads + positions), not with the number of calls.
    """

    #: Seed of the random baselines.
    seed: int = 0
    _heads: list[Counts] = field(default_factory=list, repr=False)
    _positions: list[Counts] = field(default_factory=list, repr=False)

    def record(self, layer: int, eligible: Tensor, selected: Tensor, positions: Tensor) -> None:
        """Add one attention call.

        Parameters
        ----------
        layer : int
            0 for the first layer; layers in between that never ran count nothing.
        eligible, selected : Tensor
            int64 (batch, heads, queries): visible keys, and recomputed scores, of each row.
        positions : Tensor
            Integers (batch or 1, queries): position of each query in its own sequence; negative ones count as
            0.
        """
        eligible, selected = eligible.cpu(), selected.cpu()
        heads = eligible.shape[1]
        while len(self._heads) <= layer:
            self._heads.append(Counts.zeros(heads))
            self._positions.append(Counts.zeros(0))
        parts = torch.stack([eligible, selected, (eligible > 0).long(), (selected > 0).long()])
        self._heads[layer].make_room(heads)
        self._heads[layer].table[:, :heads] += parts.sum(dim=(1, 3))

        by_query = parts.sum(dim=2)
        counted = by_query[2] > 0
        places = positions.cpu().expand(counted.shape)[counted].clamp_min(0)
        if places.numel() > 0:
            self._positions[layer].make_room(int(places.max()) + 1)
            self._positions[layer].table.index_add_(1, places, by_query[:, counted])

    def generator(self, layer: int, step: int) -> torch.Generator:
        """A CPU generator for one attention call, set from the seed, the layer and the call's last position.

        Seeding every call anew keeps random selections independent of how sequences are grouped into batches.
        """
        # Large odd factors keep neighbouring seeds, layers and steps far apart.
        mixed = self.seed * 0x9E3779B97F4A7C15 + layer * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB
        return torch.Generator().manual_seed(mixed % 2**63)

    def reset(self) -> None:
        """Forget all counts; the seed stays."""
        self._heads.clear()
        self._positions.clear()

    @property
    def eligible(self) -> int:
        """Number of scores that some query saw, over all layers, heads and calls."""
        return sum(int(c.eligible.sum()) for c in self._heads)

    @property
    def selected(self) -> int:
        """Number of scores recomputed in float32."""
        return sum(int(c.selected.sum()) for c in self._heads)

    @property
    def rows(self) -> int:
        """Number of query rows (one per query and head) that saw at least one key."""
        return sum(int(c.rows.sum()) for c in self._heads)

    @property
    def recompute_rate(self) -> float:
        """Selected / eligible entries, 0 when nothing ran."""
        return rate(self.selected, self.eligible)

    @property
    def rows_touched(self) -> float:
        """Rows with at least one recomputed entry / all rows, 0 when nothing ran."""
        return rate(sum(int(c.touched.sum()) for c in self._heads), self.rows)

    @property
    def by_layer(self) -> list[float]:
        """Recompute rate of each layer, in the order the layers run."""
        return [rate(int(c.selected.sum()), int(c.eligible.sum())) for c in self._heads]

    @property
    def by_head(self) -> list[list[float]]:
        """Recompute rate of each head of each layer."""
        return [_rates(c.selected, c.eligible) for c in self._heads]

    @property
    def by_position(self) -> list[float]:
        """Recompute rate of the queries at each position, over all layers and heads."""
        counts = self.position_counts()
        return _rates(counts.selected, counts.eligible)

    def head_counts(self, layer: int) -> Counts:
        """A copy of the counts of one layer, int64 (heads,)."""
        return Counts(self._heads[layer].table.clone())

    def position_counts(self, layer: int | None = None) -> Counts:
        """A copy of the counts by position, int64 (positions,), of one layer or of all together."""
        chosen = self._positions if layer is None else [self._positions[layer]]
        size = max((_length(c) for c in chosen), default=0)
        total = Counts.zeros(size)
        for counts in chosen:
            part = counts.table[:, :size]
            total.table[:, : part.shape[1]] += part
        return total

    def __str__(self) -> str:
        return (
            f"recompute rate {self.recompute_rate:.3%} ({self.selected:,} of {self.eligible:,} scores), "
            f"rows touched {self.rows_touched:.2%}, {len(self._heads)} layers"
        )

    def __repr__(self) -> str:
        return f"<Statistics: {self}>"


def _length(counts: Counts) -> int:
    """Positions up to the last one that was counted."""
    used = torch.nonzero(counts.rows)
    return int(used[-1]) + 1 if used.numel() else 0


def rate(part: int, whole: int) -> float:
    """A share of two counts; 0 where there is nothing to share."""
    return part / whole if whole else 0.0


def _rates(part: Tensor, whole: Tensor) -> list[float]:
    return [float(r) for r in (part.double() / whole.clamp_min(1).double())]
