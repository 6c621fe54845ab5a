"""Transformers' attention interface: whether a model uses it, its configs, and what of us runs in a model already."""

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from torchlamp.huggingface.attached_policy import SIMULATION, context_of
from torchlamp.huggingface.exact import exact_generate
from torchlamp.huggingface.lookahead_cache import NAME as DECODING
from torchlamp.huggingface.site_forwards import Forward, SimulatedForward


def uses_interface(model: nn.Module) -> bool:
    """Whether a part of a model dispatches its attention, so that it can be replaced."""
    return any(_dispatches(type(module)) for module in model.modules())


def check_interface(model: nn.Module) -> None:
    """ValueError for a model whose attention can't be replaced."""
    if not uses_interface(model):
        raise no_interface(model)


def no_interface(model: nn.Module) -> ValueError:
    """The error of a model whose attention can't be replaced."""
    return ValueError(
        f"{type(model).__name__} doesn't use transformers' attention interface (ALL_ATTENTION_FUNCTIONS), so "
        "its attention can't be replaced: choose a decoder such as Llama, Qwen, Mistral, Gemma or GPT-2"
    )


def configs(model: nn.Module) -> list[Any]:
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


def check_not_prepared(model: PreTrainedModel) -> None:
    """Refuse a model that low-bit forwards or their attention run in; the message names the call that ends it.

    Raises
    ------
    ValueError
        `prepare` has the model, or another one that was built from the same config object.
    """
    decodes = any(
        isinstance(own, Forward) and not isinstance(own, SimulatedForward) for own in _forwards(model)
    )
    if decodes or exact_generate(model) is not None:
        raise ValueError(
            "the model is prepared for low-bit decoding already: call undo() of what torchlamp.prepare returned first, "
            "or torchlamp.prepared(model).undo()"
        )
    if any(config._attn_implementation == DECODING for config in configs(model)):
        raise ValueError(_shared(DECODING))


def check_no_policy(model: PreTrainedModel) -> None:
    """Refuse a model that a simulated policy, or its attention, is in; the message names the calls that end it.

    Raises
    ------
    ValueError
        `attach` or `lookahead` have the model, or another one that was built from the same config object.
    """
    runs = any(config._attn_implementation == SIMULATION for config in configs(model))
    if context_of(model) is not None or any(isinstance(own, SimulatedForward) for own in _forwards(model)):
        then = ", then model.set_attn_implementation('sdpa')" if runs else ""
        raise ValueError(
            "the model is under a policy already: leave its block of torchlamp.lookahead, or call "
            f"torchlamp.detach(model){then}, first"
        )
    if runs:
        raise ValueError(_shared(SIMULATION))


def _forwards(model: nn.Module) -> list[Any]:
    return [vars(module).get("forward") for module in model.modules()]


def _shared(name: str) -> str:
    return (
        f"the model's config names the attention {name!r}, though nothing of this model was replaced: build it from a "
        "config of its own, copy.deepcopy(config), if another model has the same one; else call "
        "model.set_attn_implementation('sdpa')"
    )


def _dispatches(kind: type) -> bool:
    """Whether the source file of a class, or of a class it derives from, uses the attention interface."""
    # PreTrainedModel's own file defines the interface, which says nothing about the classes derived from it.
    files = {base.__module__ for base in kind.__mro__} - {PreTrainedModel.__module__}
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)
