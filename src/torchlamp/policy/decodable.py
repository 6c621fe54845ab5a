"""What the decoding kernels run of the language, and the nearest of it to what they don't."""

import math
from dataclasses import dataclass

from torchlamp.arithmetic.operands import Operand
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.rules.condition import Output
from torchlamp.rules.none_all import Everything, Nothing
from torchlamp.rules.rule import NumberRule, Rule
from torchlamp.rules.running import Running
from torchlamp.rules.topz import TopZ


@dataclass(frozen=True)
class Kernel:
    """What the kernel of a site has: integers of so many bits in groups of 32, transforms, and one rule.

    Every kernel runs `none`, those with a rule `all`, too.
    """

    bits: tuple[int, ...]
    #: The rule with a threshold that suits most models; None: the copy is read as it is.
    rule: NumberRule | None
    transforms: tuple[str, ...] = ()

    def has(self, rule: Rule) -> bool:
        """Whether the kernel runs a rule; subclasses are other rules."""
        if self.rule is None:
            return isinstance(rule, Nothing)
        return type(rule) in (Nothing, Everything, type(self.rule))

    def __str__(self) -> str:
        formats = ", ".join(f"int{bits}" for bits in self.bits)
        changes = "".join(f"[.{name}]" for name in self.transforms)
        rules = "no rule" if self.rule is None else f"the rules none, {self.rule.name}:T, all"
        return f"{formats}{' with ' + changes if changes else ''} and {rules}"


@dataclass(frozen=True)
class Settings:
    """What the kernel of a site is told: the bits of a code, and what weights are compared with.

    Below a threshold of 0 everything is read in full precision, at infinity nothing.
    """

    bits: int
    threshold: float
    center: bool = False
    hadamard: bool = False


_ALL_BITS = (4, 8, 12)
#: The sites that decoding has kernels for.
KERNELS = {
    "scores": Kernel((4, 8), Running(0.001), ("center", "hadamard")),
    "values": Kernel((4, 8), TopZ(0.003)),
    "qkv": Kernel(_ALL_BITS, None),
    "attention_out": Kernel(_ALL_BITS, None),
    "mlp_up": Kernel(_ALL_BITS, Output(0.0006)),
    "mlp_down": Kernel(_ALL_BITS, Output(0.0006)),
    "lm_head": Kernel(_ALL_BITS, Running(1e-05)),
}
#: Sites that one kernel runs together: both or neither.
TOGETHER = (("scores", "values"), ("mlp_up", "mlp_down"))


def settings(policy: Policy) -> dict[str, Settings]:
    """What each site's kernel is told, in the order of the forward pass.

    Raises
    ------
    ValueError
        A part that no kernel runs; the message names it, and the nearest policy that runs.
    """
    sites = policy.sites
    told = {site: site_settings(site, part, policy) for site, part in sites.items()}
    for one, other in TOGETHER:
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
        kernel = f": allowed at {site} are {KERNELS[site]}" if site in KERNELS else ""
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
    sites = {site: _nearest(site, part) for site, part in policy.sites.items() if site in KERNELS}
    for pair in () if alone else TOGETHER:
        for one, other in (pair, pair[::-1]):
            if one in sites and other not in sites:
                sites[other] = SitePolicy(
                    Precision(sites[one].precision.operand), KERNELS[other].rule or Nothing()
                )
    return Policy(sites=sites) if sites else None


def _wrong(site: str, part: SitePolicy) -> str | None:
    """The part of a site's policy that its kernel doesn't have, in words."""
    kernel, precision = KERNELS.get(site), part.precision
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
    kernel, precision = KERNELS[site], part.precision
    block = precision.operand.block
    wanted = 8 if block is None else block.element_bits
    bits = next((b for b in kernel.bits if wanted <= b), kernel.bits[-1])
    kept = tuple(t for t in precision.transforms if str(t) in kernel.transforms)
    rule = part.rule if kernel.has(part.rule) else (kernel.rule or Nothing())
    return SitePolicy(Precision(Operand.parse(f"int{bits}"), None, kept), rule)


def _nearest_words(policy: Policy, alone: bool = False) -> str:
    found = nearest(policy, alone=alone)
    if found is None:
        return f"sites with kernels are {', '.join(KERNELS)}"
    return f"the nearest policy that runs is '{found}'"
