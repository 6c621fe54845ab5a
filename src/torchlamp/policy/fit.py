"""What fits which site: rules that see what they need there, operands and transforms that are exact there."""

import difflib

from torchlamp.policy.precision import Precision
from torchlamp.policy.sites import SITES
from torchlamp.rules.rule import Rule

_NEEDS = {
    "softmax": "a softmax",
    "attention": "a softmax over keys with values and places",
    "blocks": "the blocks of an attention with narrow sums",
    "elementwise": "a function of single sums with condition numbers",
    "online": "an online softmax in tiles of keys",
}


def check_site(site: str) -> None:
    """ValueError for a name that is no site's."""
    if site in SITES:
        return
    near = difflib.get_close_matches(site.replace("-", "_"), SITES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown site {site!r}: the sites are {', '.join(SITES)}{hint}")


def shows(site: str, is_stored: bool, online: bool = False) -> tuple[str, ...]:
    """What rules can look through at a site, with a stored operand or without one, with an online softmax or not."""
    return ("any", *SITES[site].look(is_stored).shows, *(("online",) if online else ()))


def check_rule(site: str, precision: Precision, rule: Rule) -> None:
    """ValueError for a rule that needs what its site doesn't show."""
    needed, is_stored = rule.looks_through, precision.is_stored
    online = bool(precision.sums.online)
    if needed in shows(site, is_stored, online) and not (needed == "blocks" and online):
        return
    if needed == "blocks" and online:
        raise ValueError(
            f"rule '{rule}' can't run at the site {site} with '{precision}', which chooses within its own tiles: name "
            "another accumulator"
        )
    if needed == "online":
        raise ValueError(
            f"rule '{rule}' can't run at the site {site} with '{precision}': it looks through {_NEEDS[needed]}; write "
            f"'lamp8+{rule}', or another accumulator with /onlineH, at the site scores"
        )
    differs = SITES[site].sums.shows != SITES[site].look(is_stored).shows
    stored = f" with the stored operand {precision.operand}" if differs else ""
    raise ValueError(
        f"rule '{rule}' can't run at the site {site}{stored}: it looks through {_NEEDS[needed]}; it fits "
        f"{', '.join(name for name in SITES if needed in shows(name, is_stored))}"
    )


def check_precision(site: str, precision: Precision) -> None:
    """ValueError for an operand or a transform that a site has no use for.

    Transforms change q and k, or weights and activations, so that their product stays what it is; the records of the
    sites say where none can.
    """
    record = SITES[site]
    if not precision.operand.is_float32 and record.stored is None:
        fitting = [name for name, other in SITES.items() if other.stored is not None]
        raise ValueError(
            f"operand '{precision.operand}' can't be used at the site {site}, which has no product of two operands; "
            f"it fits {', '.join(fitting)}"
        )
    if precision.sums.fuse is not None and record.stored is None:
        fitting = [name for name, other in SITES.items() if other.stored is not None]
        raise ValueError(
            f"accumulator '{precision.sums}' can't be used at the site {site}: a unit sums products, and nothing is "
            f"multiplied there; it fits {', '.join(fitting)}"
        )
    if precision.sums.online and record.sums.composition != "attention":
        raise ValueError(
            f"accumulator '{precision.sums}' can't be used at the site {site}, which has no softmax over keys; it fits "
            "scores"
        )
    for transform in map(str, precision.transforms):
        if not record.takes(transform, precision.is_stored):
            fitting = [name for name, other in SITES.items() if other.takes(transform, precision.is_stored)]
            stored = " with a stored operand" if record.takes(transform, False) else ""
            raise ValueError(
                f"transform '{transform}' can't be used at the site {site}{stored}; it fits {', '.join(fitting)}"
            )
