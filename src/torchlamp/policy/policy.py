"""What runs at which site: an accumulator and a rule each, in one spelling for Python, CLI and JSON."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.rules.rule import Rule

#: The sites of a transformer, in the order of its forward pass; this is also the order they are printed in.
SITES = ("scores", "values", "qkv", "attention_out", "mlp_up", "mlp_down", "norm", "lm_head")

# A rule's parameters may hold commas, so only a comma that starts the next `site=` separates two sites.
_SITE_SEPARATOR = re.compile(r",(?=\s*[\w-]+\s*=)")
#: What a site can show to a rule (`Rule.looks_through`) beside what every site shows, "any".
SHOWS: dict[str, tuple[str, ...]] = {
    "scores": ("softmax", "attention"),
    "values": ("elementwise",),
    "qkv": ("elementwise",),
    "attention_out": ("elementwise",),
    "mlp_up": ("elementwise",),
    "mlp_down": ("elementwise",),
    "norm": (),
    "lm_head": ("softmax",),
}
_NEEDS = {
    "softmax": "a softmax",
    "attention": "a softmax over keys with values and places",
    "elementwise": "a function of single sums with condition numbers",
}
_SPELLING = "write accumulator+rule, for example 'ps4+strict:0.1'"


@dataclass(frozen=True)
class SitePolicy:
    """The accumulator that a site's sums are formed in, and the rule that picks what is recomputed.

    Printed and parsed as ``accumulator+rule``, for example ``ps4+strict:0.1``.
    """

    accumulate: Accumulator
    rule: Rule

    @classmethod
    def parse(cls, text: "str | SitePolicy") -> "SitePolicy":
        """Read ``accumulator+rule``; a `SitePolicy` is returned as it is.

        Raises
        ------
        ValueError
            Either part is missing or unknown.
        TypeError
            Anything but a string or a SitePolicy.
        """
        if isinstance(text, SitePolicy):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a site's policy is a string, not {type(text).__name__} {text!r}: {_SPELLING}")
        accumulate, plus, rule = text.partition("+")
        if not plus or not accumulate.strip() or not rule.strip():
            raise ValueError(f"policy {text!r} needs an accumulator and a rule: {_SPELLING}")
        return cls(Accumulator.parse(accumulate.strip()), Rule.parse(rule.strip()))

    def __str__(self) -> str:
        return f"{self.accumulate}+{self.rule}"


@dataclass(frozen=True, init=False, repr=False)
class Policy:
    """Accumulator and rule per site; sites that aren't named run in float32.

    Parameters
    ----------
    accumulate : str or Accumulator
        The accumulator of the site `scores`, for example ``"ps4"``.
    rule : str or Rule
        The rule of the site `scores`, for example ``"strict:0.1"``; nothing is recomputed by default.
    sites : mapping of str to (str or SitePolicy)
        Instead of the two above: a policy for each named site.

    Raises
    ------
    ValueError
        An unknown site, format or rule, a rule that can't see what it needs at its site, or both spellings at once,
        or neither.
    TypeError
        A part that is neither a spelling nor the object itself.
    """

    entries: tuple[tuple[str, SitePolicy], ...]

    def __init__(
        self,
        accumulate: str | Accumulator | None = None,
        rule: str | Rule = "none",
        *,
        sites: Mapping[str, str | SitePolicy] | None = None,
    ) -> None:
        if (accumulate is None) == (sites is None):
            raise ValueError("a policy needs accumulate (and rule), or sites: for example accumulate='ps4'")
        if sites is None:
            assert accumulate is not None
            sites = {"scores": SitePolicy(Accumulator.parse(accumulate), Rule.parse(rule))}
        elif str(rule) != "none":
            raise ValueError(f"rule {str(rule)!r} is given beside sites: name it within the site it is for")
        if not isinstance(sites, Mapping):
            raise TypeError(f"sites={sites!r} is no mapping: write sites={{'scores': 'ps4+strict:0.1'}}")
        if not sites:
            raise ValueError(f"a policy needs at least one site: {_SPELLING}")
        for site in sites:
            _check_site(site)
        entries = tuple((site, SitePolicy.parse(sites[site])) for site in SITES if site in sites)
        for site, policy in entries:
            _check_rule(site, policy.rule)
        object.__setattr__(self, "entries", entries)

    @classmethod
    def parse(cls, text: "str | Policy") -> "Policy":
        """Read ``ps4+strict:0.1`` (the site `scores`) or ``scores=ps4+strict:0.1, mlp_up=ps7+none``.

        Raises
        ------
        ValueError
            An unknown or repeated site, a missing ``+``, an unknown format or rule.
        TypeError
            Anything but a string or a Policy.
        """
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            given = type(text).__name__
            raise TypeError(f"a policy is a string or a Policy, not {given} {text!r}: {_SPELLING}")
        if "=" not in text:
            return cls(sites={"scores": SitePolicy.parse(text)})
        sites: dict[str, SitePolicy] = {}
        for part in _SITE_SEPARATOR.split(text):
            site, equals, policy = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise ValueError(
                    f"{part.strip()!r} in policy {text!r} names no site: write site=accumulator+rule"
                )
            _check_site(site)
            if not policy:
                raise ValueError(
                    f"site {site!r} in policy {text!r} needs an accumulator and a rule: {_SPELLING}"
                )
            if site in sites:
                raise ValueError(f"site {site!r} appears twice in policy {text!r}: give each site once")
            sites[site] = SitePolicy.parse(policy)
        return cls(sites=sites)

    @property
    def sites(self) -> dict[str, SitePolicy]:
        """The policy of each named site, as a new dictionary in the order of the forward pass."""
        return dict(self.entries)

    def __str__(self) -> str:
        if len(self.entries) == 1 and self.entries[0][0] == "scores":
            return str(self.entries[0][1])
        return ", ".join(f"{site}={policy}" for site, policy in self.entries)

    def __repr__(self) -> str:
        return f"Policy.parse({str(self)!r})"


def _check_site(site: str) -> None:
    if site in SITES:
        return
    near = difflib.get_close_matches(site.replace("-", "_"), SITES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown site {site!r}: the sites are {', '.join(SITES)}{hint}")


def _check_rule(site: str, rule: Rule) -> None:
    """Refuse a rule that needs what its site doesn't show."""
    needed = rule.looks_through
    if needed == "any" or needed in SHOWS[site]:
        return
    fitting = [s for s in SITES if needed in SHOWS[s]]
    raise ValueError(
        f"rule '{rule}' can't run at the site {site}: it looks through {_NEEDS[needed]}; it fits {', '.join(fitting)}"
    )
