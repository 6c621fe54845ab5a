"""`calibrate`: what a policy's transforms and Tender's tables are fitted to, from a text of one's own."""

import logging

import torch
from torch import Tensor, nn

from torchlamp.huggingface.lookahead import under_policy
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.rules.none_all import Nothing
from torchlamp.simulation.calibration import Calibration

logger = logging.getLogger("torchlamp.calibrate")
#: Vectors that statistics need: the mean of one is that vector, and nothing is left of it.
FEWEST_VECTORS = 2


def calibrate(model: nn.Module, windows: Tensor, policy: str | Policy) -> Calibration:
    """Collect the statistics of a policy's operands while the model runs in float32.

        >>> calibration = torchlamp.calibrate(model, windows, "ps4.center.sort+strict:0.1")
        >>> with torchlamp.lookahead(model, "ps4.center.sort+strict:0.1", calibration=calibration): ...

    Use a text that nothing is evaluated on. Second moments of K channels (`balance`) want more than K tokens: with
    fewer a warning says so, and the regularisation decides about the directions that the text doesn't show.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for `lookahead`.
    windows : Tensor
        int64 (n, length), as `torchlamp.data.text.cut_windows` cuts them.
    policy : str or Policy
        Statistics are collected at the sites whose part names transforms, and at those with Tender's operand the ranges
        of each chunk of 256 rows; windows as long as what is run later have all its chunks. (The probabilities at
        `values` are grouped by their own ranges always.)

    Returns
    -------
    Calibration
        To be handed to `lookahead` and `evaluate`; it has `save`, `load` and `hash`.

    Raises
    ------
    ValueError
        A policy without transforms, windows of another shape, a text too short (or without finite numbers at a site),
        or what `lookahead` raises.
    """
    sites = {
        site: part.precision
        for site, part in Policy.parse(policy).sites.items()
        if part.precision.transforms or (part.precision.operand.is_tender and site != "values")
    }
    if not sites:
        raise ValueError(f"policy '{policy}' names no transform: there is nothing to calibrate")
    ranged = frozenset(site for site, precision in sites.items() if precision.operand.is_tender)
    for site in ranged:
        if sites[site].transforms:
            raise ValueError(
                f"'{sites[site]}' at site {site}: Tender's ranges can't be calibrated together with transforms; leave "
                "out one of them, or the calibration"
            )
    if windows.ndim != 2 or not len(windows):
        raise ValueError(f"windows has shape {tuple(windows.shape)}: give (n, length) with n >= 1")
    plain = {
        site: SitePolicy(Precision.parse("fp32").with_transforms(precision.transforms), Nothing())
        for site, precision in sites.items()
    }
    collected = Calibration(ranged=ranged)
    with under_policy(model, Policy(sites=plain), collect=collected), torch.inference_mode():
        for window in windows:
            model(input_ids=window[None].to(model.device), use_cache=False)
    collected.ranged = frozenset()
    _check_long_enough(collected, sites, windows.numel())
    return collected


def _check_long_enough(collected: Calibration, sites: dict[str, Precision], tokens: int) -> None:
    """Refuse statistics of next to nothing (ValueError), and warn where second moments are singular."""
    few: list[str] = []
    for site, layer, (vectors, channels) in collected.sizes():
        if vectors < FEWEST_VECTORS:
            known = f"{_count(vectors, 'finite vector')} of {_count(tokens, 'token')}"
            raise ValueError(
                f"the text is too short to calibrate: {known} at "
                f"site {site}, layer {layer}; give windows of a few hundred tokens"
            )
        needy = [str(t) for t in sites[site.partition("/")[0]].transforms if t.needs_products]
        if needy and vectors < channels:
            few.append(f"{needy[0]} at {site} has {vectors} vectors for {channels} channels")
    if few:
        logger.warning(
            "singular second moments: %s; they are regularised, but a longer text tells more (%d tokens now)",
            "; ".join(dict.fromkeys(few)),
            tokens,
        )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
