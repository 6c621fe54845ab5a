"""Weights that accelerate keeps off the device (`device_map`): brought for as long as something reads them.

accelerate gives every module whose weights it offloads a hook, which a module's own forward calls before and after.
A replaced forward, and what is worked out from weights before a run, ask here instead.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights are elsewhere just now."""
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


@contextmanager
def present(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """The modules' own weights are on their device inside the block, and gone again behind it.

    Gives whether any had to be brought; then what was made of them must not be kept, or they stay in memory.

    Raises
    ------
    ValueError
        Weights that have no numbers, and no hook that brings them.
    """
    with ExitStack() as back:
        brought = False
        for module in dict.fromkeys(modules):
            if not is_offloaded(module):
                continue
            hook = getattr(module, "_hf_hook", None)
            if hook is None:
                raise ValueError(
                    f"{type(module).__name__}: its weights are on the meta device, and no hook of accelerate brings "
                    "them; load the model's weights, or give from_pretrained a device_map"
                )
            back.callback(hook.post_forward, module, None)
            hook.pre_forward(module)
            brought = True
        yield brought
