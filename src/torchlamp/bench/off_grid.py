"""Weights off the 4-bit grid: the packaged models are dequantised 4-bit files, on whose grid low bits would be exact.

Llama-type models are rotated, which leaves the function as it is: with the norms' weights folded into the layers after
them, an RMSNorm commutes with an orthogonal matrix Q, |Q x| = |x|, so that the whole residual stream can be kept in
another basis. Where norms stand after the sublayers (Gemma 3), their weights can't be folded; there every weight gets
uniform noise of half a quantisation step, which makes a reference model of its own. (Of a whole step, Gemma 3 270M's
perplexity would rise by 40 %; of half a step, by 5 %.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchlamp.evaluation.metrics import Comparer
from torchlamp.huggingface.sites import Sites
from torchlamp.models.packaged import PACKAGED
from torchlamp.policy.sites import SITES

#: Steps between the ends of a 4-bit code's range.
_STEPS = 15
_GROUP = 32


def made_off_grid(name: str, model: Any) -> bool:
    """Make weights that came from a 4-bit file generic, where that can be, in place; whether they are.

    Other models keep their own weights.
    """
    if name not in PACKAGED and not name.endswith(".gguf"):
        return False
    try:
        off_grid(model)
    except ValueError:
        return False
    return True


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
        An architecture with neither kind of norms, or with other layers; the model stays as it was.
    """
    sites = Sites(model)
    if not sites.layers:
        raise ValueError(
            f"{type(model).__name__}: no list of decoder layers found, so its weights stay on the grid"
        )
    generator = torch.Generator().manual_seed(seed)
    if sites.norms(sites.layers[0]).after_attention is None:
        _rotate(model, sites, generator)
        return model
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _add_noise(module.weight, generator)
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        _add_noise(embedding, generator)
    return model


def perplexities(model: Any, windows: Tensor, seed: int = 0) -> tuple[float, float]:
    """Perplexity before and after `off_grid`, which it runs: about the same, if the new weights may be a reference.

    Parameters
    ----------
    model, seed
        As for `off_grid`; the model is changed.
    windows : Tensor
        int64 (n, length), length >= 2.

    Returns
    -------
    tuple of float
        exp of the mean cross-entropy of all tokens but each window's first: before, after.

    Raises
    ------
    ValueError
        As for `off_grid`.
    """
    before = _perplexity(model, windows)
    return before, _perplexity(off_grid(model, seed), windows)


@torch.inference_mode()
def _perplexity(model: Any, windows: Tensor) -> float:
    comparer = Comparer()
    means = [
        comparer.reference(model(window[None]).logits[0], window).cross_entropy.mean() for window in windows
    ]
    return float(torch.stack(means).mean().exp())


def _rotate(model: Any, sites: Sites, generator: torch.Generator) -> None:
    embedding: Any = model.get_input_embeddings()
    size = embedding.weight.shape[1]
    head: Any = sites.lm_head()[0]
    # Everything is found before anything is changed, so that a refused model stays as it was.
    norm: Any
    folded: list[tuple[Any, Any]] = [(sites.final_norm(), [head])]
    last: list[Any] = []

    def found(site: str, layer: nn.Module) -> list[Any]:
        return sites.modules(SITES[site], layer)

    for layer in sites.layers:
        norms = sites.norms(layer)
        folded += [(norms.attention[1], found("qkv", layer)), (norms.mlp[1], found("mlp_up", layer))]
        last += [*found("attention_out", layer), *found("mlp_down", layer)]
    for norm, _ in folded:
        _check_norm(sites, norm)
    for linear in [*last, *(linear for _, linears in folded for linear in linears)]:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{type(linear).__name__}: only the weights of torch.nn.Linear can be rotated")

    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    # Untied first: the head takes the final norm's weight, the embedding doesn't.
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.clone())
        model.config.tie_word_embeddings = False
    embedding.weight.copy_(embedding.weight.double() @ q)
    for norm, linears in folded:
        for linear in linears:
            linear.weight.copy_((linear.weight.double() * norm.weight.double()) @ q)
        norm.weight.fill_(1.0)
    for linear in last:
        linear.weight.copy_(q.T @ linear.weight.double())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() @ q)


def _check_norm(sites: Sites, norm: Any) -> None:
    found = sites.norm(norm)
    # Of Gemma's first two, the factor is 1 + weight.
    if found.kind != "rms" or not torch.allclose(found.weight, norm.weight, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{type(norm).__name__}: only an RMSNorm whose weight is a factor can be folded into the next layer, so "
            "that the residual stream can be rotated"
        )


def _add_noise(weight: Tensor, generator: torch.Generator) -> None:
    """Uniform noise of half a step, +-1/4 step, in every group of 32 weights along a row.

    The step is the group's range over 15: that of a 4-bit code which uses all of its 16 values. Not the smallest
    distance of two weights, which is a sixteenth of it where a file keeps some tensors in 8 bits.
    """
    groups = weight.view(len(weight), -1, _GROUP) if weight.shape[1] % _GROUP == 0 else weight.unsqueeze(1)
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / _STEPS
    groups.add_((torch.rand(groups.shape, generator=generator) - 0.5) * 0.5 * step)
