"""The runs of an evaluation: the tested policy, its baselines, and what each of them collects."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchlamp.compositions.policy import Policy, SitePolicy
from torchlamp.compositions.statistics import Statistics, rate
from torchlamp.rules.rule import Rule
from torchlamp.study.metrics import TokenMetrics
from torchlamp.study.result import POSITION_BIN, Role


@dataclass
class LayerCounts:
    """Selected and eligible scores of a layer, and its rows, touched and all."""

    selected: int = 0
    eligible: int = 0
    touched: int = 0
    rows: int = 0


@dataclass
class Run:
    """One policy (None: the float32 reference) and what its finished windows gave."""

    role: Role
    policy: Policy | None
    windows: list[TokenMetrics] = field(default_factory=list)
    layers: list[LayerCounts] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.int64))
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
        for layer in range(len(statistics.by_layer)):
            if layer == len(self.layers):
                self.layers.append(LayerCounts())
            counts, total = statistics.head_counts(layer), self.layers[layer]
            total.selected += int(counts.selected.sum())
            total.eligible += int(counts.eligible.sum())
            total.touched += int(counts.touched.sum())
            total.rows += int(counts.rows.sum())
            pair = torch.stack([counts.selected, counts.eligible])
            if layer == len(self.heads):
                self.heads.append(pair)
            else:
                self.heads[layer] = _added(self.heads[layer], pair)
        by_position = statistics.position_counts()
        self.positions = _added(self.positions, torch.stack([by_position.selected, by_position.eligible]))

    @property
    def recompute_rate(self) -> float:
        """Selected / eligible scores, 0 where nothing was eligible."""
        return rate(sum(c.selected for c in self.layers), sum(c.eligible for c in self.layers))

    @property
    def recompute_rate_by_layer(self) -> list[float]:
        """The same of each layer."""
        return [rate(c.selected, c.eligible) for c in self.layers]

    @property
    def rows_touched(self) -> float:
        """Rows with a recomputed score / rows."""
        return rate(sum(c.touched for c in self.layers), sum(c.rows for c in self.layers))

    @property
    def recompute_rate_by_head(self) -> list[list[float]]:
        """Recompute rate of each head of each layer."""
        return [_rates(pair) for pair in self.heads]

    @property
    def recompute_rate_by_position(self) -> list[float]:
        """Recompute rate of the queries at positions 0 to 15, 16 to 31, and so on."""
        padded = pad(self.positions, (0, -self.positions.shape[1] % POSITION_BIN))
        return _rates(padded.view(2, -1, POSITION_BIN).sum(dim=2))


def plan_runs(policy: Policy, baselines: bool) -> list[Run]:
    """The tested policy first, then the baselines that say something about it.

    Plain is the same accumulators with rule none; random-like recomputes as many entries per row as the
    tested rules do, at random. Neither is run where it would repeat the tested policy or recompute everything
    or nothing.
    """
    runs = [Run("tested", policy)]
    if not baselines:
        return runs
    plain = Policy(
        sites={site: SitePolicy(p.accumulate, Rule.parse("none")) for site, p in policy.sites.items()}
    )
    if plain != policy:
        runs.append(Run("plain", plain))
    control = Policy(
        sites={site: SitePolicy(p.accumulate, _random_like(p.rule)) for site, p in policy.sites.items()}
    )
    if control != policy:
        runs.append(Run("random-like", control))
    return runs


def _random_like(rule: Rule) -> Rule:
    if rule.name in ("none", "all") or rule.name.startswith("random"):
        return rule
    return Rule.parse(f"random-like:{rule}")


def _added(total: Tensor, more: Tensor) -> Tensor:
    """Sum of two tables (2, columns); the shorter one is taken as 0 where it ends."""
    columns = max(total.shape[1], more.shape[1])
    first, second = (pad(table, (0, columns - table.shape[1])) for table in (total, more))
    return first + second


def _rates(pair: Tensor) -> list[float]:
    """Selected / eligible of each column of (2, columns), in 6 significant digits; 0 where none is eligible."""
    selected, eligible = pair.tolist()
    return [rounded(rate(part, whole)) for part, whole in zip(selected, eligible, strict=True)]


def rounded(value: float) -> float:
    """In 6 significant digits: enough for a figure, and a third of the length in a file."""
    return float(f"{value:.6g}")
