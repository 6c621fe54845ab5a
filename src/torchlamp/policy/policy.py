"""What runs at which site: a precision and a rule each, in one spelling for Python, CLI, YAML and JSON."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.formats import Format
from torchlamp.policy.fit import check_precision, check_rule, check_site
from torchlamp.policy.precision import Precision
from torchlamp.policy.sites import SITES
from torchlamp.rules.none_all import Nothing
from torchlamp.rules.rule import Rule

_NOTHING = Nothing()
# A rule's parameters may hold commas, so only a comma that starts the next `site=` separates two sites.
_SITE_SEPARATOR = re.compile(r",(?=\s*[\w-]*\s*=)")
_SPELLING = (
    "write [site=][operand@]accumulator[.transform...][+rule], for example 'ps4+strict:0.1' or 'qkv=int8'"
)


@dataclass(frozen=True)
class SitePolicy:
    """How a site's sums are formed, and the rule that picks what is recomputed or read in full precision.

    Printed and parsed as ``[operand@]accumulator[.transform...][+rule]``, for example ``ps4+strict:0.1``,
    ``int8.center.hadamard+running:0.001`` or ``mxfp4@ps13/promote128``. An accumulator or a format in the place of the
    precision has float32 operands.
    """

    precision: Precision
    rule: Rule = _NOTHING

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", Precision.parse(self.precision))
        object.__setattr__(self, "rule", Rule.parse(self.rule))

    @classmethod
    def parse(cls, text: "str | SitePolicy") -> "SitePolicy":
        """Read a site's policy; a `SitePolicy` is returned as it is, and without a rule nothing is recomputed.

        Raises
        ------
        ValueError
            A part is missing or unknown.
        TypeError
            Anything but a string or a SitePolicy.
        """
        if isinstance(text, SitePolicy):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a site's policy is a string, not {type(text).__name__} {text!r}: {_SPELLING}")
        precision, plus, rule = (part.strip() for part in text.partition("+"))
        if not precision or (plus and not rule):
            lacks = "rule behind its '+'" if precision else "accumulator or operand"
            raise ValueError(f"policy {text!r} lacks the {lacks}: {_SPELLING}")
        return cls(Precision.parse(precision), Rule.parse(rule if plus else "none"))

    @property
    def needs_generator(self) -> bool:
        """Whether the rule, or the rounding of the sums, draws random numbers."""
        return self.rule.needs_generator or self.accumulate.stochastic

    @property
    def accumulate(self) -> Accumulator:
        """The accumulator; for a stored operand that of float32 sums."""
        return self.precision.sums

    def __str__(self) -> str:
        # `none` is written behind an accumulator and not behind a stored operand, as the keys of older results are.
        if self.precision.is_stored and isinstance(self.rule, Nothing):
            return str(self.precision)
        return f"{self.precision}+{self.rule}"


@dataclass(frozen=True, init=False, repr=False)
class Policy:
    """Precision and rule per site; sites that aren't named run in float32.

    Parameters
    ----------
    accumulate : str, Accumulator, Format or Precision
        The precision of the site `scores`, for example ``"ps4"`` or ``"ps4.center.sort"``.
    rule : str or Rule
        The rule of the site `scores`, for example ``"strict:0.1"``; nothing is recomputed by default.
    sites : mapping of str to (str or SitePolicy)
        Instead of the two above: a policy for each named site.

    Raises
    ------
    ValueError
        An unknown site, format or rule, a rule that can't see what it needs at its site, an operand or transform that
        doesn't fit there, or both spellings at once, or neither.
    TypeError
        A part that is neither a spelling nor the object itself.
    """

    entries: tuple[tuple[str, SitePolicy], ...]

    def __init__(
        self,
        accumulate: str | Accumulator | Format | Precision | None = None,
        rule: str | Rule = "none",
        *,
        sites: Mapping[str, str | SitePolicy] | None = None,
    ) -> None:
        if (accumulate is None) == (sites is None):
            raise ValueError("a policy needs accumulate (and rule), or sites: for example accumulate='ps4'")
        if sites is None:
            assert accumulate is not None
            sites = {"scores": SitePolicy(Precision.parse(accumulate), Rule.parse(rule))}
        elif str(rule) != "none":
            raise ValueError(f"rule {str(rule)!r} is given beside sites: name it within the site it is for")
        if not isinstance(sites, Mapping):
            raise TypeError(f"sites={sites!r} is no mapping: write sites={{'scores': 'ps4+strict:0.1'}}")
        if not sites:
            raise ValueError(f"a policy needs at least one site: {_SPELLING}")
        for site in sites:
            check_site(site)
        entries = tuple((site, SitePolicy.parse(sites[site])) for site in SITES if site in sites)
        for site, policy in entries:
            check_precision(site, policy.precision)
            check_rule(site, policy.precision, policy.rule)
        object.__setattr__(self, "entries", entries)

    @classmethod
    def parse(cls, text: "str | Policy") -> "Policy":
        """Read ``ps4+strict:0.1`` (the site `scores`) or ``scores=ps4+strict:0.1, mlp_up=int8``.

        Raises
        ------
        ValueError
            An unknown or repeated site, an unknown operand, accumulator, transform or rule.
        TypeError
            Anything but a string or a Policy.
        """
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            given = type(text).__name__
            raise TypeError(f"a policy is a string or a Policy, not {given} {text!r}: {_SPELLING}")
        sites: dict[str, SitePolicy] = {}
        for part in _SITE_SEPARATOR.split(text):
            site, equals, policy = (piece.strip() for piece in part.partition("="))
            if not equals:
                site, policy = "scores", site
            check_site(site)
            if not policy:
                where = f"site {site!r} in policy {text!r}" if equals else f"policy {text!r}"
                raise ValueError(f"{where} needs an accumulator or an operand: {_SPELLING}")
            if site in sites:
                raise ValueError(f"site {site!r} appears twice in policy {text!r}: give each site once")
            sites[site] = SitePolicy.parse(policy)
        return cls(sites=sites)

    @property
    def sites(self) -> dict[str, SitePolicy]:
        """The policy of each named site, as a new dictionary in the order of the forward pass."""
        return dict(self.entries)

    @property
    def has_stored(self) -> bool:
        """Whether a site has a stored operand, which only decoding kernels can really read."""
        return any(policy.precision.is_stored for _, policy in self.entries)

    def without(self, *names: str) -> "Policy":
        """The same policy with some sites left in full precision. ValueError if none is left."""
        return Policy(sites={site: policy for site, policy in self.entries if site not in names})

    def unguarded(self) -> "Policy":
        """The same precisions without any look-ahead: every rule is `none`."""
        return Policy(sites={site: SitePolicy(policy.precision) for site, policy in self.entries})

    def __str__(self) -> str:
        if len(self.entries) == 1 and self.entries[0][0] == "scores":
            return str(self.entries[0][1])
        return ", ".join(f"{site}={policy}" for site, policy in self.entries)

    def __repr__(self) -> str:
        return f"Policy.parse({str(self)!r})"
