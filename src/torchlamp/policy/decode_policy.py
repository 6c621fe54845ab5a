"""What decoding reads low-bit, and which rule picks what is read in full precision: one spelling for Python and CLI."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torchlamp.policy.policy import SITES

#: Formats of low-bit copies and their bits: integers with one scale for each group of 32 numbers.
FORMATS = {"int4": 4, "int8": 8, "int12": 12}
#: Formats and rules that a site's decoding kernel has; `none` recomputes nothing and `all` everything.
_SITE_FORMATS: dict[str, tuple[str, ...]] = {
    "scores": ("int4", "int8"),
    "values": ("int4", "int8"),
    "qkv": ("int4", "int8", "int12"),
    "attention_out": ("int4", "int8", "int12"),
    "mlp_up": ("int4", "int8", "int12"),
    "mlp_down": ("int4", "int8", "int12"),
    "lm_head": ("int4", "int8", "int12"),
}
_SITE_RULES: dict[str, tuple[str, ...]] = {
    "scores": ("running",),
    "values": ("topz",),
    "qkv": (),
    "attention_out": (),
    "mlp_up": ("output",),
    "mlp_down": ("output",),
    "lm_head": ("running",),
}
#: Sites that one kernel runs together: both or neither.
_TOGETHER = (("scores", "values"), ("mlp_up", "mlp_down"))
_SPELLING = "write site=format+rule, for example 'scores=int8+running:0.01, qkv=int12'"
_INFINITY = float("inf")


@dataclass(frozen=True)
class SiteStorage:
    """The format of a site's low-bit copy, and the rule that picks what is read in full precision.

    Printed and parsed as ``format+rule``, for example ``int8+running:0.01``; ``int8`` alone is ``int8+none``.
    """

    format: str
    rule: str = "none"
    #: The rule's threshold; None for `none` and `all`.
    parameter: float | None = None

    @property
    def bits(self) -> int:
        """Bits of a code of the low-bit copy."""
        return FORMATS[self.format]

    @property
    def threshold(self) -> float:
        """What kernels compare weights with: below 0 everything is recomputed, at infinity nothing."""
        if self.parameter is not None:
            return self.parameter
        return -1.0 if self.rule == "all" else _INFINITY

    def __str__(self) -> str:
        if self.rule == "none":
            return self.format
        if self.parameter is None:
            return f"{self.format}+{self.rule}"
        short = f"{self.parameter:g}"
        return f"{self.format}+{self.rule}:{short if float(short) == self.parameter else self.parameter}"

    @classmethod
    def parse(cls, text: str, site: str) -> "SiteStorage":
        """Read ``format+rule`` for a site.

        Raises
        ------
        ValueError
            A format or rule that is unknown or that the site's kernel doesn't have, or a threshold below 0.
        """
        name, plus, rule = (part.strip() for part in text.partition("+"))
        if name not in _SITE_FORMATS[site]:
            raise ValueError(f"format {name!r} at site {site}: allowed are {', '.join(_SITE_FORMATS[site])}")
        rule, colon, parameter = (part.strip() for part in (rule if plus else "none").partition(":"))
        if rule in ("none", "all") and not colon:
            if rule == "all" and not _SITE_RULES[site]:
                raise ValueError(
                    f"rule 'all' at site {site}: its copy is read as it is; leave the site out instead"
                )
            return cls(name, rule)
        allowed = ", ".join(
            ["none", *(f"{r}:T" for r in _SITE_RULES[site]), *(["all"] if _SITE_RULES[site] else [])]
        )
        if rule not in _SITE_RULES[site]:
            raise ValueError(f"rule {rule!r} at site {site} of decoding: allowed are {allowed}")
        try:
            value = float(parameter)
        except ValueError:
            value = -1.0
        if not 0 <= value < _INFINITY:
            raise ValueError(f"threshold {parameter!r} of rule {rule} at site {site}: give a number from 0")
        return cls(name, rule, value)


@dataclass(frozen=True, init=False, repr=False)
class DecodePolicy:
    """Low-bit format and rule per site, for decoding; sites that aren't named are read in full precision.

    Parameters
    ----------
    sites : mapping of str to (str or SiteStorage)
        For example ``{"scores": "int8+running:0.01", "values": "int8+topz:0.01", "qkv": "int12"}``. `scores` and
        `values`, and `mlp_up` and `mlp_down`, go together: one kernel runs both.

    Raises
    ------
    ValueError
        An unknown site, format or rule; a site without the one that it goes together with.
    """

    entries: tuple[tuple[str, SiteStorage], ...]

    def __init__(self, sites: Mapping[str, str | SiteStorage]) -> None:
        for site in sites:
            if site not in _SITE_FORMATS:
                near = difflib.get_close_matches(site, _SITE_FORMATS, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"unknown site {site!r} of decoding: {hint}allowed are {', '.join(_SITE_FORMATS)}"
                )
        if not sites:
            raise ValueError(f"a policy needs at least one site: {_SPELLING}")
        for one, other in _TOGETHER:
            if (one in sites) != (other in sites):
                raise ValueError(f"sites {one} and {other} are decoded by one kernel: name both, or neither")
        # What is given as an object is checked, too: not every site's kernel has every format and rule.
        entries = tuple((site, SiteStorage.parse(str(sites[site]), site)) for site in SITES if site in sites)
        object.__setattr__(self, "entries", entries)

    @classmethod
    def parse(cls, text: "str | DecodePolicy") -> "DecodePolicy":
        """Read ``site=format+rule, ...``.

        Raises
        ------
        ValueError
            As the class says, or a site named twice.
        TypeError
            Anything but a string or a DecodePolicy.
        """
        if isinstance(text, DecodePolicy):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a decoding policy is a string, not {type(text).__name__} {text!r}: {_SPELLING}")
        sites: dict[str, str] = {}
        for part in text.split(","):
            site, equals, storage = (piece.strip() for piece in part.partition("="))
            if not equals or not storage:
                raise ValueError(
                    f"{part.strip()!r} in policy {text!r} names no site or no format: {_SPELLING}"
                )
            if site in sites:
                raise ValueError(f"site {site!r} is named twice in policy {text!r}")
            sites[site] = storage
        return cls(sites)

    @classmethod
    def looks_like(cls, text: str) -> bool:
        """Whether a policy's spelling is one of decoding (integers) and not one of simulation (accumulators)."""
        return any(part.partition("=")[2].strip().startswith("int") for part in text.split(","))

    @property
    def sites(self) -> dict[str, SiteStorage]:
        """Format and rule of each named site."""
        return dict(self.entries)

    def without(self, *names: str) -> "DecodePolicy":
        """The same policy with some sites left in full precision."""
        return DecodePolicy({site: storage for site, storage in self.entries if site not in names})

    def unguarded(self) -> "DecodePolicy":
        """The same low-bit copies without any look-ahead."""
        return DecodePolicy({site: SiteStorage(storage.format) for site, storage in self.entries})

    def __str__(self) -> str:
        return ", ".join(f"{site}={storage}" for site, storage in self.entries)

    def __repr__(self) -> str:
        return f"DecodePolicy.parse({str(self)!r})"
