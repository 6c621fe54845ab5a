"""`calibrate`: the statistics that a policy's transforms are fitted to, from a text of one's own."""

import torch
from torch import Tensor, nn

from torchlamp.huggingface.lookahead import under_policy
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.rules.none_all import Nothing
from torchlamp.simulation.calibration import Calibration


def calibrate(model: nn.Module, windows: Tensor, policy: str | Policy) -> Calibration:
    """Collect the statistics of a policy's operands while the model runs in float32.

        >>> calibration = torchlamp.calibrate(model, windows, "ps4.center.sort+strict:0.1")
        >>> with torchlamp.lookahead(model, "ps4.center.sort+strict:0.1", calibration=calibration): ...

    Use a text that nothing is evaluated on.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for `lookahead`.
    windows : Tensor
        int64 (n, length), as `torchlamp.data.text.cut_windows` cuts them.
    policy : str or Policy
        Statistics are collected at the sites whose part names transforms.

    Returns
    -------
    Calibration
        To be handed to `lookahead` and `evaluate`; it has `save`, `load` and `hash`.

    Raises
    ------
    ValueError
        A policy without transforms, windows of another shape, or what `lookahead` raises.
    """
    sites = {
        site: part.precision for site, part in Policy.parse(policy).sites.items() if part.precision.transforms
    }
    if not sites:
        raise ValueError(f"policy '{policy}' names no transform: there is nothing to calibrate")
    if windows.ndim != 2 or not len(windows):
        raise ValueError(f"windows has shape {tuple(windows.shape)}: give (n, length) with n >= 1")
    plain = {
        site: SitePolicy(Precision.parse("fp32").with_transforms(precision.transforms), Nothing())
        for site, precision in sites.items()
    }
    collected = Calibration()
    with under_policy(model, Policy(sites=plain), collect=collected), torch.inference_mode():
        for window in windows:
            model(input_ids=window[None].to(model.device), use_cache=False)
    return collected
