"""The runs of an evaluation: the tested policy, its baselines, and what each of them collects."""

from dataclasses import dataclass, field

from torchlamp.compositions.policy import Policy, SitePolicy
from torchlamp.compositions.statistics import Statistics, rate
from torchlamp.rules.rule import Rule
from torchlamp.study.metrics import TokenMetrics
from torchlamp.study.result import Role


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
