"""Hugging Face transformers: the attention implementation "lamp", and how a policy gets to a model.

Importing this module registers "lamp" as an attention implementation and as a mask form. The mask form is the
boolean one of `sdpa`: without a registered form transformers would pass no mask at all, and lose padding and
sliding windows.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from torchlamp.huggingface.attached_policy import Run, Seat, place, place_of
from torchlamp.huggingface.install import IN_ATTENTION, build
from torchlamp.huggingface.simulated_attention import lamp_attention
from torchlamp.huggingface.site_forwards import Forward, beneath, set_forward
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.policy import Policy
from torchlamp.simulation.statistics import Statistics

#: Name of the attention implementation, as in `model.set_attn_implementation("lamp")`.
NAME = "lamp"


@contextmanager
def lookahead(
    model: nn.Module,
    policy: str | Policy,
    *,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    blocks: bool = False,
) -> Iterator[Statistics]:
    """Run a model under a policy inside a `with` block.

    The sites that the policy names run in low precision, everything else in float32. On exit, also after an exception,
    the model's attention implementation (its parts' too), replaced forwards and whatever was attached before are put
    back. Blocks may be nested; the innermost policy runs, alone. No gradient flows through what a policy runs: a
    backward pass raises.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32 model. For the sites `scores` and `values` its class must use transformers' attention interface; for
        all but `scores` its modules must bear the names of Llama's, Gemma's, Phi-3's or GPT-2's.
    policy : str or Policy
        For example ``"ps4+strict:0.1"`` or ``"scores=ps4+strict:0.1, mlp_up=ps7+condition:4"``.
    seed : int
        Of the random baselines.
    layers : iterable of int, optional
        Numbers of the layers that run under the policy, from 0; the others run in float32 and count nothing. The LM
        head, which belongs to no layer, runs whenever the policy names it; the final norm belongs to the last layer.
    blocks : bool
        Also count touched blocks of scores.

    Yields
    ------
    Statistics
        What was eligible and recomputed, updated by every call of the model.

    Raises
    ------
    TypeError
        Not a transformers model, or weights of a named site that aren't float32.
    ValueError
        A model without the attention interface, an unknown policy, a site whose modules can't be found, a layer that
        isn't there.
    """
    run, forwards = _new_run(model, policy, seed, layers, blocks)
    implementations = [(config, config._attn_implementation) for config in _configs(model)]
    before = [(module, place_of(module), vars(module).get("forward")) for module in model.modules()]
    try:
        _put_in_place(model, run, forwards)
        if _in_attention(run):
            model.set_attn_implementation(NAME)  # type: ignore[operator]
            if implementations[0][0]._attn_implementation != NAME:
                raise _no_interface(model)
        yield run.statistics
    finally:
        for config, implementation in implementations:
            config._attn_implementation = implementation
        for module, seat, forward in before:
            place(module, seat)
            set_forward(module, forward)


def attach(
    model: nn.Module,
    policy: str | Policy,
    *,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    blocks: bool = False,
) -> Statistics:
    """Give a model a policy, in place of any that it has, until `detach`.

    The sites `scores` and `values` belong to the attention implementation "lamp": they run as before until
    ``model.set_attn_implementation("lamp")`` is called. All other sites run in low precision at once.

    Parameters
    ----------
    model, policy, seed, layers, blocks
        As for `lookahead`.

    Returns
    -------
    Statistics
        Updated by every call of the model under the policy.

    Raises
    ------
    TypeError, ValueError
        As for `lookahead`.
    """
    run, forwards = _new_run(model, policy, seed, layers, blocks)
    _put_in_place(model, run, forwards)
    return run.statistics


def detach(model: nn.Module) -> None:
    """Take the policy away from a model; if it runs "lamp", set another attention implementation before calling it."""
    for module in model.modules():
        place(module, None)
        _clear(module)


def _new_run(
    model: nn.Module, policy: str | Policy, seed: int, layers: Iterable[int] | None, blocks: bool
) -> tuple[Run, list[Forward]]:
    """A run and the forwards it replaces; nothing of the model is changed."""
    parsed = Policy.parse(policy)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no transformers model: pass a transformers.PreTrainedModel"
        )
    only = None if layers is None else _numbers(layers)
    run = Run(parsed.sites, Statistics(seed=seed, blocks=blocks), only)
    if _in_attention(run) and not any(_dispatches(type(module)) for module in model.modules()):
        raise _no_interface(model)
    return run, build(model, run)


def _numbers(layers: Iterable[int]) -> frozenset[int]:
    given: list[Any] = [] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    fits = all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    if not fits or isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers={layers!r}: give layer numbers in a list, for example layers=[0, 3]")
    return frozenset(given)


def _in_attention(run: Run) -> bool:
    return any(site in run.policies for site in IN_ATTENTION)


def _put_in_place(model: nn.Module, run: Run, forwards: list[Forward]) -> None:
    for module in model.modules():
        place(module, Seat(run))
        _clear(module)
    for number, layer in enumerate(Sites(model).layers):
        for module in layer.modules():
            place(module, Seat(run, number))
    for forward in forwards:
        set_forward(forward.module, forward)


def _clear(module: nn.Module) -> None:
    """Take our forward, but nobody else's, from a module."""
    if isinstance(vars(module).get("forward"), Forward):
        set_forward(module, beneath(module))


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


# It counts, and calls kernels that a compiler can't see into (transformers compiles static-cache decoding).
AttentionInterface.register(NAME, torch.compiler.disable(lamp_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, sdpa_mask)
