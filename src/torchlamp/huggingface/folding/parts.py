"""What folding writes to: slices of linear layers, gains of norms, the attention of a layer taken apart."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from torchlamp.huggingface.sites import Sites
from torchlamp.policy.sites import SITES


@dataclass(frozen=True)
class Outputs:
    """Some outputs of a linear layer, `first` to `last`: views that may be written to."""

    module: nn.Module
    first: int
    last: int

    @classmethod
    def all_of(cls, module: nn.Module) -> "Outputs":
        """Every output of a `torch.nn.Linear` or a `Conv1D`."""
        return cls(module, 0, weight_of(module).shape[0])

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs)."""
        return weight_of(self.module)[self.first : self.last]

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), or None."""
        bias = bias_of(self.module)
        return None if bias is None else bias[self.first : self.last]


def weight_of(module: nn.Module) -> Tensor:
    """The weight (outputs, inputs) of a linear layer, a view that may be written to."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear layer or norm, a view that may be written to; None where it has none."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies its normalised vector by, which some norms store as 1 + w."""

    module: nn.Module
    #: 1 where the module stores the gain less 1, or 0.
    offset: float

    @classmethod
    def of(cls, sites: Sites, module: nn.Module) -> "Gain":
        """The gain of a norm; ValueError for anything but RMSNorm and LayerNorm."""
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        return cls(module, float((sites.norm(module).weight - weight).mean().round()))

    @property
    def bias(self) -> Tensor | None:
        """What is added, (size,), or None."""
        return bias_of(self.module)

    def read(self) -> Tensor:
        """The gain, a new tensor (size,)."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight + self.offset

    def write(self, gain: Tensor) -> None:
        """Store another gain."""
        self.module.weight.detach().copy_(gain - self.offset)  # type: ignore[operator]


@dataclass(frozen=True)
class Attention:
    """The attention of a layer taken apart: query heads of `size` numbers, key heads with values of `value_size`."""

    module: nn.Module
    query: Outputs
    key: Outputs
    value: Outputs
    out: nn.Module
    heads: int
    key_heads: int
    size: int
    value_size: int
    #: Norms of each head's queries and keys, or none.
    norms: tuple[Gain, Gain] | None
    #: Parameters of the attention that are none of these.
    unknown: tuple[str, ...]

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.heads // self.key_heads

    @classmethod
    def of(cls, sites: Sites, layer: nn.Module) -> "Attention":
        """The attention of a layer; ValueError where its modules aren't found."""
        module, out = sites.attention(layer), sites.modules(SITES["attention_out"], layer)[0]
        size, projections = sites.head_size(layer), sites.modules(SITES["qkv"], layer)
        for projection in (*projections, out):
            sites.weights(projection)
        if len(projections) == 3:
            query, key, value = map(Outputs.all_of, projections)
            heads, key_heads = (part.weight.shape[0] // size for part in (query, key))
        else:
            (fused,) = projections
            heads = weight_of(out).shape[1] // size
            key_heads = (weight_of(fused).shape[0] // size - heads) // 2
            ends = (0, heads * size, (heads + key_heads) * size, (heads + 2 * key_heads) * size)
            query, key, value = (Outputs(fused, ends[i], ends[i + 1]) for i in range(3))
        norms = tuple(
            Gain.of(sites, norm)
            for name in ("q_norm", "k_norm")
            if (norm := getattr(module, name, None)) is not None and norm.weight.numel() == size
        )
        known = {id(parameter) for part in (*projections, out) for parameter in part.parameters()}
        known |= {id(parameter) for norm in norms for parameter in norm.module.parameters()}
        unknown = tuple(name for name, parameter in module.named_parameters() if id(parameter) not in known)
        pair = (norms[0], norms[1]) if len(norms) == 2 else None
        value_size = value.weight.shape[0] // key_heads
        return cls(module, query, key, value, out, heads, key_heads, size, value_size, pair, unknown)


def split(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """A dimension as several of these sizes, one of which may be -1: a view."""
    view: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return view


def by_heads(weight: Tensor, heads: int) -> Tensor:
    """A weight (heads * size, inputs) as rows of inputs, (heads, inputs, size): a view."""
    return split(weight, 0, heads, -1).mT


def reorder(tensor: Tensor, order: Tensor, dim: int) -> None:
    """Put elements of a dimension into an order, in place."""
    tensor.copy_(tensor.index_select(dim, order))


def spread(order: Tensor, size: int) -> Tensor:
    """An order of blocks as that of their elements, `size` in each."""
    return (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
