"""What lies between the heads of an attention and the residual stream, for rules that look that far ahead."""

import torch
from torch import Tensor, nn

from torchlamp.compositions.ahead import Ahead, gram_factor
from torchlamp.integrations.site_forwards import Residual
from torchlamp.integrations.sites import Sites


@torch.no_grad()
def residual_ahead(sites: Sites, layer: nn.Module, stream: Residual) -> Ahead:
    """The output projection of a layer's attention, measured against the stream that its result is added to.

    Pre-norm layers (Llama, GPT-2): a change dx of the stream x counts as ||dx|| / ||x||; where a LayerNorm reads the
    stream, both without their mean. Layers with a norm behind the attention (Gemma): x takes gamma W o / rms(W o), so
    gamma enters the map and rms(W o), formed at the low-precision o, the scale.

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
    projection = sites.weights(sites.attention_out(layer))
    weight = projection.matrix.detach().T
    heads = weight.shape[1] // sites.head_size(layer)
    norms = sites.norms(layer)
    mean_free = sites.norm(norms.mlp[1], weight.shape[0]).kind == "layer"
    if mean_free:
        weight = weight - weight.mean(dim=0)
    size: Tensor | None = None
    if norms.after_attention is not None:
        after = sites.norm(norms.after_attention[1], weight.shape[0])
        # rms(W o) joins all heads, so it needs W itself.
        size, weight = weight, weight * after.weight[:, None]

    def scale(outputs: Tensor, sample: int, rows: range) -> Tensor:
        if stream.x is None:
            raise RuntimeError(
                "the residual stream is not known here: the layer's norm was not called before it"
            )
        x = stream.x[sample, rows.start : rows.stop]
        if mean_free:
            x = x - x.mean(dim=-1, keepdim=True)
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
        if size is None:
            return norm
        joined = outputs.transpose(0, 1).reshape(len(rows), -1)
        added = torch.nn.functional.linear(joined, size, projection.bias)
        return norm * added.square().mean(dim=-1).sqrt()

    return Ahead(gram_factor(weight, heads), scale)
