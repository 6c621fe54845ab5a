"""Folding at the layers that read a norm, and the one order of the residual stream that they share."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.huggingface.folding.chain import change_consumer, change_producer, fitted
from torchlamp.huggingface.folding.parts import Gain, Outputs, bias_of, reorder, weight_of
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.sites import SITES


def fold_readers(
    gain: Gain, readers: Sequence[nn.Module], transforms: Sequence[Transform], inputs: Moments
) -> Tensor:
    """Change a norm and the linear layers that read it, for transforms that keep the order of the terms.

    Parameters
    ----------
    gain
        Of the norm, whose output nothing else reads.
    readers
        Linear layers.
    transforms
        Among `center` (where the norm and all readers have a bias) and `smooth`.
    inputs
        Statistics of the norm's output, (1, inputs).

    Returns
    -------
    The energies of the layers' terms over their sum, float64 (inputs,).
    """
    weights = torch.cat([weight_of(reader) for reader in readers])
    changes, left, right = fitted(transforms, inputs, Moments.of(weights[None]), "left")
    if changes:
        row = gain.read()[None, None]
        change_producer(changes, row, None if gain.bias is None else gain.bias[None])
        gain.write(row[0, 0])
        for reader in readers:
            shift = change_consumer(changes, weight_of(reader).T[None])
            bias = Outputs.all_of(reader).bias
            if shift is not None and bias is not None:
                bias.add_(shift[0])
    energies = (left.energy * right.energy)[0]
    energies = torch.where(energies.isfinite(), energies, 0.0)
    return energies / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)


class Stream:
    """Everything of a model that holds a number for each channel of the residual stream.

    Raises
    ------
    ValueError
        From the constructor: a part of the model isn't found.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        head, _ = sites.lm_head()
        self._writers: list[nn.Module] = []
        self._readers: list[nn.Module] = [head]
        self._vectors: list[nn.Module] = [sites.final_norm()]
        self._tables: list[nn.Module] = [embedding]
        position = getattr(model.get_decoder(), "wpe", None)  # type: ignore[operator]
        if position is not None:
            self._tables.append(position)
        for layer in sites.layers:
            norms = sites.norms(layer)
            for named in (norms.attention, norms.mlp, norms.after_attention, norms.after_mlp):
                if named is not None:
                    self._vectors.append(named[1])
            for site in ("qkv", "mlp_up"):
                self._readers += sites.modules(SITES[site], layer)
            self._writers += [
                sites.modules(SITES["attention_out"], layer)[0],
                sites.modules(SITES["mlp_down"], layer)[0],
            ]
        self._model = model

    def unknown(self, inner: Iterable[nn.Module]) -> list[str]:
        """Parameters that belong neither to the stream nor to modules inside sublayers, by name."""
        modules = [*self._writers, *self._readers, *self._vectors, *self._tables, *inner]
        known = {id(parameter) for module in modules for parameter in module.parameters()}
        return [name for name, parameter in self._model.named_parameters() if id(parameter) not in known]

    def reorder(self, order: Tensor) -> None:
        """Put the channels of the stream into an order, int64 (hidden size,)."""
        done: set[int] = set()

        def move(tensor: Tensor | None, dim: int) -> None:
            # Tied weights are one tensor, which is moved once.
            if tensor is not None and tensor.data_ptr() not in done:
                done.add(tensor.data_ptr())
                reorder(tensor, order, dim)

        for table in self._tables:
            move(table.weight.detach(), 1)  # type: ignore[operator]
        for reader in self._readers:
            move(weight_of(reader), 1)
        for writer in self._writers:
            move(weight_of(writer), 0)
            move(bias_of(writer), 0)
        for norm in self._vectors:
            move(norm.weight.detach(), 0)  # type: ignore[operator]
            move(bias_of(norm), 0)
