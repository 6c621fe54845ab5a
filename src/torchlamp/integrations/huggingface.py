"""Hugging Face transformers: the attention implementation "lamp", and how a policy gets to a model.

Importing this module registers "lamp" as an attention implementation and as a mask form. The mask form is the
boolean one of `sdpa`: without a registered form transformers would pass no mask at all, and lose padding and
sliding windows.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from torchlamp.compositions.policy import Policy
from torchlamp.compositions.statistics import Statistics
from torchlamp.integrations.lamp_attention import Run, Seat, lamp_attention, place, place_of

#: Name of the attention implementation, as in `model.set_attn_implementation("lamp")`.
NAME = "lamp"


@contextmanager
def lookahead(model: nn.Module, policy: str | Policy, *, seed: int = 0) -> Iterator[Statistics]:
    """Run a model's attention under a policy inside a `with` block.

    On exit, also after an exception, the model's attention implementation (its parts' too) and whatever was
    attached before are put back. Blocks may be nested; the innermost policy runs. No gradient flows through
    the attention: a backward pass raises.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32 model whose class uses transformers' attention interface.
    policy : str or Policy
        For example ``"ps4+strict:0.1"``; this version runs the site `scores`.
    seed : int
        Of the random baselines.

    Yields
    ------
    Statistics
        What was eligible and recomputed, updated by every call of the model.

    Raises
    ------
    TypeError
        Not a transformers model.
    ValueError
        A model without the attention interface, an unknown policy, or a site that this version doesn't run.
    """
    run = _new_run(model, policy, seed)
    implementations = [(config, config._attn_implementation) for config in _configs(model)]
    seats = [(module, place_of(module)) for module in model.modules()]
    try:
        _seat(model, run)
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        if implementations[0][0]._attn_implementation != NAME:
            raise _no_interface(model)
        yield run.statistics
    finally:
        for config, implementation in implementations:
            config._attn_implementation = implementation
        for module, seat in seats:
            place(module, seat)


def attach(model: nn.Module, policy: str | Policy, *, seed: int = 0) -> Statistics:
    """Give a model a policy for its implementation "lamp", in place of any policy it has.

    The model runs as before until ``model.set_attn_implementation("lamp")`` is called.

    Parameters
    ----------
    model, policy, seed
        As for `lookahead`.

    Returns
    -------
    Statistics
        Updated by every call of the model under "lamp".

    Raises
    ------
    TypeError, ValueError
        As for `lookahead`.
    """
    run = _new_run(model, policy, seed)
    _seat(model, run)
    return run.statistics


def detach(model: nn.Module) -> None:
    """Take the policy away from a model; set another attention implementation before calling it again."""
    for module in model.modules():
        place(module, None)


def _new_run(model: nn.Module, policy: str | Policy, seed: int) -> Run:
    parsed = Policy.parse(policy)
    other = [site for site in parsed.sites if site != "scores"]
    if other:
        raise ValueError(f"policy {str(parsed)!r} names {', '.join(other)}: this version runs 'scores' only")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no transformers model: pass a transformers.PreTrainedModel"
        )
    if not any(_dispatches(type(module)) for module in model.modules()):
        raise _no_interface(model)
    return Run(parsed.sites["scores"], Statistics(seed=seed))


def _dispatches(kind: type) -> bool:
    """Whether the source file of a class, or of a class it derives from, uses the attention interface."""
    # PreTrainedModel's own file defines the interface, which says nothing about the classes derived from it.
    files = {base.__module__ for base in kind.__mro__} - {PreTrainedModel.__module__}
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


def _no_interface(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} doesn't use transformers' attention interface (ALL_ATTENTION_FUNCTIONS), so "
        "its attention can't be replaced: choose a decoder such as Llama, Qwen, Mistral, Gemma or GPT-2"
    )


def _configs(model: nn.Module) -> list[Any]:
    """Every config of a model and of its parts, once each, outer ones before those inside."""
    found: dict[int, Any] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            waiting += [part for part in inner if part is not None]
    return list(found.values())


def _seat(model: nn.Module, run: Run) -> None:
    for module in model.modules():
        place(module, Seat(run))


# It counts, and calls kernels that a compiler can't see into (transformers compiles static-cache decoding).
AttentionInterface.register(NAME, torch.compiler.disable(lamp_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, sdpa_mask)
