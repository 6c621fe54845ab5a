"""Rounding noise: how far a result moves when every number of a forward pass moves by a unit in the last place.

Two correct kernels differ in last bits: in the order of a float32 sum, or in an exponential. A narrow accumulator makes
such a difference a step of its own grid in a few entries, so the KL of a low-precision run differs between machines by
more than float32's precision. `moved` draws one such difference at random; `torchlamp.evaluate` repeats its runs in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def move_last_bits(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each number moved to the float32 number before it or after it, or not at all, each with probability 1/3.

    Parameters
    ----------
    x : Tensor
        float32, of any shape, on any device.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    float32 of the same shape. 0 and what is not finite stay what they are, and nothing becomes infinite.
    """
    step = torch.randint(-1, 2, x.shape, generator=generator, dtype=torch.int32).to(x.device)
    # Neighbours of one sign have neighbouring bit patterns.
    neighbour = (x.contiguous().view(torch.int32) + step).view(torch.float32)
    return torch.where((x != 0) & x.isfinite() & neighbour.isfinite(), neighbour, x)


@contextmanager
def moved(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Within the block, what each innermost module of the model returns has its last bits moved by `move_last_bits`.

    Innermost modules are those without children: the embedding, norms, linear maps and activations, of every layer.
    The output embedding, after which nothing is rounded, is left out; so are outputs that aren't float32 tensors.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in float32.
    generator : torch.Generator
        On the CPU; draws on with every module that runs.
    """

    def move(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor) and output.dtype == torch.float32:
            return move_last_bits(output, generator)
        return None

    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    innermost = [m for m in model.modules() if next(m.children(), None) is None and m is not outputs]
    hooks = [module.register_forward_hook(move) for module in innermost]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
