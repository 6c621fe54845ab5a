"""What fits which site: the rules that see what they need there, and the transforms that are exact there."""

import difflib

from torchlamp.policy.precision import Precision
from torchlamp.rules.rule import Rule
from torchlamp.site_names import SITES

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
#: The same where the operand is stored and what is repaired is not a sum but a term of it: a key's value is chosen
#: by what the softmax in front of it says.
SHOWS_TERMS: dict[str, tuple[str, ...]] = {**SHOWS, "values": ("softmax",)}
_NEEDS = {
    "softmax": "a softmax",
    "attention": "a softmax over keys with values and places",
    "elementwise": "a function of single sums with condition numbers",
}
#: Sites whose product is of two operands that can be stored, and those whose operands can be changed exactly.
_PRODUCTS = tuple(site for site in SITES if site != "norm")
_CHANGED = tuple(site for site in _PRODUCTS if site != "values")


def check_site(site: str) -> None:
    """ValueError for a name that is no site's."""
    if site in SITES:
        return
    near = difflib.get_close_matches(site.replace("-", "_"), SITES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown site {site!r}: the sites are {', '.join(SITES)}{hint}")


def check_rule(site: str, precision: Precision, rule: Rule) -> None:
    """ValueError for a rule that needs what its site doesn't show."""
    shows = SHOWS_TERMS if precision.is_stored else SHOWS
    needed = rule.looks_through
    if needed == "any" or needed in shows[site]:
        return
    fitting = [s for s in SITES if needed in shows[s]]
    stored = (
        f" with the stored operand {precision.operand}" if precision.is_stored and site == "values" else ""
    )
    raise ValueError(
        f"rule '{rule}' can't run at the site {site}{stored}: it looks through {_NEEDS[needed]}; it fits "
        f"{', '.join(fitting)}"
    )


def check_precision(site: str, precision: Precision) -> None:
    """ValueError for an operand or a transform that a site has no use for.

    Transforms change q and k, or weights and activations, so that their product stays what it is. The probabilities
    of `values` are no such side (they come out of a softmax, key by key), and a norm sums one number after the other.
    """
    if not precision.operand.is_float32 and site not in _PRODUCTS:
        raise ValueError(
            f"operand '{precision.operand}' can't be used at the site {site}, which has no product of two operands; "
            f"it fits {', '.join(_PRODUCTS)}"
        )
    if precision.sums.fuse is not None and site not in _PRODUCTS:
        raise ValueError(
            f"accumulator '{precision.sums}' can't be used at the site {site}, where nothing is multiplied: a unit sums "
            f"products; it fits {', '.join(_PRODUCTS)}"
        )
    if precision.transforms and site not in _CHANGED:
        raise ValueError(
            f"transform '{precision.transforms[0]}' can't be used at the site {site}; it fits {', '.join(_CHANGED)}"
        )
