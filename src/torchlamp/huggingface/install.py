"""From a policy to replaced forwards: built and checked before anything of the model is changed."""

from torch import nn

from torchlamp.huggingface.attached_policy import AttachedPolicy
from torchlamp.huggingface.compositions import COMPOSITIONS
from torchlamp.huggingface.interface import uses_interface
from torchlamp.huggingface.layer_build import LayerBuild
from torchlamp.huggingface.site_forwards import Forward, LayerForward
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.sites import SITES


def build(model: nn.Module, attached: AttachedPolicy) -> list[Forward]:
    """The forwards that a run replaces, not yet in place.

    Raises
    ------
    ValueError
        The model's modules can't be found, or are of an unknown kind, or a layer number is out of range.
    TypeError
        Weights that aren't float32.
    """
    sites, layers = Sites(model), list(Sites(model).layers)
    if not layers:
        _check_no_layers(model, attached)
    outside = [n for n in sorted(attached.only or ()) if not 0 <= n < len(layers)]
    if outside and layers:
        raise ValueError(f"layers={outside}: the model has the layers 0 to {len(layers) - 1}")
    forwards = _forwards(LayerBuild(sites, attached, -1, model), in_layers=False)
    if any(site != "scores" for site in attached.policies):
        forwards += [LayerForward(layer, attached) for layer in layers]
    for number, layer in enumerate(layers):
        forwards += _forwards(LayerBuild(sites, attached, number, layer), in_layers=True)
    return forwards


def is_in_attention(attached: AttachedPolicy) -> bool:
    """Whether a site runs in the attention function; all others run in replaced forwards."""
    return any(_in_attention(site) for site in attached.policies)


def _forwards(build: LayerBuild, *, in_layers: bool) -> list[Forward]:
    for name, policy in build.policies.items():
        site = SITES[name]
        if site.place.in_layers == in_layers:
            COMPOSITIONS[site.look(policy.precision.is_stored).composition](build, site)
    return build.finish()


def _in_attention(site: str) -> bool:
    place = SITES[site].place
    return place.parent == "attention" and not place.names


def _check_no_layers(model: nn.Module, attached: AttachedPolicy) -> None:
    """ValueError for sites and rules that need to know the model's layers; scores and what it has once don't."""
    kind = type(model).__name__
    for policy in attached.policies.values():
        if policy.rule.reads_residual_stream:
            raise ValueError(
                f"{kind}: no list of decoder layers found, so rule {str(policy.rule)!r} can't look as far as the "
                "residual stream; running looks through the softmax alone"
            )
    inner = [site for site in attached.policies if site != "scores" and SITES[site].place.in_layers]
    if inner:
        raise ValueError(
            f"{kind}: no list of decoder layers found, so the site{'s' * (len(inner) > 1)} {', '.join(inner)} can't "
            "run in low precision; "
            + ("`scores` can" if uses_interface(model) else "nor can `scores`: it has no attention interface")
        )
