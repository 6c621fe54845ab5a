"""Rounding tensors to a format."""

import torch
from torch import Tensor

from torchlamp.arithmetic.formats import Format
from torchlamp.kernels.rounding import MODES, Mode, round_to_grid

_WIDENED = (torch.float16, torch.bfloat16)


def round_to(
    x: Tensor,
    format: str | torch.dtype | Format,
    mode: Mode = "nearest_even",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round every entry of a tensor to a format.

    Parameters
    ----------
    x
        float32, or float16 and bfloat16, which float32 holds exactly; any shape, any device.
    format
        A format, its name, or a torch type such as `torch.bfloat16`, see `Format`.
    mode
        "nearest_even"; "toward_zero", with which no finite number overflows; "stochastic": to the neighbour
        above or below with the probability that makes the expectation exact.
    generator
        The source of "stochastic"'s random bits, and needed by it.

    Returns
    -------
    A new float32 tensor of the shape of `x`. NaN stays NaN; infinity stays infinity, unless the format
    saturates (then its largest number) or has none (then NaN).

    Raises
    ------
    TypeError
        For anything but a tensor, and for another dtype: rounding float64 to float32 first would round twice.
    ValueError
        For an unknown format or mode, a missing generator, or a gradient that would be needed.
    """
    target = Format.parse(format)
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; allowed: {', '.join(MODES)}")
    check_tensor("round_to", x)
    check_no_gradient("round_to", x)
    x = x.detach()
    if x.dtype in _WIDENED:
        x = x.float()
    elif x.dtype == torch.float64:
        raise TypeError(
            "round_to takes float32, float16 or bfloat16, got torch.float64: "
            "going through float32 would round twice; convert with .float() yourself if that is what you mean"
        )
    elif x.dtype != torch.float32:
        raise TypeError(f"round_to takes float32, float16 or bfloat16, got {x.dtype}: convert with .float()")
    rounded = round_to_grid(x, target.grid, mode, generator)
    return rounded.clone() if rounded is x else rounded


def check_tensor(function: str, *given: object) -> None:
    """Refuse what isn't a tensor, with a word on how to make one."""
    for value in given:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{function} takes torch tensors, got {type(value).__name__}: convert with torch.as_tensor"
            )


def check_no_gradient(function: str, *tensors: Tensor) -> None:
    """Refuse tensors whose gradient would silently be lost."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            f"{function} has no gradient and its input requires one: "
            "call it inside torch.no_grad() or torch.inference_mode(), or pass tensor.detach()"
        )
