"""Outputs that no gradient flows through."""

from typing import Any

import torch
from torch import Tensor


def forward_only(output: Tensor, *sources: Tensor) -> Tensor:
    """The output; a backward pass through it fails, instead of giving a gradient without this part."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
        return _ForwardOnly.apply(output, *sources)  # type: ignore[no-untyped-call,no-any-return]
    return output


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *sources: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "no gradient flows through look-ahead: use it for inference, under torch.no_grad()"
        )
