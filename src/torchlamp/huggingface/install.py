"""From a policy to replaced forwards: built and checked before anything of the model is changed."""

import torch
from torch import Tensor, nn

from torchlamp.huggingface.attached_policy import AttachedPolicy
from torchlamp.huggingface.residual_stream import residual_ahead
from torchlamp.huggingface.site_forwards import (
    Forward,
    LayerForward,
    LinearGroup,
    NormForward,
    Residual,
    group_forwards,
)
from torchlamp.huggingface.sites import Sites
from torchlamp.huggingface.stored_groups import StoredDown, StoredGroup, StoredHead, StoredNeurons
from torchlamp.policy.policy import SitePolicy
from torchlamp.simulation.activation import activated, gated
from torchlamp.simulation.linear import HeadVectors
from torchlamp.simulation.stored_mlp import OutputSize
from torchlamp.simulation.vocabulary import Vocabulary

#: Sites that run in the attention function; all others in replaced forwards.
IN_ATTENTION = ("scores", "values")
_RESIDUAL = ("attention_out", "mlp_down")


def build(model: nn.Module, attached: AttachedPolicy) -> list[Forward]:
    """The forwards that a run replaces, not yet in place.

    Raises
    ------
    ValueError
        The model's modules can't be found, or are of an unknown kind, or a layer number is out of range.
    TypeError
        Weights that aren't float32.
    """
    sites = Sites(model)
    named = [site for site in attached.policies if site != "scores"]
    if not sites.layers:
        inner = [site for site in named if site != "lm_head"]
        rule = attached.policies["scores"].rule if "scores" in attached.policies else None
        if rule is not None and rule.reads_residual_stream:
            raise ValueError(
                f"{type(model).__name__}: no list of decoder layers found, so rule {str(rule)!r} can't look as far as "
                "the residual stream; running looks through the softmax alone"
            )
        if inner:
            raise ValueError(
                f"{type(model).__name__}: no list of decoder layers found, so the site{'s' * (len(inner) > 1)} "
                f"{', '.join(inner)} can't run in low precision; `scores` can"
            )
        return _lm_head(sites, attached) if named else []
    outside = [n for n in sorted(attached.only or ()) if not 0 <= n < len(sites.layers)]
    if outside:
        raise ValueError(f"layers={outside}: the model has the layers 0 to {len(sites.layers) - 1}")
    forwards = _lm_head(sites, attached)
    if named:
        forwards += [LayerForward(layer, attached) for layer in sites.layers]
    for number, layer in enumerate(sites.layers):
        forwards += _layer(sites, attached, number, layer)
    return forwards


def _layer(sites: Sites, attached: AttachedPolicy, number: int, layer: nn.Module) -> list[Forward]:
    policies = {
        site: policy for site in attached.policies if (policy := attached.policy(site, number)) is not None
    }
    forwards: list[Forward] = []
    if "values" in policies and not policies["values"].precision.is_stored:
        attached.value_norms[number] = _value_norms(sites, layer)
    if "qkv" in policies:
        group = _group(attached, "qkv", number, policies["qkv"])
        group.next_function = HeadVectors(sites.head_size(layer))
        forwards += _install(sites, group, sites.qkv(layer))
    forwards += _mlp(sites, attached, number, layer, policies)
    if "mlp_down" in policies and policies["mlp_down"].precision.is_stored:
        del policies["mlp_down"]  # it looks at its own columns, not at the stream
    far = "scores" in policies and policies["scores"].rule.reads_residual_stream
    if far or "norm" in policies or any(site in policies for site in _RESIDUAL):
        forwards += _residual_stream(sites, attached, number, layer, policies)
    return forwards


