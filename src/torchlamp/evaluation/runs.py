"""The runs of an evaluation: the tested policy, its baselines, and what each of them collects."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchlamp.evaluation.metrics import TokenMetrics
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.results.result import POSITION_BIN, Role
from torchlamp.rules.rule import Rule
from torchlamp.simulation.doubt import low_pass_warning
from torchlamp.simulation.statistics import Counts, Statistics, rate
from torchlamp.simulation.tile_counts import COUNTS, saturation_warning, tile_rates

_NOTHING = Counts.zeros(0).table


@dataclass
class EvaluationRun:
    """One policy (None: the float32 reference) and what its finished windows gave."""

    role: Role
    policy: Policy | None
    windows: list[TokenMetrics] = field(default_factory=list)
    #: Tables of `Counts`: of each site, each layer over its sites, the scores of each layer's heads, each position.
    sites: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: _NOTHING)
    #: Eligible and touched blocks of 1 x 16 and of 16 x 16 scores; zeros where they weren't counted.
    blocks: Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.int64))
    #: Counts of an online softmax's tiles; zeros without one.
    tiles: Tensor = field(default_factory=lambda: torch.zeros(COUNTS, dtype=torch.int64))
    #: Rows of scores that were looked at, and those in which the low pass isn't to be trusted.
    doubt: tuple[int, int] = (0, 0)
    #: Of each site: sums that didn't fit an integer register, and all.
    overflow: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Of each window the mean KL of each pass whose last bits were moved; empty lists without such passes.
    noise: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    forward_seconds: float = 0.0

    def add(
        self, metrics: TokenMetrics, statistics: Statistics | None, seconds: float, forward: float
    ) -> None:
        """Add a finished window."""
        self.windows.append(metrics)
        self.seconds += seconds
        self.forward_seconds += forward
        if statistics is None:
            return
        for site in statistics.sites:
            self.sites[site] = _added(self.sites.get(site, _NOTHING), statistics.site_counts(site).table)
        for layer in range(statistics.layers):
            if layer == len(self.layers):
                self.layers.append(_NOTHING)
                self.heads.append(_NOTHING)
            self.layers[layer] = _added(self.layers[layer], statistics.layer_counts(layer).table)
            self.heads[layer] = _added(self.heads[layer], statistics.head_counts(layer).table)
        self.positions = _added(self.positions, statistics.position_counts().table)
        self.blocks = self.blocks + statistics.block_counts
        self.tiles = self.tiles + statistics.tile_counts
        rows, doubtful = statistics.doubt_counts
        self.doubt = (self.doubt[0] + rows, self.doubt[1] + doubtful)
        for site, (overflowed, sums) in statistics.overflow_by_site.items():
            known = self.overflow.get(site, (0, 0))
            self.overflow[site] = (known[0] + overflowed, known[1] + sums)

    @property
    def kl_by_move(self) -> list[float]:
        """Mean KL over all windows of each pass whose last bits were moved."""
        return [sum(passes) / len(passes) for passes in zip(*self.noise, strict=True)]

    @property
    def recompute_rate(self) -> float:
        """Selected / eligible entries of all sites, 0 where nothing was eligible."""
        counts = self._total()
        return rate(int(counts.selected), int(counts.eligible))

    @property
    def recompute_rate_by_layer(self) -> list[float]:
        """The same of each layer."""
        return [rate(int(c.selected), int(c.eligible)) for c in map(Counts, self.layers)]

    @property
    def recompute_rate_by_site(self) -> dict[str, float]:
        """The same of each site."""
        return {site: _rates(table)[0] for site, table in self.sites.items()}

    @property
    def rows_touched(self) -> float:
        """Rows with a recomputed entry / rows."""
        counts = self._total()
        return rate(int(counts.touched), int(counts.rows))

    @property
    def recompute_rate_by_head(self) -> list[list[float]]:
        """Recompute rate of the scores of each head of each layer."""
        return [_rates(table) for table in self.heads]

    @property
    def recompute_rate_by_position(self) -> list[float]:
        """Recompute rate of the queries at positions 0 to 15, 16 to 31, and so on."""
        padded = pad(self.positions, (0, -self.positions.shape[1] % POSITION_BIN))
        return _rates(padded.view(len(padded), -1, POSITION_BIN).sum(dim=2))

    @property
    def block_rates(self) -> dict[str, float]:
        """Share of scores, of 1 x 16 and of 16 x 16 blocks of them that are recomputed; empty without counts."""
        if not int(self.blocks[0, 0]):
            return {}
        rows, tiles = (rounded(rate(int(touched), int(eligible))) for eligible, touched in self.blocks)
        return {"entry": self.recompute_rate_by_site["scores"], "row_block_16": rows, "tile_16x16": tiles}

    @property
    def tile_rates(self) -> dict[str, float]:
        """Shares of an online softmax's tiles by recomputed sub-blocks; empty without one."""
        return {name: rounded(share) for name, share in tile_rates(self.tiles).items()}

    @property
    def warning(self) -> str | None:
        """One line that says that the low pass isn't to be trusted; None: it is."""
        return saturation_warning(self.tiles) or low_pass_warning(self.doubt, self.overflow)

    def _total(self) -> Counts:
        total = Counts.zeros(1)
        for table in self.sites.values():
            total.table += table
        return total


def plan_runs(policy: Policy, baselines: bool, compared: Sequence[Policy] = ()) -> list[EvaluationRun]:
    """The runs of an evaluation beside the reference; the first one is the tested policy.

    Plain is the same operands and accumulators without transforms and with rule none; random-like recomputes as many
    entries per row as the tested rules do, at random. A policy that is there already isn't run again.

    Parameters
    ----------
    policy : Policy
        The tested one.
    baselines : bool
        Whether plain and random-like run.
    compared : sequence of Policy
        Others to run on the same windows.
    """
    runs = [EvaluationRun("tested", policy)]
    if baselines:
        _add(runs, "plain", _plain(policy))
    for other in compared:
        _add(runs, "compared", other)
    if baselines:
        control = {site: SitePolicy(p.precision, _random_like(p.rule)) for site, p in policy.sites.items()}
        _add(runs, "random-like", Policy(sites=control))
    return runs


def _add(runs: list[EvaluationRun], role: Role, policy: Policy) -> None:
    """Add a run unless the policy runs already."""
    if all(policy != run.policy for run in runs):
        runs.append(EvaluationRun(role, policy))


def _plain(policy: Policy) -> Policy:
    """The same operands and accumulators without transforms, nothing recomputed: what ordinary hardware does."""
    precisions = {site: replace(part.precision, transforms=()) for site, part in policy.sites.items()}
    return Policy(sites={site: SitePolicy(precision) for site, precision in precisions.items()})


def _random_like(rule: Rule) -> Rule:
    if rule.role == "control":
        return rule
    return Rule.parse(f"random-like:{rule}")


def _added(total: Tensor, more: Tensor) -> Tensor:
    """Sum of two tables of `Counts`; the shorter one is taken as 0 where it ends."""
    columns = max(total.shape[1], more.shape[1])
    first, second = (pad(table, (0, columns - table.shape[1])) for table in (total, more))
    return first + second


def _rates(table: Tensor) -> list[float]:
    """Selected / eligible of each column, in 6 significant digits; 0 where none is eligible."""
    counts = Counts(table)
    pairs = zip(counts.selected.tolist(), counts.eligible.tolist(), strict=True)
    return [rounded(rate(selected, eligible)) for selected, eligible in pairs]


def rounded(value: float) -> float:
    """In 6 significant digits: enough for a figure, and a third of the length in a file."""
    return float(f"{value:.6g}")
