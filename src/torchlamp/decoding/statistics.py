"""What decoding read in full precision, by site."""

from dataclasses import dataclass, field


@dataclass
class DecodeStatistics:
    """Counts of a prepared model's calls, by site of the policy, in the order of a layer.

    What is counted: scores and values of (query head, key); neurons of the MLP; tokens of the vocabulary. The sites
    `qkv` and `attention_out` recompute nothing and count nothing.
    """

    #: Site -> recomputed from, or read in, full precision.
    selected: dict[str, int] = field(default_factory=dict)
    #: Site -> what could have been.
    eligible: dict[str, int] = field(default_factory=dict)

    def record(self, site: str, selected: int, eligible: int) -> None:
        """Add one call."""
        self.selected[site] = self.selected.get(site, 0) + selected
        self.eligible[site] = self.eligible.get(site, 0) + eligible

    @property
    def recompute_rates(self) -> dict[str, float]:
        """Site -> selected / eligible, 0 where nothing was eligible."""
        return {
            site: self.selected[site] / eligible if eligible else 0.0
            for site, eligible in self.eligible.items()
        }

    def clear(self) -> None:
        """Start counting anew."""
        self.selected.clear()
        self.eligible.clear()

    def __str__(self) -> str:
        return (
            ", ".join(f"{site} {rate:.2%}" for site, rate in self.recompute_rates.items())
            or "nothing counted"
        )
