"""The MLP from stored weights: neurons whose errors would show are read in full, and so are columns that weigh much.

`torchlamp.decoding.mlp.LowBitMlp.reference` is the same for a step of a prepared model; docs/decoding.md derives the
weights. A neuron owns its rows of the gate and up projections, and its column of the down projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchlamp.kernels.products import products
from torchlamp.rules.element_tile import ElementTile
from torchlamp.rules.none_all import Nothing
from torchlamp.rules.rule import Rule
from torchlamp.simulation.activation import Activation, derivative
from torchlamp.simulation.linear import LinearResult
from torchlamp.simulation.linear_sums import Weights
from torchlamp.simulation.stored import FLOAT32
from torchlamp.simulation.stored_linear import StoredWeights


@dataclass
class OutputSize:
    """S = sqrt(sum of (h_j |c_j|)^2) of each row under way: the norm of the MLP's output if its terms were orthogonal.

    Formed from the low-bit neurons, before any is read in full; kept from the up projection to the down projection.
    """

    rows: Tensor | None = None

    def take(self, count: int) -> Tensor | None:
        """The sizes float32 (count, 1), which are forgotten; None where there are none for so many rows."""
        rows, self.rows = self.rows, None
        return rows if rows is not None and len(rows) == count else None


@dataclass(frozen=True)
class Neurons:
    """The function after the up projection, h = phi(a) b or phi(a), and the norms |c_j| of the down columns."""

    phi: Activation
    gated: bool
    #: float32 (neurons,).
    column_norms: Tensor


@torch.no_grad()
def stored_neurons(
    x: Tensor, maps: Sequence[StoredWeights], neurons: Neurons, *, rule: Rule, size: OutputSize | None = None,
    generator: torch.Generator | None = None, layer: int = 0,
) -> LinearResult:  # fmt: skip
    """The up projection (and gate) from stored rows; a neuron that the rule picks has its rows read in full.

    The rule sees a tile of neurons: scores h_j, gain |c_j| / S with S the output's size, and as the expected error

        |x| / sqrt(n) sqrt( (phi'(a_j) b_j e_j)^2 + (phi(a_j) f_j)^2 ),

    e_j and f_j the residuals' norms of its two rows. The error stands in the place of the numerator of `output`.

    Parameters
    ----------
    x : Tensor
        float32 (..., inputs).
    maps : sequence of StoredWeights
        Gate and up, or both in one map, gate first; one map where there is no gate.
    neurons : Neurons
        What follows.
    rule, generator, layer
        As for `torchlamp.simulation.linear.linears`.
    size : OutputSize, optional
        Where the output's size is left for `stored_down`.

    Returns
    -------
    LinearResult
        `eligible` and `selected` count neurons.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    sums = [m.products(flat) for m in maps]
    errors = torch.cat([m.copy.errors for m in maps])
    beside = sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)
    a, b = beside.chunk(2, dim=-1) if neurons.gated else (beside, torch.ones_like(beside))
    value, slope = neurons.phi(a), derivative(neurons.phi, a)
    h = value * b
    norms = neurons.column_norms
    count = h.shape[-1]
    output_size: Tensor = torch.linalg.vector_norm(h * norms, dim=-1, keepdim=True)
    if size is not None:
        size.rows = output_size
    selected = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
    if not isinstance(rule, Nothing):
        spread = torch.linalg.vector_norm(flat, dim=-1, keepdim=True) / flat.shape[-1] ** 0.5
        of_gate, of_up = (slope * b * errors[:count], value * errors[count:] if neurons.gated else None)
        error = spread * (of_gate.abs() if of_up is None else torch.hypot(of_gate, of_up))

        def exact() -> Tensor:
            parts = torch.cat([m.exact(flat) for m in maps], dim=-1)
            if not neurons.gated:
                return neurons.phi(parts)
            gate, up = parts.chunk(2, dim=-1)
            return neurons.phi(gate) * up

        tile = neuron_tile(h, norms / output_size, error, exact, generator, layer)
        chosen = rule.select(tile)
        selected = chosen.sum(dim=-1)
        rows = torch.cat([chosen, chosen], dim=-1) if neurons.gated else chosen
        widths = [m.full.matrix.shape[1] for m in maps]
        sums = [
            m.recompute(y, flat, c)
            for m, y, c in zip(maps, sums, torch.split(rows, widths, dim=-1), strict=True)
        ]
    shaped = tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in sums)
    return LinearResult(shaped, count, selected.reshape(x.shape[:-1]))


