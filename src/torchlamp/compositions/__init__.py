"""How a site runs under a policy: low pass, look ahead, recompute, apply."""

from torchlamp.compositions.attention import AttentionResult, attention
from torchlamp.compositions.policy import SITES, Policy, SitePolicy
from torchlamp.compositions.statistics import Counts, Statistics
from torchlamp.compositions.visibility import Visibility, visibility

__all__ = [
    "SITES",
    "AttentionResult",
    "Counts",
    "Policy",
    "SitePolicy",
    "Statistics",
    "Visibility",
    "attention",
    "visibility",
]
