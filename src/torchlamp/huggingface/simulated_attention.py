"""The attention function that transformers calls under the name "lamp"."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchlamp.arithmetic.operands import Operand
from torchlamp.huggingface.attached_policy import AttachedPolicy, LayerContext, context_of
from torchlamp.huggingface.forward_only import forward_only
from torchlamp.policy.policy import SitePolicy
from torchlamp.simulation.attention import attend
from torchlamp.simulation.attention_call import AttentionCall, AttentionResult
from torchlamp.simulation.stored_attention import KeyStorage, StoredValues
from torchlamp.simulation.values import Values
from torchlamp.simulation.visibility import visibility

#: The policy of scores that no policy names: float32.
_FLOAT32 = SitePolicy.parse("fp32+none")

# Arguments that transformers hands to every attention function and that don't change its result: the window
# arrives in the mask, and the positions are already in the rotated queries and keys.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


def lamp_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "lamp", called by transformers' attention modules.

    Parameters
    ----------
    module : nn.Module
        The attention module; its model must have been given a policy.
    query, key, value : Tensor
        float32 (batch, heads, queries, size), (batch, key heads, keys, size) and (batch, key heads, keys,
        value size).
    attention_mask : Tensor or None
        bool or additive float, (batch, heads or 1, queries, keys); None: causal if the module is, all for one
        query.
    scaling : float or None
        Factor of the scores; None: 1 / sqrt(size).
    dropout : float
        Must be 0.
    **kwargs
        `softcap`, `s_aux`, `is_causal` and `position_ids` are used; arguments known to change nothing are
        ignored.

    Returns
    -------
    Tensor, None
        float32 (batch, queries, heads, value size). Attention weights are never returned: they would be a
        tensor of size queries x keys.

    Raises
    ------
    RuntimeError
        No policy is attached.
    TypeError
        Not float32, or under autocast.
    ValueError
        Dropout, or an argument that changes the result and isn't supported.
    """
    context = _context(module, query)
    _check_arguments(module, dropout, kwargs)
    attached, layer = context.attached, context.number()
    position_ids = _positions(kwargs.get("position_ids"), query)
    step = key.shape[2] if position_ids is None else int(position_ids.max()) + 1
    with torch.no_grad():
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        seen = visibility(attention_mask, shape=(*query.shape[:3], key.shape[2]), causal=bool(causal))
        call = replace(
            _call(
                attached, layer, step, query.shape[-1] ** -0.5 if scaling is None else float(scaling), value
            ),
            seen=seen,
            keys=_keys(attached, layer, key, query.shape[2]),
            moments=attached.score_moments(layer, query, key),
            ranges=attached.score_ranges(layer, query, key),
            softcap=kwargs.get("softcap") or None,
            sinks=kwargs.get("s_aux"),
        )
        result = attend(query, key, value, call)
        if result.doubt is not None:
            attached.statistics.record_doubt(layer, *result.doubt)
        positions = result.last_key if position_ids is None else position_ids
        _record(attached, layer, result, positions, value.shape)
    return forward_only(result.output, query, key, value), None


def _context(module: nn.Module, query: Tensor) -> LayerContext:
    """The context of an attention module; raises as `lamp_attention` does without one or if it can't run."""
    context = context_of(module)
    if context is None:
        raise RuntimeError(
            f"{type(module).__name__} runs the attention 'lamp' but has no policy: use "
            "torchlamp.lookahead(model, policy), or torchlamp.attach(model, policy) first (models that share "
            "one config object share the implementation, too: give each its own copy)"
        )
    # Autocast may hand over float32 queries and would run the products below in half precision.
    autocast = torch.is_autocast_enabled(query.device.type)
    if query.dtype != torch.float32 or autocast:
        raise TypeError(
            f"queries of {query.dtype}{' under autocast' if autocast else ''}: rounding is simulated from "
            "float32; load the model with dtype=torch.float32 and leave autocast off"
        )
    return context


