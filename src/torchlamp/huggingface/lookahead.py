"""Hugging Face transformers: the attention implementation "lamp", and how a policy gets to a model.

Importing this module registers "lamp" as an attention implementation and as a mask form. The mask form is the
boolean one of `sdpa`: without a registered form transformers would pass no mask at all, and lose padding and
sliding windows.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from torchlamp.huggingface.attached_policy import (
    SIMULATION,
    AttachedPolicy,
    LayerContext,
    Observer,
    context_of,
    set_context,
)
from torchlamp.huggingface.install import build, is_in_attention
from torchlamp.huggingface.interface import check_interface, check_not_prepared, configs, no_interface
from torchlamp.huggingface.simulated_attention import lamp_attention
from torchlamp.huggingface.site_forwards import Forward, SimulatedForward, own_forward, set_forward
from torchlamp.huggingface.sites import Sites
from torchlamp.huggingface.widening import Widening, widened
from torchlamp.policy.policy import Policy
from torchlamp.simulation.calibration import Calibration
from torchlamp.simulation.statistics import Statistics

#: Name of the attention implementation, as in `model.set_attn_implementation("lamp")`.
NAME = SIMULATION


@dataclass(frozen=True)
class _How:
    """The keyword arguments that `lookahead` and `attach` share."""

    seed: int
    layers: Iterable[int] | None
    blocks: bool
    observe: Observer | None
    observe_layers: Iterable[int] | None
    calibration: Calibration | None = None
    #: Where the statistics of the transforms' operands are put.
    collect: Calibration | None = None


@contextmanager
def lookahead(
    model: nn.Module,
    policy: str | Policy,
    *,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    blocks: bool = False,
    observe: Observer | None = None,
    observe_layers: Iterable[int] | None = None,
    calibration: Calibration | None = None,
) -> Iterator[Statistics]:
    """Run a model under a policy inside a `with` block.

    The sites that the policy names run in low precision, everything else in float32. On exit, also after an exception,
    the model's attention implementation (its parts' too), replaced forwards and whatever was attached before are put
    back. Blocks may be nested; the innermost policy runs, alone. No gradient flows through what a policy runs: a
    backward pass raises.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32 model, or a bfloat16 or float16 one, which is widened exactly for the block. For the sites `scores`
        and `values` its class must use transformers' attention interface; for all but `scores` its modules must bear
        the names of Llama's, Gemma's, Phi-3's or GPT-2's.
    policy : str or Policy
        For example ``"ps4+strict:0.1"``, ``"scores=ps4+strict:0.1, mlp_up=ps7+condition:4"``, or a policy with stored
        operands such as ``"mlp_up=int8+output:0.001"``, whose rows all read what a step of decoding would read.
    seed : int
        Of the random baselines.
    layers : iterable of int, optional
        Numbers of the layers that run under the policy, from 0; the others run in float32 and count nothing. The LM
        head, which belongs to no layer, runs whenever the policy names it; the final norm belongs to the last layer.
    blocks : bool
        Also count touched blocks of scores.
    observe : callable, optional
        Called as ``observe(layer, observation)`` with every tile of attention scores
        (`torchlamp.simulation.attention_call.Observation`). Observed layers run tile by tile, without the fused kernel.
    observe_layers : iterable of int, optional
        Numbers of the layers that are observed; all if not given.
    calibration : Calibration, optional
        Statistics that transforms are fitted to, from `torchlamp.calibrate`; without it, those of each call's own
        operands. Stored keys take their mean from the start of the sequence in any case, as a look-ahead cache does.

    Yields
    ------
    Statistics
        What was eligible and recomputed, updated by every call of the model.

    Raises
    ------
    TypeError
        Not a transformers model, or weights of a named site that aren't float32.
    ValueError
        A model without the attention interface, or prepared for low-bit decoding; an unknown policy, a site whose
        modules can't be found, a layer that isn't there.
    """
    how = _How(seed, layers, blocks, observe, observe_layers, calibration)
    with _attached_within(model, policy, how) as attached:
        yield attached.statistics


@contextmanager
def under_policy(model: nn.Module, policy: Policy, *, collect: Calibration) -> Iterator[None]:
    """`lookahead` that collects the statistics of the operands of all transforms."""
    with _attached_within(model, policy, _How(0, None, False, None, None, None, collect)):
        yield


@contextmanager
def _attached_within(model: nn.Module, policy: str | Policy, how: _How) -> Iterator[AttachedPolicy]:
    """A policy attached for the duration of a block."""
    with widened(model):
        attached, forwards = _new_attached(model, policy, how)
        implementations = [(config, config._attn_implementation) for config in configs(model)]
        before = [(module, context_of(module), vars(module).get("forward")) for module in model.modules()]
        try:
            _put_in_place(model, attached, forwards)
            if is_in_attention(attached):
                model.set_attn_implementation(NAME)  # type: ignore[operator]
                if implementations[0][0]._attn_implementation != NAME:
                    raise no_interface(model)
            yield attached
        finally:
            for config, implementation in implementations:
                config._attn_implementation = implementation
            for module, context, forward in before:
                set_context(module, context)
                set_forward(module, forward)


def attach(
    model: nn.Module,
    policy: str | Policy,
    *,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    blocks: bool = False,
    observe: Observer | None = None,
    observe_layers: Iterable[int] | None = None,
    calibration: Calibration | None = None,
) -> Statistics:
    """Give a model a policy, in place of any that it has, until `detach`.

    The sites `scores` and `values` belong to the attention implementation "lamp": they run as before until
    ``model.set_attn_implementation("lamp")`` is called. All other sites run in low precision at once.

    Parameters
    ----------
    model, policy, seed, layers, blocks, observe, observe_layers, calibration
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
    how = _How(seed, layers, blocks, observe, observe_layers, calibration)
    before = _attached_to(model)
    widening = Widening(model)
    try:
        attached, forwards = _new_attached(model, policy, how)
    except BaseException:
        widening.undo()
        raise
    # A policy in the place of another keeps the weights widened: they are given back by `detach`.
    attached.widening = widening if before is None or before.widening is None else before.widening
    _put_in_place(model, attached, forwards)
    return attached.statistics


