"""Linear layers whose weights are stored in few bits: low-bit products, look-ahead, rows read in full precision.

`qkv`, `attention_out` and `lm_head` are such layers; `torchlamp.simulation.stored_mlp` has the two of an MLP.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.chain import change_operands, fit
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.kernels.head_bounds import could_win, logit_bounds, max_norm
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.rules.none_all import Nothing
from torchlamp.rules.rule import Rule
from torchlamp.simulation.linear import CHUNK_ENTRIES, LinearResult, LookAhead, LowPass
from torchlamp.simulation.linear_sums import Weights
from torchlamp.simulation.softmax import visible_softmax
from torchlamp.simulation.stored import FLOAT32, StoredMatrix, expected_errors, store_matrix
from torchlamp.simulation.stored_tile import StoredTile

#: Share of recomputed entries from which a full float32 pass is faster than one inner product after the other.
_DENSE = 0.05


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """A linear map with a stored copy of its rows."""

    full: Weights
    copy: StoredMatrix

    @classmethod
    def store(cls, full: Weights, operand: Operand) -> "StoredWeights":
        """Store the rows of a map; sums run along its inputs."""
        return cls(full, store_matrix(full.matrix.detach().T, operand))

    @cached_property
    def max_norm(self) -> float:
        """At least the 2-norm of every row and of its copy."""
        return max_norm(self.full.matrix.detach().T, self.copy.errors)

    def products(self, x: Tensor) -> Tensor:
        """The low pass, with the bias: float32 (vectors, outputs)."""
        y = self.copy.products(x.contiguous())
        return y if self.full.bias is None else y + self.full.bias.detach()

    def errors(self, x: Tensor) -> Tensor:
        """Standard deviation of the low pass's errors, float32 (vectors, outputs)."""
        return expected_errors(x, self.copy.errors)

    def exact(self, x: Tensor) -> Tensor:
        """The same from full precision, in float32."""
        y = products(x[None], self.full.matrix.detach()[None], FLOAT32)[0][0]
        return y if self.full.bias is None else y + self.full.bias.detach()

    def recompute(self, y: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
        """`y` with the chosen entries from full-precision rows."""
        if not bool(chosen.any()):
            return y
        if int(chosen.sum()) > _DENSE * chosen.numel():
            return torch.where(chosen, self.exact(x), y)
        again = y[None].clone()
        recompute(again, x[None], self.full.matrix.detach()[None], chosen[None])
        bias = self.full.bias
        return again[0] if bias is None else torch.where(chosen, again[0] + bias.detach(), y)


#: Entries that are recomputed whatever the rule says: from the low pass and its vectors (rows, inputs), bool.
Always = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def changed_group(
    x: Tensor,
    maps: Sequence[Weights],
    transforms: Sequence[Transform],
    operand: Operand,
    moments: Moments | None,
) -> tuple[Tensor, list[StoredWeights]]:
    """Inputs and maps of one group in the representative that transforms give, the maps stored.

    A group has one representative, since its maps read the same inputs; it is fitted to all of the call's inputs, or to
    calibrated statistics of them, and to the weights of all maps. What `center` takes off is added like a bias.

    Parameters
    ----------
    x : Tensor
        float32 (..., inputs).
    maps : sequence of Weights
        Linear maps of these inputs.
    transforms, operand
        The changes, in the order they are applied, and how the changed weights are stored.
    moments : Moments, optional
        Calibrated statistics of the inputs, (1, inputs).
    """
    rows = x.reshape(1, -1, x.shape[-1])
    needs_products = any(transform.needs_products for transform in transforms)
    left = Moments.of(rows, needs_products) if moments is None else moments
    weights = [m.matrix.detach()[None] for m in maps]
    right = functools.reduce(operator.add, (Moments.of(w.mT, needs_products) for w in weights))
    changes = fit(transforms, left, right, "left")
    moved, stored = rows, []
    for own, weight in zip(maps, weights, strict=True):
        changed = change_operands(changes, rows, weight)
        bias = own.bias
        if changed.column_shift is not None:
            added = changed.column_shift[0, 0]
            bias = added if bias is None else added + bias.detach()
        moved = changed.left
        stored.append(StoredWeights.store(Weights(changed.right[0], bias), operand))
    return moved.reshape(x.shape), stored


@torch.no_grad()
def stored_linears(
    x: Tensor, maps: Sequence[StoredWeights], *, rule: Rule, next_function: LookAhead,
    always: Always | None = None, generator: torch.Generator | None = None, layer: int = 0,
) -> LinearResult:  # fmt: skip
    """Several linear maps of one input from their stored copies, chosen rows read in full precision.

    The expected error of an output is that of `expected_errors`; it stands in the place of the numerators of condition
    numbers, too, since with a stored operand there is nothing to bound.

    Parameters
    ----------
    x : Tensor
        float32 (..., inputs).
    maps : sequence of StoredWeights
        The maps.
    rule, next_function, generator, layer
        As for `torchlamp.simulation.linear.linears`.
    always : callable, optional
        What is recomputed beside what the rule picks.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    sizes = [m.full.matrix.shape[1] for m in maps]
    outputs = [flat.new_empty(len(flat), size) for size in sizes]
    selected = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
    # Every sample sees the same draws, so that the result of one doesn't depend on its neighbours.
    samples = x.shape[0] if rule.needs_generator and x.ndim > 2 else 1
    length = len(flat) // max(1, samples)
    chunk = max(1, CHUNK_ENTRIES // max(1, sum(sizes)))
    start = None if generator is None else generator.get_state()
    for sample in range(samples):
        if generator is not None and start is not None:
            generator.set_state(start)
        for first in range(sample * length, (sample + 1) * length, chunk):
            rows = slice(first, min(first + chunk, (sample + 1) * length))
            vectors = flat[rows]
            sums = [m.products(vectors) for m in maps]
            chosen = None if always is None else always(_beside(sums), vectors)
            if not isinstance(rule, Nothing):
                low = _low_pass(sums, maps, vectors, rows, generator, layer)
                picked = rule.select(next_function(low))
                chosen = picked if chosen is None else picked | chosen
            if chosen is not None:
                selected[rows] = chosen.sum(dim=-1)
                parts = torch.split(chosen, sizes, dim=-1)
                sums = [m.recompute(y, vectors, c) for m, y, c in zip(maps, sums, parts, strict=True)]
            for output, y in zip(outputs, sums, strict=True):
                output[rows] = y
    shaped = tuple(o.reshape(*x.shape[:-1], o.shape[1]) for o in outputs)
    return LinearResult(shaped, sum(sizes), selected.reshape(x.shape[:-1]))


def _low_pass(
    sums: Sequence[Tensor], maps: Sequence[StoredWeights], x: Tensor, rows: slice,
    generator: torch.Generator | None, layer: int,
) -> LowPass:  # fmt: skip
    def error() -> Tensor:
        return _beside([m.errors(x) for m in maps])

    return LowPass(
        y=_beside(sums),
        rows=rows,
        error=error,
        bridge_error=error,
        exact=lambda: _beside([m.exact(x) for m in maps]),
        numerator=error,
        cheap_numerator=error,
        generator=generator,
        layer=layer,
    )


@dataclass(frozen=True)
class StoredVocabulary:
    """The softmax tile of a row of logits from a stored head, every token visible.

    The logits are those before a softcap, as the decoding kernel sees them.
    """

    def __call__(self, low: LowPass) -> StoredTile:
        """The tile of a chunk of rows."""
        return StoredTile(
            scores=low.y,
            logits=low.y,
            probabilities=visible_softmax(low.y[None], None, None)[0],
            visible=torch.ones(1, 1, dtype=torch.bool, device=low.y.device).expand(low.y.shape),
            error=low.error,
            bridge_error=low.bridge_error,
            generator=low.generator,
            exact=low.exact,
            layer=low.layer,
        )


def for_the_top(head: StoredWeights, top: int = 1) -> Always:
    """Tokens that could be among the `top` largest: the largest logits are those of full precision."""

    def always(low: Tensor, x: Tensor) -> Tensor:
        bounds, norms = logit_bounds(x, head.copy.errors, head.max_norm)
        return could_win(low, bounds, norms, head.max_norm, top)

    return always


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
