"""Weights off the 4-bit grid: the packaged models are dequantised 4-bit files, on whose grid low bits would be exact.

Llama-type models are rotated, which leaves the function as it is: with the norms' weights folded into the layers behind
them, an RMSNorm commutes with an orthogonal matrix Q, |Q x| = |x|, so that the whole residual stream can be kept in
another basis. Where norms stand behind the sublayers (Gemma 3), their weights can't be folded; there every weight gets
uniform noise of half a quantisation step, which makes a reference model of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlamp.integrations.sites import Sites

#: Steps between the ends of a 4-bit code's range.
_STEPS = 15
_GROUP = 32


@torch.no_grad()
def off_grid(model: Any, seed: int = 0) -> Any:
    """Make a model's weights generic, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32 decoder with RMSNorms whose modules bear the names of Llama's or Gemma 3's.
    seed : int
        Of the rotation, or of the noise.

    Returns
    -------
    transformers.PreTrainedModel
        The model. If rotated, it computes the same function and its embedding and LM head are no longer tied.

    Raises
    ------
    ValueError
        An architecture with neither kind of norms.
    """
    sites = Sites(model)
    if not sites.layers:
        raise ValueError(
            f"{type(model).__name__}: no list of decoder layers found, so its weights stay on the grid"
        )
    generator = torch.Generator().manual_seed(seed)
    if sites.norms(sites.layers[0]).after_attention is not None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                _add_noise(module.weight, generator)
        embedding = model.get_input_embeddings().weight
        if embedding is not model.get_output_embeddings().weight:
            _add_noise(embedding, generator)
        return model
    _rotate(model, sites, generator)
    return model


def _rotate(model: Any, sites: Sites, generator: torch.Generator) -> None:
    size = model.get_input_embeddings().weight.shape[1]
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    def behind(norm: Any, linears: Sequence[Any]) -> None:
        if sites.norm(norm, size).kind != "rms":
            raise ValueError(
                f"{type(norm).__name__}: only an RMSNorm commutes with a rotation of the residual stream"
            )
        for linear in linears:
            linear.weight.copy_((linear.weight.double() * norm.weight.double()) @ q)
        norm.weight.fill_(1.0)

    # Untied first: the head takes the final norm's weight, the embedding doesn't.
    embedding: Any = model.get_input_embeddings()
    head: Any = sites.lm_head()[0]
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.clone())
        model.config.tie_word_embeddings = False
    embedding.weight.copy_(embedding.weight.double() @ q)
    behind(sites.final_norm(), [head])
    for layer in sites.layers:
        norms = sites.norms(layer)
        behind(norms.attention[1], sites.qkv(layer))
        behind(norms.mlp[1], sites.mlp_up(layer)[0])
        last: Any
        for last in (sites.attention_out(layer), sites.mlp_down(layer)):
            last.weight.copy_(q.T @ last.weight.double())
            if last.bias is not None:
                last.bias.copy_(last.bias.double() @ q)


def _add_noise(weight: Tensor, generator: torch.Generator) -> None:
    """Uniform noise of half a step, +-1/4 step, in every group of 32 weights along a row.

    The step is the group's range over 15: that of a 4-bit code which uses all of its 16 values.
    """
    groups = weight.view(len(weight), -1, _GROUP) if weight.shape[1] % _GROUP == 0 else weight.unsqueeze(1)
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / _STEPS
    groups.add_((torch.rand(groups.shape, generator=generator) - 0.5) * 0.5 * step)
