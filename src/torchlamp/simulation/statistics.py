"""Counts of what a rule selected, per site, layer, head and position: the one place where a run keeps state."""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlamp.plain_table import PlainTable
from torchlamp.policy.sites import SITES
from torchlamp.simulation.blocks import count_blocks
from torchlamp.simulation.doubt import low_pass_warning
from torchlamp.simulation.tile_counts import COUNTS, saturation_warning, tile_rates


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
    """Eligible and selected entries of every site and layer that ran, over all calls since the start or the last
    `reset`.

    At the site `scores` an entry (query, key) is eligible in a head when the query may see the key; a row is one query
    in one head, and counts when it has at least one eligible entry, so padding and hidden cache slots never enter a
    rate. At `values` a row is one query in one head and its entries are the numbers of its output. At the other sites
    a row is one token and its entries are the sums of the layer; rows of padding tokens, which run as all others do,
    count there. The LM head belongs to no layer.

    Decoding with low-bit copies counts sums alone, as plain integers without rows, heads and positions: scores and
    values of (query head, key), neurons of an MLP, tokens of the vocabulary.

    Memory grows with sites x layers x (heads + positions), not with the number of calls.
    """

    #: Seed of the random baselines.
    seed: int = 0
    #: Whether touched blocks are to be counted, too.
    blocks: bool = False
    _by_head: dict[tuple[str, int], Counts] = field(default_factory=dict, repr=False)
    #: Eligible and selected entries that were counted as plain integers and aren't in `_by_head` yet.
    _sums: dict[tuple[str, int], list[int]] = field(default_factory=dict, repr=False)
    _positions: dict[tuple[str, int], Counts] = field(default_factory=dict, repr=False)
    #: Layer -> rows of scores that were looked at, and doubtful ones (`torchlamp.simulation.doubt`).
    _doubt: dict[int, list[int]] = field(default_factory=dict, repr=False)
    #: (site, layer) -> sums that didn't fit an integer register, and all.
    _overflow: dict[tuple[str, int], list[int]] = field(default_factory=dict, repr=False)
    _blocks: Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.int64), repr=False)
    #: Layer -> counts of an online softmax's tiles (`torchlamp.simulation.tile_counts`).
    _tiles: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def record(
        self,
        site: str,
        layer: int,
        selected: int | Tensor,
        eligible: int | Tensor,
        positions: Tensor | None = None,
    ) -> None:
        """Add one call of a site.

        Parameters
        ----------
        site : str
            Where.
        layer : int
            0 for the first layer, -1 for what belongs to no layer; layers in between that never ran count nothing.
        selected, eligible : int or Tensor
            Sums over the call, which cost next to nothing to add; or int64 (batch, heads, queries): recomputed scores,
            and visible keys, of each row. Sites without heads have one.
        positions : Tensor or None
            With tensors, integers (batch or 1, queries): position of each query in its own sequence; negative ones
            count as 0. None: positions aren't counted.
        """
        if not isinstance(selected, Tensor) or not isinstance(eligible, Tensor):
            sums = self._sums.setdefault((site, layer), [0, 0])
            sums[0] += int(eligible)
            sums[1] += int(selected)
            return
        eligible, selected = eligible.cpu(), selected.cpu()
        heads, at = eligible.shape[1], (site, layer)
        by_head = self._by_head.setdefault(at, Counts.zeros(heads))
        parts = torch.stack([eligible, selected, (eligible > 0).long(), (selected > 0).long()])
        by_head.make_room(heads)
        by_head.table[:, :heads] += parts.sum(dim=(1, 3))

        if positions is None:
            return
        by_position = self._positions.setdefault(at, Counts.zeros(0))
        by_query = parts.sum(dim=2)
        counted = by_query[2] > 0
        places = positions.cpu().expand(counted.shape)[counted].clamp_min(0)
        if places.numel() > 0:
            by_position.make_room(int(places.max()) + 1)
            by_position.table.index_add_(1, places, by_query[:, counted])

    def record_blocks(self, marks: Tensor) -> None:
        """Add the blocks of one call at the site scores, marked as by `torchlamp.simulation.blocks`."""
        self._blocks += count_blocks(marks).cpu()

    def record_tiles(self, layer: int, counts: Tensor) -> None:
        """Add the tiles of one call at the site scores, counted as by `torchlamp.simulation.tile_counts`."""
        self._tiles[layer] = self._tiles.get(layer, 0) + counts.cpu()

    @property
    def tile_counts(self) -> Tensor:
        """int64: the counts of `torchlamp.simulation.tile_counts` over all layers; zeros without an online softmax."""
        return sum(self._tiles.values(), torch.zeros(COUNTS, dtype=torch.int64))

    @property
    def tile_rates(self) -> dict[str, float]:
        """Shares of an online softmax's tiles of 64 keys x 16 queries, by recomputed sub-blocks of 16 keys.

        Keys: "0", "1", "2+" (disruptive in a compact layout of registers); "sub_block", the sub-blocks recomputed; and
        "saturated", the scores at the end of the narrow format's range. Empty without an online softmax.
        """
        return tile_rates(self.tile_counts)

    @property
    def tile_rates_by_layer(self) -> list[dict[str, float]]:
        """The same of each layer; empty dictionaries where none ran."""
        none = torch.zeros(COUNTS, dtype=torch.int64)
        return [tile_rates(self._tiles.get(layer, none)) for layer in range(max(self._tiles, default=-1) + 1)]

    def record_doubt(self, layer: int, rows: int, doubtful: int) -> None:
        """Add some rows of scores, and how many of them the low pass errs in so much that it isn't to be trusted."""
        sums = self._doubt.setdefault(layer, [0, 0])
        sums[0] += rows
        sums[1] += doubtful

    def record_overflow(self, site: str, layer: int, overflowed: int, sums: int) -> None:
        """Add some sums of a site in an integer register, and how many of them didn't fit it."""
        counts = self._overflow.setdefault((site, layer), [0, 0])
        counts[0] += overflowed
        counts[1] += sums

    @property
    def overflow_by_site(self) -> dict[str, tuple[int, int]]:
        """Sums that didn't fit an integer register, and all, of each site that has one."""
        found: dict[str, tuple[int, int]] = {}
        for (site, _), (overflowed, sums) in self._overflow.items():
            known = found.get(site, (0, 0))
            found[site] = (known[0] + overflowed, known[1] + sums)
        return {site: found[site] for site in SITES if site in found}

    @property
    def doubt(self) -> float:
        """Share of the rows of scores looked at in whose probabilities the low pass errs by more than a factor e.

        A few rows of every call are looked at. Where the share is large, rules that look ahead from these
        probabilities can't find the keys that matter (docs/method.md 4.12). 0 where nothing was looked at.
        """
        return rate(*self.doubt_counts[::-1])

    @property
    def doubt_by_layer(self) -> list[float]:
        """The same of each layer, 0 where none of its rows was looked at."""
        return [
            rate(*self._doubt.get(layer, [0, 0])[::-1]) for layer in range(max(self._doubt, default=-1) + 1)
        ]

    @property
    def doubt_counts(self) -> tuple[int, int]:
        """Rows that were looked at, and doubtful ones."""
        rows, doubtful = (sum(sums[i] for sums in self._doubt.values()) for i in (0, 1))
        return rows, doubtful

    @property
    def warning(self) -> str | None:
        """One line that says that the low pass isn't to be trusted: scores in doubt, or sums that overflowed.

        None: it is, as far as is known.
        """
        return saturation_warning(self.tile_counts) or low_pass_warning(
            self.doubt_counts, self.overflow_by_site
        )

    def generator(self, layer: int, step: int, site: str = "scores") -> torch.Generator:
        """A CPU generator for one call of a site, set from the seed, the layer, the call's last position and the site's
        name.

        Seeding every call anew keeps random selections independent of how sequences are grouped into batches.
        """
        # Large odd factors keep neighbouring seeds, layers, steps and sites far apart.
        mixed = self.seed * 0x9E3779B97F4A7C15 + layer * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB
        mixed += zlib.crc32(site.encode()) * 0xD6E8FEB86659FD93
        return torch.Generator().manual_seed(mixed % 2**63)

    def reset(self) -> None:
        """Forget all counts; the seed stays."""
        self._by_head.clear()
        self._sums.clear()
        self._positions.clear()
        self._doubt.clear()
        self._overflow.clear()
        self._tiles.clear()
        self._blocks.zero_()

    @property
    def _heads(self) -> dict[tuple[str, int], Counts]:
        """All counts by head; plain sums join the first column."""
        for at, sums in self._sums.items():
            counts = self._by_head.setdefault(at, Counts.zeros(1))
            counts.table[:2, 0] += torch.tensor(sums)
        self._sums.clear()
        return self._by_head

    @property
    def eligible(self) -> int:
        """Number of entries that could be recomputed, over all sites, layers, heads and calls."""
        return sum(int(c.eligible.sum()) for c in self._heads.values())

    @property
    def selected(self) -> int:
        """Number of entries recomputed in float32."""
        return sum(int(c.selected.sum()) for c in self._heads.values())

    @property
    def eligible_by_site(self) -> dict[str, int]:
        """Eligible entries of each site that ran."""
        return {site: int(self.site_counts(site).eligible) for site in self.sites}

    @property
    def selected_by_site(self) -> dict[str, int]:
        """Recomputed entries of each site that ran."""
        return {site: int(self.site_counts(site).selected) for site in self.sites}

    @property
    def rows(self) -> int:
        """Number of rows with at least one eligible entry: query and head for attention, token elsewhere."""
        return sum(int(c.rows.sum()) for c in self._heads.values())

    @property
    def recompute_rate(self) -> float:
        """Selected / eligible entries of all sites, 0 when nothing ran."""
        return rate(self.selected, self.eligible)

    @property
    def rows_touched(self) -> float:
        """Rows with at least one recomputed entry / all rows, 0 when nothing ran."""
        return rate(sum(int(c.touched.sum()) for c in self._heads.values()), self.rows)

    @property
    def sites(self) -> list[str]:
        """The sites that ran, in the order of the forward pass."""
        ran = {site for site, _ in self._heads}
        return [site for site in SITES if site in ran]

    @property
    def rates(self) -> dict[str, float]:
        """Recompute rate of each site that ran; 0 where nothing was eligible."""
        return {site: _rate(self.site_counts(site)) for site in self.sites}

    @property
    def by_site(self) -> dict[str, float]:
        """The same as `rates`."""
        return self.rates

    @property
    def recompute_rates(self) -> dict[str, float]:
        """The same as `rates`."""
        return self.rates

    @property
    def by_layer(self) -> list[float]:
        """Recompute rate of each layer over its sites, in the order the layers run."""
        return [_rate(self.layer_counts(layer)) for layer in range(self.layers)]

    @property
    def layers(self) -> int:
        """One more than the number of the last layer that ran."""
        return max((layer + 1 for _, layer in self._heads), default=0)

    @property
    def by_head(self) -> list[list[float]]:
        """Recompute rate of the scores of each head of each layer; empty lists where scores weren't narrow."""
        counts = [self.head_counts(layer) for layer in range(self.layers)]
        return [_rates(c.selected, c.eligible) for c in counts]

    @property
    def by_position(self) -> list[float]:
        """Recompute rate of the queries at each position, over all sites, layers and heads."""
        counts = self.position_counts()
        return _rates(counts.selected, counts.eligible)

    @property
    def block_rates(self) -> dict[str, float]:
        """Share of scores recomputed as single entries, and of blocks that hold at least one of them.

        Keys: "entry"; "row_block_16", 16 keys of one query; "tile_16x16", 16 keys of 16 queries. Empty unless `blocks`
        is set and scores ran in low precision.
        """
        if not self.blocks or not int(self._blocks[0, 0]):
            return {}
        rows, tiles = (rate(int(touched), int(eligible)) for eligible, touched in self._blocks)
        return {"entry": self.rates["scores"], "row_block_16": rows, "tile_16x16": tiles}

    @property
    def block_counts(self) -> Tensor:
        """int64 (2, 2): eligible and touched blocks of 1 x 16 and of 16 x 16 scores; zeros unless `blocks` is set."""
        return self._blocks.clone()

    def site_counts(self, site: str) -> Counts:
        """The counts of one site over all layers and heads, int64 (1,); zeros if it didn't run."""
        return _total(self._of(self._heads, site=site))

    def head_counts(self, layer: int, site: str = "scores") -> Counts:
        """A copy of the counts of one layer at a site, int64 (heads,); zeros if the site didn't run there."""
        counts = self._heads.get((site, layer))
        if counts is not None:
            return Counts(counts.table.clone())
        others = self._of(self._heads, site=site)
        return Counts.zeros(others[0].table.shape[1] if others else 0)

    def layer_counts(self, layer: int) -> Counts:
        """The counts of one layer over all its sites and heads, int64 (1,); layer -1 is the LM head."""
        return _total(self._of(self._heads, layer=layer))

    def position_counts(self, layer: int | None = None, site: str | None = None) -> Counts:
        """A copy of the counts by position, int64 (positions,), of one layer and site or of all together."""
        chosen = self._of(self._positions, site=site, layer=layer)
        size = max((_length(c) for c in chosen), default=0)
        total = Counts.zeros(size)
        for counts in chosen:
            part = counts.table[:, :size]
            total.table[:, : part.shape[1]] += part
        return total

    def _of(
        self, tables: dict[tuple[str, int], Counts], *, site: str | None = None, layer: int | None = None
    ) -> list[Counts]:
        return [
            counts
            for (at, number), counts in tables.items()
            if (site is None or at == site) and (layer is None or number == layer)
        ]

    def __str__(self) -> str:
        if self.sites and not self.rows:
            return ", ".join(f"{site} {share:.2%}" for site, share in self.rates.items())
        things = "scores" if self.sites in ([], ["scores"]) else f"entries at {', '.join(self.sites)}"
        return (
            f"recompute rate {self.recompute_rate:.3%} ({self.selected:,} of {self.eligible:,} {things}), "
            f"rows touched {self.rows_touched:.2%}, {self.layers} layers"
            f"{'; ' + self.warning if self.warning else ''}"
        )

    def table(self) -> PlainTable:
        """A row a site: recompute rate, selected and eligible entries and, where rows were counted, those touched."""
        columns = ["site", "recomputed", "selected", "eligible", "rows touched"]
        rows = []
        for site in self.sites:
            counts = self.site_counts(site)
            touched = f"{rate(int(counts.touched), int(counts.rows)):.2%}" if int(counts.rows) else "-"
            share = f"{_rate(counts):.3%}"
            rows.append([site, share, f"{int(counts.selected):,}", f"{int(counts.eligible):,}", touched])
        return PlainTable(f"Statistics: {self}", columns, rows)

    def __repr__(self) -> str:
        return str(self.table()) if self.sites else f"Statistics: {self}"

    def _repr_html_(self) -> str:
        return self.table().to_html()


def _total(chosen: list[Counts]) -> Counts:
    """The sum of all columns, one column."""
    total = Counts.zeros(1)
    for counts in chosen:
        total.table += counts.table.sum(dim=1, keepdim=True)
    return total


def _rate(counts: Counts) -> float:
    return rate(int(counts.selected.sum()), int(counts.eligible.sum()))


def _length(counts: Counts) -> int:
    """Positions up to the last one that was counted."""
    used = torch.nonzero(counts.rows)
    return int(used[-1]) + 1 if used.numel() else 0


def rate(part: int, whole: int) -> float:
    """A share of two counts; 0 where there is nothing to share."""
    return part / whole if whole else 0.0


def _rates(part: Tensor, whole: Tensor) -> list[float]:
    return [float(r) for r in (part.double() / whole.clamp_min(1).double())]