def detach(model: nn.Module) -> None:
    """Take the policy away from a model; if it runs "lamp", set another attention implementation before calling it.

    Weights that `attach` widened to float32 are what they were.
    """
    attached = _attached_to(model)
    for module in model.modules():
        set_context(module, None)
        _clear(module)
    if attached is not None and attached.widening is not None:
        attached.widening.undo()


def _attached_to(model: nn.Module) -> AttachedPolicy | None:
    """The policy that is attached to a model, if there is one."""
    context = context_of(model) if isinstance(model, nn.Module) else None
    return None if context is None else context.attached


def _new_attached(model: nn.Module, policy: str | Policy, how: _How) -> tuple[AttachedPolicy, list[Forward]]:
    """A policy for a model and the forwards that it replaces; nothing of the model is changed."""
    parsed = Policy.parse(policy)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no transformers model: pass a transformers.PreTrainedModel"
        )
    check_not_prepared(model)
    attached = AttachedPolicy(
        parsed.sites,
        Statistics(seed=how.seed, blocks=how.blocks),
        _numbers("layers", how.layers),
        observe=how.observe,
        observe_layers=_numbers("observe_layers", how.observe_layers),
        calibration=how.calibration,
        collect=how.collect,
    )
    if is_in_attention(attached):
        check_interface(model)
    return attached, build(model, attached)


def check_untouched(model: nn.Module) -> None:
    """Refuse a model that can't be a float32 reference, because a policy runs in it or it is prepared (ValueError)."""
    if not isinstance(model, PreTrainedModel):
        return
    check_not_prepared(model)
    forwards = (vars(module).get("forward") for module in model.modules())
    if any(isinstance(own, SimulatedForward) for own in forwards):
        raise ValueError(
            "a policy is attached to the model, so it is no float32 reference: call torchlamp.detach(model) first"
        )
    if any(config._attn_implementation == NAME for config in configs(model)):
        raise ValueError(
            "the model already runs under 'lamp': call its set_attn_implementation('sdpa'), so that it can be the "
            "reference"
        )


def _numbers(name: str, layers: Iterable[int] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    given: list[Any] = [] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    fits = all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    if not fits or isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"{name}={layers!r}: give layer numbers in a list, for example {name}=[0, 3]")
    return frozenset(given)


def _put_in_place(model: nn.Module, attached: AttachedPolicy, forwards: list[Forward]) -> None:
    for module in model.modules():
        set_context(module, LayerContext(attached))
        _clear(module)
    for number, layer in enumerate(Sites(model).layers):
        for module in layer.modules():
            set_context(module, LayerContext(attached, number))
    for forward in forwards:
        set_forward(forward.module, forward)


def _clear(module: nn.Module) -> None:
    """Take our forward, but nobody else's, from a module."""
    if isinstance(vars(module).get("forward"), SimulatedForward):
        set_forward(module, own_forward(module))


# It counts, and calls kernels that a compiler can't see into (transformers compiles static-cache decoding).
AttentionInterface.register(NAME, torch.compiler.disable(lamp_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, sdpa_mask)
