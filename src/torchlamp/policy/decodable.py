"""What the decoding kernels run of the language, and the nearest of it to what they don't."""

import math
from dataclasses import dataclass

from torchlamp.arithmetic.operands import Operand
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.policy.site import Kernel
from torchlamp.policy.sites import SITES
from torchlamp.rules.none_all import Nothing
from torchlamp.rules.rule import NumberRule, Rule


@dataclass(frozen=True)
class Settings:
    """What the kernel of a site is told: the bits of a code, and what weights are compared with.

    Below a threshold of 0 everything is read in full precision, at infinity nothing.
    """

    bits: int
    threshold: float
    center: bool = False
    hadamard: bool = False


def kernels() -> dict[str, Kernel]:
    """The kernel of each site that decoding has one for."""
    return {name: site.kernel for name, site in SITES.items() if site.kernel is not None}


def together() -> list[tuple[str, str]]:
    """Pairs of sites that one kernel runs together: a policy names both, or neither."""
    return [(name, site.partner) for name, site in SITES.items() if site.partner is not None]


def settings(policy: Policy) -> dict[str, Settings]:
    """What each site's kernel is told, in the order of the forward pass.

    Raises
    ------
    ValueError
        A part that no kernel runs; the message names it, and the nearest policy that runs.
    """
    sites = policy.sites
    told = {site: site_settings(site, part, policy) for site, part in sites.items()}
    for one, other in together():
        if (one in sites) != (other in sites):
            raise ValueError(
                f"sites {one} and {other} are decoded by one kernel: name both, or neither; {_nearest_words(policy)}"
            )
    return told


def site_settings(site: str, part: SitePolicy, policy: Policy | None = None) -> Settings:
    """What one site's kernel is told; ValueError as for `settings`, which hands the whole policy for its message."""
    wrong = _wrong(site, part)
    if wrong is not None:
        whole = Policy(sites={site: part}) if policy is None else policy
        kernel = f": allowed at {site} are {kernels()[site]}" if site in kernels() else ""
        raise ValueError(f"{wrong} has no decoding kernel{kernel}; {_nearest_words(whole, policy is None)}")
    precision = part.precision
    assert precision.operand.kernel_bits is not None
    return Settings(
        precision.operand.kernel_bits,
        threshold(part.rule),
        precision.has("center"),
        precision.has("hadamard"),
    )


def threshold(rule: Rule) -> float:
    """What kernels compare weights with: the rule's number, infinity for `none` and -1 for `all`."""
    if isinstance(rule, NumberRule):
        return rule.value
    return math.inf if isinstance(rule, Nothing) else -1.0


def nearest(policy: Policy, *, alone: bool = False) -> Policy | None:
    """The policy that kernels run and that comes closest; None if they know none of its sites.

    `alone` leaves out the site that one goes together with.
    """
    sites = {site: _nearest(site, part) for site, part in policy.sites.items() if site in kernels()}
    for pair in () if alone else together():
        for one, other in (pair, pair[::-1]):
            if one in sites and other not in sites:
                sites[other] = SitePolicy(
                    Precision(sites[one].precision.operand), kernels()[other].rule or Nothing()
                )
    return Policy(sites=sites) if sites else None


def _wrong(site: str, part: SitePolicy) -> str | None:
    """The part of a site's policy that its kernel doesn't have, in words."""
    kernel, precision = kernels().get(site), part.precision
    if kernel is None:
        return f"site {site} ('{site}={part}')"
    if not precision.is_stored:
        what = "accumulator" if precision.operand.is_float32 else "precision"
        name = (
            precision.sums
            if precision.operand.is_float32
            else Precision(precision.operand, precision.accumulator)
        )
        return f"{what} '{name}' at site {site}"
    if precision.operand.kernel_bits not in kernel.bits:
        return f"operand '{precision.operand}' at site {site}"
    for transform in precision.transforms:
        if str(transform) not in kernel.transforms:
            return f"transform '{transform}' at site {site}"
    return None if kernel.has(part.rule) else f"rule '{part.rule}' at site {site}"


def _nearest(site: str, part: SitePolicy) -> SitePolicy:
    kernel, precision = kernels()[site], part.precision
    block = precision.operand.block
    wanted = 8 if block is None else block.element_bits
    bits = next((b for b in kernel.bits if wanted <= b), kernel.bits[-1])
    kept = tuple(t for t in precision.transforms if str(t) in kernel.transforms)
    rule = part.rule if kernel.has(part.rule) else (kernel.rule or Nothing())
    return SitePolicy(Precision(Operand.parse(f"int{bits}"), None, kept), rule)


def _nearest_words(policy: Policy, alone: bool = False) -> str:
    found = nearest(policy, alone=alone)
    if found is None:
        return f"sites with kernels are {', '.join(kernels())}"
    return f"the nearest policy that runs is '{found}'"
