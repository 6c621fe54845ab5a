"""What lies between the heads of an attention and the residual stream, for rules that look that far ahead."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchlamp.huggingface.offloaded import present
from torchlamp.huggingface.site_forwards import Residual
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.sites import SITES
from torchlamp.simulation.ahead import Ahead, gram_factor
from torchlamp.simulation.norms import Norm


@dataclass(frozen=True)
class _Scale:
    """`Ahead.scale`: ||g x|| of the residual stream; no closure, so that a deep copy of a model has its own stream."""

    stream: Residual
    #: The norm that reads the stream next.
    reads: Norm
    #: The output projection (features, heads * value size) if a norm reads what it gives, and its bias.
    after: Tensor | None
    bias: Tensor | None

    def __call__(self, outputs: Tensor, sample: int, rows: range) -> Tensor:
        if self.stream.x is None:
            raise RuntimeError(
                "the residual stream is not known here: the layer's norm was not called before it"
            )
        x = self.stream.x[sample, rows.start : rows.stop]
        if self.reads.kind == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        size: Tensor = torch.linalg.vector_norm(x * self.reads.weight, dim=-1)
        if self.after is None:
            return size
        # rms(W o) joins all heads, so it needs W itself.
        added = torch.nn.functional.linear(outputs.transpose(0, 1).flatten(1), self.after, self.bias)
        return size * added.square().mean(dim=-1).sqrt()


@torch.no_grad()
def residual_ahead(sites: Sites, layer: nn.Module, stream: Residual) -> Ahead:
    """The output projection of a layer's attention, measured as the norm behind the addition measures it.

    A change dx of the residual stream x counts as ||g dx|| / ||g x||, g the weight of the norm that reads the stream
    next; if that is a LayerNorm, dx and x without their means. In layers with a norm behind the attention (Gemma), x
    takes w W o / rms(W o): that norm's weight w enters the map, and rms(W o), formed at the low-precision o, the scale.

    Parameters
    ----------
    sites, layer
        The model and one of its decoder layers.
    stream
        Holds the residual stream (batch, length, features) when the attention runs.

    Raises
    ------
    ValueError, TypeError
        As from `Sites`.
    """
    module = sites.modules(SITES["attention_out"], layer)[0]
    with present([module]):
        projection = sites.weights(module)
    weight = projection.matrix.detach().T
    heads = weight.shape[1] // sites.head_size(layer)
    norms = sites.norms(layer)
    reads = sites.norm(norms.mlp[1])
    if reads.kind == "layer":
        weight = weight - weight.mean(dim=0)
    after: Tensor | None = None
    if norms.after_attention is not None:
        after, weight = weight, weight * sites.norm(norms.after_attention[1]).weight[:, None]
    bias = None if projection.bias is None else projection.bias.detach()
    scale = _Scale(stream, reads, after, bias)
    factor = gram_factor(weight * reads.weight[:, None], heads)
    return Ahead(factor, scale, reads_outputs=after is not None)
