"""Statistics of a model's operands on a text, which static transforms are fitted to; saved, and named by a hash."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from torchlamp.arithmetic.tender import Ranges
from torchlamp.arithmetic.transforms.moments import Moments

_PARTS = ("count", "total", "squares", "products")
_ENDS = ("low", "high")


@dataclass(eq=False)
class Calibration:
    """Moments of the operands of a policy's sites, layer by layer, made by `torchlamp.calibrate`.

    At `scores` the left operand are the queries and the right one the keys, (key heads, size) each; at linear sites
    the left operand are the inputs, (1, inputs), and the weights need no text. For Tender's operand there are ranges of
    the same operands, chunk by chunk.
    """

    _moments: dict[tuple[str, int], tuple[Moments, ...]] = field(default_factory=dict, repr=False)
    _ranges: dict[tuple[str, int], tuple[Ranges, ...]] = field(default_factory=dict, repr=False)
    #: The sites whose ranges are collected; empty once that is over.
    ranged: frozenset[str] = frozenset()

    def add(self, site: str, layer: int, *moments: Moments) -> None:
        """Add the statistics of one call: of the left operand, and at `scores` of the right one."""
        known = self._moments.get((site, layer))
        if known is not None:
            moments = tuple(old + new for old, new in zip(known, moments, strict=True))
        self._moments[site, layer] = moments

    def of(self, site: str, layer: int, shape: tuple[int, int]) -> tuple[Moments, ...]:
        """The statistics of a site in a layer (-1: the LM head), (groups, size) each as `shape` says.

        Raises
        ------
        ValueError
            The calibration was made for other sites, layers or sizes.
        """
        if (site, layer) not in self._moments:
            sites = ", ".join(sorted({name for name, _ in self._moments})) or "nothing"
            raise ValueError(
                f"the calibration holds no statistics of site {site}, layer {layer}: it was made for {sites}; make one "
                "for this model and policy with torchlamp.calibrate"
            )
        found = self._moments[site, layer]
        if any(tuple(moments.total.shape) != shape for moments in found):
            raise ValueError(
                f"the calibration's statistics of site {site}, layer {layer} are of shape "
                f"{tuple(found[0].total.shape)}, the model's operands of {shape}: it was made for another model"
            )
        return found

    def add_ranges(self, site: str, layer: int, *operands: Tensor) -> None:
        """Add the ranges of one call's operands, float32 (batch, groups, vectors, size) each."""
        found = []
        for x in operands:
            own = Ranges.of(x.flatten(0, 1))
            shape = (*x.shape[:2], *own.low.shape[1:])
            found.append(Ranges(own.low.view(shape).amin(0), own.high.view(shape).amax(0)))
        known = self._ranges.get((site, layer))
        if known is not None:
            found = [old.joined(new) for old, new in zip(known, found, strict=True)]
        self._ranges[site, layer] = tuple(found)

    def ranges(self, site: str, layer: int, *shapes: tuple[int, int]) -> tuple[Ranges, ...]:
        """The ranges of a site's operands in a layer (-1: the LM head), (groups, chunks, size) for each (groups, size).

        Raises
        ------
        ValueError
            The calibration was made for other sites, layers or sizes.
        """
        found = self._ranges.get((site, layer))
        if found is None:
            sites = ", ".join(sorted({name for name, _ in self._ranges})) or "no site"
            raise ValueError(
                f"the calibration holds no ranges of Tender's operand at site {site}, layer {layer}: it has those of "
                f"{sites}; make one for this model and policy with torchlamp.calibrate"
            )
        for own, shape in zip(found, shapes, strict=True):
            if (own.low.shape[0], own.low.shape[2]) != shape:
                raise ValueError(
                    f"the calibration's ranges of site {site}, layer {layer} are of {tuple(own.low.shape[::2])} groups "
                    f"and channels, the model's operands of {shape}: it was made for another model"
                )
        return found

    def sizes(self) -> Iterator[tuple[str, int, tuple[int, int]]]:
        """Each site and layer with the number of vectors that its statistics are made of, and of their channels."""
        for (site, layer), sides in sorted(self._moments.items()):
            fewest = min(int(moments.count.min()) for moments in sides)
            yield site, layer, (fewest, sides[0].total.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every statistic under the name ``site.layer.side.part``."""
        named = {}
        for (site, layer), sides in sorted(self._moments.items()):
            for side, moments in zip(("left", "right"), sides, strict=False):
                for part in _PARTS:
                    tensor = getattr(moments, part)
                    if tensor is not None:
                        named[f"{site}.{layer}.{side}.{part}"] = tensor.cpu().contiguous()
        for (site, layer), operands in sorted(self._ranges.items()):
            for side, ranges in zip(("left", "right"), operands, strict=False):
                for part in _ENDS:
                    named[f"{site}.{layer}.{side}.{part}"] = getattr(ranges, part).cpu().contiguous()
        return named

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 over all names and numbers: results carry it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the statistics as a safetensors file."""
        save_file(self.tensors, str(path))

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            A file that is no calibration.
        """
        found: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = {}
        ends: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = {}
        try:
            for name, tensor in load_file(str(path)).items():
                site, layer, side, part = name.split(".")
                kind = ends if part in _ENDS else found
                kind.setdefault((site, int(layer)), {}).setdefault(side, {})[part] = tensor
            return cls(
                {
                    at: tuple(Moments(**sides[side]) for side in ("left", "right") if side in sides)
                    for at, sides in found.items()
                },
                {
                    at: tuple(Ranges(**sides[side]) for side in ("left", "right") if side in sides)
                    for at, sides in ends.items()
                },
            )
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{str(path)!r} is no calibration that torchlamp.calibrate made: {error}"
            ) from None


def score_moments(query: Tensor, key: Tensor, products: bool) -> tuple[Moments, Moments]:
    """The statistics of queries (batch, heads, queries, size) and keys, (key heads, size), over all samples."""
    heads, size = key.shape[1], key.shape[3]
    by_group = query.reshape(len(query), heads, -1, *query.shape[2:])
    rows = by_group.movedim(1, 0).reshape(heads, -1, size)
    return Moments.of(rows, products), Moments.of(key.movedim(1, 0).reshape(heads, -1, size), products)


def input_moments(x: Tensor, products: bool) -> Moments:
    """The statistics of a linear layer's inputs (..., inputs), (1, inputs)."""
    return Moments.of(x.reshape(1, -1, x.shape[-1]), products)
