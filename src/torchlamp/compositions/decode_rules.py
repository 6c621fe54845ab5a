"""The rules of a look-ahead store, spelled like every rule, as thresholds of its kernel."""

import math

from torchlamp.kernels.decode_types import Thresholds
from torchlamp.rules.rule import NumberRule, Rule

#: A score is recomputed where an error of its size would change the probabilities by more than 1e-5, and a value is
#: read in full where it has more than 1e-4 of the probability: 1e-3 of the output and better on keys of real models.
SCORES_RULE, VALUES_RULE, SKIP = "running:1e-5", "topz:1e-4", 2.0**-9
#: Values share the probability that the softmax gave, hence no 2 z (1 - z) for them.
_ALLOWED = {"scores": "running", "values": "topz"}


def thresholds(
    scores_rule: str | Rule = SCORES_RULE, values_rule: str | Rule = VALUES_RULE, skip: float = SKIP
) -> Thresholds:
    """What the kernel compares with.

    Parameters
    ----------
    scores_rule
        `running:T` with the error of a low-bit score in the place of a rounding error, `none` or `all`.
    values_rule
        `topz:T`, `none` or `all`; `all` leaves out nothing.
    skip
        In [0, 1): values that get at most skip / keys of the probability are left out, together less than `skip`.

    Raises
    ------
    ValueError
        A rule that can't be used here, or a share that isn't one.
    """
    if not 0.0 <= skip < 1.0:
        raise ValueError(f"skip={skip}: the share of the probability that may be left out lies in [0, 1)")
    values = _threshold("values", values_rule)
    return Thresholds(_threshold("scores", scores_rule), values, 0.0 if values < 0 else float(skip))


def _threshold(site: str, spelling: str | Rule) -> float:
    rule, allowed = Rule.parse(spelling), _ALLOWED[site]
    if rule.name == "none":
        return math.inf
    if rule.name == "all":
        return -1.0
    if rule.name != allowed or not isinstance(rule, NumberRule):
        raise ValueError(
            f"{site}_rule={str(rule)!r}: a look-ahead cache takes '{allowed}:T', 'none' or 'all' for its {site}"
        )
    return rule.value