@dataclass(frozen=True, eq=False)
class StoredColumns:
    """A down projection with a stored copy of its rows, whose columns are read in full where they weigh much."""

    weights: StoredWeights

    @cached_property
    def norms(self) -> Tensor:
        """|c_j| of every column, float32 (neurons,)."""
        return column_norms(self.weights.full)

    @cached_property
    def errors(self) -> Tensor:
        """Norm of what the copy of each column leaves out, float32 (neurons,)."""
        return _norms(self.weights.full.matrix.detach() - self.weights.copy.dequantised().T)


@torch.no_grad()
def stored_down(
    h: Tensor, down: StoredColumns, *, rule: Rule, size: Tensor | None = None,
    generator: torch.Generator | None = None, layer: int = 0,
) -> LinearResult:  # fmt: skip
    """The down projection from its stored copy; columns that the rule picks are read in full, for each row of its own.

    The rule sees a tile of neurons: scores h_j, gain 1 / S, and as the error |h_j| d_j, exactly what the low-bit column
    changes, d_j the norm of what the copy of column j leaves out. The other columns are multiplied with the neurons as
    16-bit integers, with zeros in the place of those that are read.

    Parameters
    ----------
    h : Tensor
        float32 (..., neurons).
    down : StoredColumns
        The projection.
    rule, generator, layer
        As for `torchlamp.simulation.linear.linears`.
    size : Tensor, optional
        S of every row, float32 (rows, 1); formed from `h` if not given.

    Returns
    -------
    LinearResult
        `eligible` and `selected` count columns.
    """
    flat = h.detach().reshape(-1, h.shape[-1])
    selected = torch.zeros(len(flat), dtype=torch.int64, device=h.device)
    chosen = None
    if not isinstance(rule, Nothing):
        if size is None:
            size = torch.linalg.vector_norm(flat * down.norms, dim=-1, keepdim=True)
        error = flat.abs() * down.errors
        gain = (1 / size).expand(flat.shape)
        chosen = rule.select(neuron_tile(flat, gain, error, lambda: flat + error, generator, layer))
        selected = chosen.sum(dim=-1)
    if chosen is None or not bool(chosen.any()):
        y = down.weights.products(flat)
    else:
        y = down.weights.products(flat.masked_fill(chosen, 0.0))
        columns = chosen.any(dim=0)
        read = torch.where(chosen, flat, 0.0)[:, columns]
        y += products(read[None], down.weights.full.matrix.detach()[columns][None], FLOAT32)[0][0]
    return LinearResult((y.reshape(*h.shape[:-1], -1),), flat.shape[1], selected.reshape(h.shape[:-1]))


def neuron_tile(
    h: Tensor, gain: Tensor, error: Tensor, exact: Tensor | Callable[[], Tensor],
    generator: torch.Generator | None, layer: int,
) -> ElementTile:  # fmt: skip
    """The tile of neurons: the known error in the place of numerators, over |h| in the place of condition numbers."""

    def condition() -> Tensor:
        return error / h.abs()

    return ElementTile(
        scores=h,
        visible=torch.ones(1, 1, dtype=torch.bool, device=h.device).expand(h.shape),
        gain=gain,
        condition=condition,
        numerator=error,
        error=error,
        exact=exact,
        generator=generator,
        layer=layer,
        cheap_condition=condition,
        cheap_numerator=error,
        bridge_error=error,
    )


def column_norms(down: Weights) -> Tensor:
    """|c_j| of every column of a down projection, float32 (neurons,)."""
    return _norms(down.matrix.detach())


def _norms(columns: Tensor) -> Tensor:
    """2-norms of rows, float32, whose squares float32 may not hold."""
    norms: Tensor = torch.linalg.vector_norm(columns, dim=1, dtype=torch.float64)
    return norms.float()