def _mlp(
    sites: Sites, attached: AttachedPolicy, number: int, layer: nn.Module, policies: dict[str, SitePolicy]
) -> list[Forward]:
    """The up projection, and the down projection if it is stored."""
    up, down = policies.get("mlp_up"), policies.get("mlp_down")
    size = OutputSize() if down is not None and down.precision.is_stored else None
    forwards: list[Forward] = []
    if up is not None:
        modules, is_gated = sites.mlp_up(layer)
        phi, module = sites.activation(layer), sites.mlp_down(layer)
        if up.precision.is_stored:
            neurons = StoredNeurons(attached, "mlp_up", number, up)
            neurons.phi, neurons.gated, neurons.down = phi, is_gated, module
            neurons.size = size
            forwards += _install(sites, neurons, modules)
        else:
            group = LinearGroup(attached, "mlp_up", number, up)
            look = gated if is_gated else activated
            group.next_function = look(phi, sites.weights(module).matrix.detach().norm(dim=1))
            forwards += _install(sites, group, modules)
    if size is not None and down is not None:
        columns = StoredDown(attached, "mlp_down", number, down)
        columns.size = size
        forwards += _install(sites, columns, [sites.mlp_down(layer)])
    return forwards


def _group(attached: AttachedPolicy, site: str, number: int, policy: SitePolicy) -> LinearGroup:
    kind = StoredGroup if policy.precision.is_stored else LinearGroup
    return kind(attached, site, number, policy)


def _residual_stream(
    sites: Sites, attached: AttachedPolicy, number: int, layer: nn.Module, policies: dict[str, SitePolicy]
) -> list[Forward]:
    """The sublayers' output projections and the norms around them."""
    norms = sites.norms(layer)
    last = number + 1 == len(sites.layers)
    size = sites.weights(sites.attention_out(layer)).matrix.shape[1]
    forwards: list[Forward] = []
    streams = {"attention_out": Residual(), "mlp_down": Residual()}
    norm_policy = policies.get("norm")
    far = "scores" in policies and policies["scores"].rule.reads_residual_stream
    if far:
        attached.aheads[number] = residual_ahead(sites, layer, streams["attention_out"])
    own = (
        ("attention_out", norms.attention[1], norms.after_attention),
        ("mlp_down", norms.mlp[1], norms.after_mlp),
    )
    for site, reads, after in own:
        # A norm behind the sublayer reads the sublayer's output alone.
        wants_stream = (site in policies and after is None) or (far and site == "attention_out")
        if norm_policy is not None or wants_stream:
            stream = streams[site] if wants_stream else None
            forwards.append(
                NormForward(reads, attached, number, sites.norm(reads, size), norm_policy, stream)
            )
    if norm_policy is not None and last:
        final = sites.final_norm()
        forwards.append(NormForward(final, attached, number, sites.norm(final, size), norm_policy, None))
    if "attention_out" in policies:
        group = _group(attached, "attention_out", number, policies["attention_out"])
        following = norms.mlp if norms.after_attention is None else norms.after_attention
        group.norm = sites.norm(following[1], size)
        group.residual = streams["attention_out"] if norms.after_attention is None else None
        forwards += _install(sites, group, [sites.attention_out(layer)])
    if "mlp_down" in policies:
        group = LinearGroup(attached, "mlp_down", number, policies["mlp_down"])
        if norms.after_mlp is not None:
            following_norm = norms.after_mlp[1]
        else:
            following_norm = (
                sites.final_norm() if last else sites.norms(sites.layers[number + 1]).attention[1]
            )
            group.residual = streams["mlp_down"]
        group.norm = sites.norm(following_norm, size)
        forwards += _install(sites, group, [sites.mlp_down(layer)])
    return forwards


def _lm_head(sites: Sites, attached: AttachedPolicy) -> list[Forward]:
    policy = attached.policies.get("lm_head")
    if policy is None:
        return []
    head, softcap = sites.lm_head()
    if policy.precision.is_stored:
        return _install(sites, StoredHead(attached, "lm_head", -1, policy), [head])
    group = LinearGroup(attached, "lm_head", -1, policy)
    group.next_function = Vocabulary(softcap)
    return _install(sites, group, [head])


def _install(sites: Sites, group: LinearGroup, modules: list[nn.Module]) -> list[Forward]:
    for module in modules:
        sites.weights(module)  # refuses what can't run
    return group_forwards(modules, group)


def _value_norms(sites: Sites, layer: nn.Module) -> Tensor:
    """||W e|| of every number of every head's output, float32 (heads, value size)."""
    rows = sites.weights(sites.attention_out(layer)).matrix.detach()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.view(-1, sites.head_size(layer))