def _call(attached: AttachedPolicy, layer: int, step: int, scaling: float, value: Tensor) -> AttentionCall:
    """The call of a layer under its policy; mask, softcap and sinks are the model's and still missing.

    Parameters
    ----------
    attached, layer
        The policy and the layer's number.
    step
        One more than the last position, for random rules.
    scaling
        Of the scores.
    value
        The values, for their calibrated mean.
    """
    scores, values = attached.policy("scores", layer), attached.policy("values", layer)
    policy = scores or _FLOAT32
    summed: Values | StoredValues | None = None
    if values is not None:
        generator, operand = attached.generator(values, "values", layer, step), values.precision.operand
        if values.precision.is_stored:
            summed = StoredValues(operand, values.rule, generator, layer)
        else:
            norms = attached.value_norms.get(layer)
            transforms, mean = values.precision.transforms, attached.value_mean(layer, value)
            summed = Values(
                values.accumulate, values.rule, norms, generator, layer, operand, transforms, mean
            )
    named = not policy.precision.is_stored
    return AttentionCall(
        accumulator=policy.accumulate,
        rule=policy.rule,
        operand=policy.precision.operand if named else Operand(),
        transforms=policy.precision.transforms if named else (),
        scaling=scaling,
        generator=attached.generator(scores, "scores", layer, step),
        values=summed,
        observe=attached.observer(layer),
        ahead=attached.aheads.get(layer),
        layer=layer,
        blocks=attached.statistics.blocks and scores is not None,
    )


def _keys(attached: AttachedPolicy, layer: int, key: Tensor, queries: int) -> KeyStorage | None:
    """How the scores of a layer read the keys (batch, key heads, keys, size); None: as they are."""
    policy = attached.policy("scores", layer)
    if policy is None or not policy.precision.is_stored:
        return None
    precision = policy.precision
    mean = attached.key_mean(layer, key, queries) if precision.has("center") else None
    return KeyStorage(precision.operand, precision.transforms, mean)


def _record(
    attached: AttachedPolicy, layer: int, result: AttentionResult, positions: Tensor, values: torch.Size
) -> None:
    """Count one call at the sites `scores` and `values`, where the policy names them."""
    statistics = attached.statistics
    scores = attached.policy("scores", layer)
    if scores is not None:
        statistics.record("scores", layer, result.selected, result.eligible, positions)
        if scores.accumulate.register is not None:
            statistics.record_overflow("scores", layer, result.overflowed, int(result.eligible.sum()))
    if result.blocks is not None:
        statistics.record_blocks(result.blocks)
    if result.tiles is not None:
        statistics.record_tiles(layer, result.tiles)
    if result.values_selected is not None:
        policy = attached.policy("values", layer)
        if policy is not None and policy.precision.is_stored:
            eligible = result.eligible[:, :: result.eligible.shape[1] // values[1]]
        else:
            eligible = (result.eligible > 0).long() * values[-1]
        statistics.record("values", layer, result.values_selected, eligible, positions)
        if policy is not None and policy.accumulate.register is not None:
            sums = int((result.eligible > 0).sum()) * values[-1]
            statistics.record_overflow("values", layer, result.values_overflowed, sums)


def _check_arguments(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise ValueError(f"{name} asks for attention dropout {dropout}: call model.eval() first")
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the attention 'lamp' never holds the weights of all keys at once; "
            "use attn_implementation='eager' to get them"
        )
    used = {"softcap", "s_aux", "is_causal"} | _HARMLESS
    unknown = sorted(key for key, value in kwargs.items() if value is not None and key not in used)
    if unknown:
        raise ValueError(
            f"{name} passes {', '.join(map(repr, unknown))} to its attention, which 'lamp' doesn't support: "
            "it may change the result"
        )


def _positions(position_ids: Any, query: Tensor) -> Tensor | None:
    """Position of each query (batch or 1, queries), or None if transformers gave none of that form."""
    fits = (
        isinstance(position_ids, Tensor)
        and position_ids.ndim == 2
        and position_ids.shape[0] in (1, query.shape[0])
        and position_ids.shape[1] == query.shape[2]
    )
    return position_ids if fits else None
