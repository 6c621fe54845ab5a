"""What follows the sums of a site, and runs them in the simulation: one function for each composition f(g(x)).

A function takes the layer that is being built and the record of a site that the policy names there, and adds the
forwards that its modules run.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchlamp.huggingface.layer_build import LayerBuild
from torchlamp.huggingface.offloaded import present
from torchlamp.huggingface.residual_stream import residual_ahead
from torchlamp.huggingface.site_forwards import LinearGroup
from torchlamp.huggingface.sites import Sites
from torchlamp.huggingface.stored_groups import StoredDown, StoredGroup, StoredHead, StoredNeurons
from torchlamp.policy.site import Site
from torchlamp.policy.sites import SITES
from torchlamp.simulation.activation import activated, gated
from torchlamp.simulation.linear import HeadVectors
from torchlamp.simulation.vocabulary import Vocabulary


def attention(build: LayerBuild, site: Site) -> None:
    """Scores into the softmax run in the attention function; some rules look as far as the residual stream."""
    if build.policies[site.name].rule.reads_residual_stream:
        stream = build.residual(site.place.parent)
        build.attached.aheads[build.number] = residual_ahead(build.sites, build.module, stream)


def values(build: LayerBuild, site: Site) -> None:
    """Sums of values run in the attention function; a value counts as the output projection weights it."""
    build.attached.value_norms[build.number] = _value_norms(build.sites, build.module)


def stored_values(build: LayerBuild, site: Site) -> None:
    """Stored values run in the attention function, and are chosen by the softmax in front of them."""


def heads(build: LayerBuild, site: Site) -> None:
    """A linear layer whose outputs are read as vectors of one head each."""
    group = _group(build, site)
    group.next_function = HeadVectors(build.sites.head_size(build.module))
    build.install(site, group)


def stream(build: LayerBuild, site: Site) -> None:
    """The last projection of a sublayer, added to the residual stream, which the next norm reads.

    A norm behind the sublayer reads the projection's output alone.
    """
    group = _group(build, site)
    after = build.norm_after(site.place.parent)
    group.norm = build.sites.norm(build.next_norm(site.place.parent) if after is None else after[1])
    group.residual = build.residual(site.place.parent) if after is None else None
    build.install(site, group)


def activation(build: LayerBuild, site: Site) -> None:
    """Up projection, and gate if there is one, into the activation; a number counts as the down projection reads it."""
    group = LinearGroup(build.attached, site.name, build.number, build.policies[site.name])
    build.install(site, group)
    down = _down(build, site)
    with present([down]):
        norms = build.sites.weights(down).matrix.detach().norm(dim=1)
    look = gated if build.sites.is_gated(build.module) else activated
    group.next_function = look(build.sites.activation(build.module), norms)


def neurons(build: LayerBuild, site: Site) -> None:
    """The same of stored weights: a rule picks neurons, whose rows are read in full."""
    group = StoredNeurons(build.attached, site.name, build.number, build.policies[site.name])
    build.install(site, group)
    group.phi = build.sites.activation(build.module)
    group.gated, group.down = build.sites.is_gated(build.module), _down(build, site)
    policy = build.policies.get(site.partner or "")
    group.size = build.size if policy is not None and policy.precision.is_stored else None


def columns(build: LayerBuild, site: Site) -> None:
    """A stored down projection: a rule picks columns, by the size of the output that the MLP has so far."""
    group = StoredDown(build.attached, site.name, build.number, build.policies[site.name])
    group.size = build.size
    build.install(site, group)


def norm(build: LayerBuild, site: Site) -> None:
    """The sum that a norm reads."""
    build.norm_policy = build.policies[site.name]


def vocabulary(build: LayerBuild, site: Site) -> None:
    """A linear layer into a softmax over its outputs."""
    group = _group(build, site)
    group.next_function = Vocabulary(build.softcap(site))
    build.install(site, group)


def top(build: LayerBuild, site: Site) -> None:
    """The stored output embedding: the largest logit is that of full precision."""
    build.install(site, StoredHead(build.attached, site.name, build.number, build.policies[site.name]))


#: By the names that the records of sites use.
COMPOSITIONS: dict[str, Callable[[LayerBuild, Site], None]] = {
    "attention": attention,
    "values": values,
    "stored values": stored_values,
    "heads": heads,
    "stream": stream,
    "activation": activation,
    "neurons": neurons,
    "columns": columns,
    "norm": norm,
    "vocabulary": vocabulary,
    "top": top,
}


def _group(build: LayerBuild, site: Site) -> LinearGroup:
    policy = build.policies[site.name]
    kind = StoredGroup if policy.precision.is_stored else LinearGroup
    return kind(build.attached, site.name, build.number, policy)


def _down(build: LayerBuild, site: Site) -> nn.Module:
    """The module of the projection that reads what the activation gives."""
    assert site.partner is not None
    return build.sites.modules(SITES[site.partner], build.module)[0]


def _value_norms(sites: Sites, layer: nn.Module) -> Tensor:
    """||W e|| of every number of every head's output, float32 (heads, value size)."""
    out = sites.modules(SITES["attention_out"], layer)[0]
    with present([out]):
        norms: Tensor = torch.linalg.vector_norm(sites.weights(out).matrix.detach(), dim=1)
    return norms.view(-1, sites.head_size(layer))
