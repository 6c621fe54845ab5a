"""Linear layers under a policy: low-precision sums, look-ahead through what follows, recomputation of a few.

How to call it, for a layer relu(x W^T + b) of a network without transformers:

    from torchlamp.simulation.activation import activated
    from torchlamp.simulation.linear import linear

    result = linear(x, weight, bias, accumulator="ps4", rule="condition:4", next_function=activated(torch.relu))
    hidden = torch.relu(result.output)           # result.selected / result.eligible: entries per row

and `activated(torch.relu, next_weight.norm(dim=0))` for rules that weigh by what the next layer does. Without
`next_function` the output itself is what counts: its relative l2 error per row, and the condition number of the inner
product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.tender import Ranges
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.rules.answers import Answer
from torchlamp.rules.element_tile import ElementTile
from torchlamp.rules.none_all import Everything, Nothing
from torchlamp.rules.rule import Rule
from torchlamp.rules.tile import Tile
from torchlamp.simulation.linear_sums import Sums, Weights, side_of, with_chunks
from torchlamp.simulation.stored import QuantisedMatrix

#: Entries of a chunk of rows: a vocabulary of 262144 is worked on 64 rows at a time.
CHUNK_ENTRIES = 2**24
_AS_THEY_ARE = Operand()
#: Keeps a division by the norm of a zero row from giving NaN: 0 / tiny is 0.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LowPass:
    """A chunk of rows after the low pass: what a look-ahead function makes a tile of.

    All tensors are float32 (rows, outputs); the outputs of several maps stand side by side. What is an `Answer` is
    computed when a rule asks the tile for it.
    """

    #: The sums, with the bias.
    y: Tensor
    #: Which rows of the call's (batch * length) rows these are.
    rows: slice
    #: Expected error of y, from the squared partial sums.
    error: Answer = None
    #: Expected rounding error of y, from norms, see `Bridge`.
    bridge_error: Answer = None
    #: y in float32.
    exact: Answer = None
    #: |w_j|^T |x| + |b_j|, and its bound ||w_j|| ||x|| + |b_j|.
    numerator: Answer = None
    cheap_numerator: Answer = None
    generator: torch.Generator | None = None
    layer: int = 0

    def element_tile(self, gain: Tensor, sensitivity: Tensor | None = None) -> ElementTile:
        """The tile for a function whose error is counted componentwise or through a norm.

        Parameters
        ----------
        gain
            Normwise relative change of what follows per unit of absolute error, (rows, outputs).
        sensitivity
            |f'(y_j) / f(y_j)|, relative error of f's component per unit of absolute error in y_j, 0 where f doesn't
            react; None for the identity, 1 / |y_j|.
        """

        def condition(numerator: Answer) -> Answer:
            if numerator is None:
                return None
            return lambda: _amplified(numerator, self.y, sensitivity)

        return ElementTile(
            scores=self.y,
            visible=torch.ones(1, 1, dtype=torch.bool, device=self.y.device).expand(self.y.shape),
            gain=gain.expand(self.y.shape),
            condition=condition(self.numerator),
            cheap_condition=condition(self.cheap_numerator),
            numerator=self.numerator,
            cheap_numerator=self.cheap_numerator,
            error=self.error,
            bridge_error=self.bridge_error,
            exact=self.exact,
            generator=self.generator,
            layer=self.layer,
        )


def _amplified(numerator: Tensor | Callable[[], Tensor], y: Tensor, sensitivity: Tensor | None) -> Tensor:
    """Numerator times sensitivity, or over |y| for the identity."""
    known = numerator if isinstance(numerator, Tensor) else numerator()
    return known / y.abs() if sensitivity is None else known * sensitivity


#: Looks ahead from a chunk through what follows.
LookAhead = Callable[[LowPass], Tile]


@dataclass(frozen=True)
class LinearResult:
    """What a linear layer under a policy returns.

    Attributes
    ----------
    outputs : tuple of Tensor
        float32 (..., outputs) of each map.
    eligible : int
        Entries of a row, of all maps together.
    selected : Tensor
        int64 (...): how many of them were recomputed.
    overflowed : int
        How many sums of all rows didn't fit an integer register.
    """

    outputs: tuple[Tensor, ...]
    eligible: int
    selected: Tensor
    overflowed: int = 0

    @property
    def output(self) -> Tensor:
        """The output of a single map."""
        (output,) = self.outputs
        return output


def relative(low: LowPass) -> ElementTile:
    """Look ahead to the output itself: the relative l2 error of a row, and relative errors of its components."""
    return low.element_tile(1 / low.y.norm(dim=-1, keepdim=True).clamp_min(TINY))


@dataclass(frozen=True)
class HeadVectors:
    """Look ahead from queries, keys and values: the relative l2 error of each head's vector of `size` numbers."""

    size: int

    def __call__(self, low: LowPass) -> ElementTile:
        """The tile of a chunk of rows."""
        heads = low.y.view(*low.y.shape[:-1], -1, self.size)
        gain = 1 / heads.norm(dim=-1, keepdim=True).clamp_min(TINY)
        return low.element_tile(gain.expand(heads.shape).flatten(-2))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    accumulator: str | Accumulator,
    rule: str | Rule,
    next_function: LookAhead = relative,
    generator: torch.Generator | None = None,
) -> LinearResult:
    """The layer x W^T + b with sums in low precision, the selected ones recomputed in float32.

    Parameters
    ----------
    x : Tensor
        float32 (..., inputs).
    weight, bias : Tensor
        float32 (outputs, inputs) as in `torch.nn.Linear`, and (outputs,) or None.
    accumulator, rule
        How sums are formed, and which are recomputed; spellings or objects.
    next_function : callable
        What follows the layer: `relative` (nothing), `activated(...)`, `Normed`, `Vocabulary`, `HeadVectors`.
    generator : torch.Generator or None
        On the CPU; needed by random rules.

    Raises
    ------
    TypeError
        Anything but float32.
    ValueError
        Shapes that don't fit; a rule that needs what `next_function` doesn't give.
    """
    return linears(
        x,
        [Weights(weight.T, bias)],
        accumulator=Accumulator.parse(accumulator).outside_attention(),
        rule=Rule.parse(rule),
        next_function=next_function,
        generator=generator,
    )


@torch.no_grad()
def linears(
    x: Tensor,
    maps: Sequence[Weights],
    *,
    accumulator: Accumulator,
    rule: Rule,
    next_function: LookAhead,
    generator: torch.Generator | None = None,
    layer: int = 0,
    operand: Operand = _AS_THEY_ARE,
    copies: Sequence[QuantisedMatrix] | None = None,
    transforms: Sequence[Transform] = (),
    moments: Moments | None = None,
    ranges: Ranges | None = None,
) -> LinearResult:
    """Several linear maps of one input whose outputs one function combines (gate and up of a GLU), see `linear`.

    The sum over the inputs k = 0, 1, 2, ... starts from zero; the bias is added to the finished sum in float32 and the
    result rounded once more. Recomputed entries are float32 FMAs in the same order, plus the bias in float32. Rows
    don't influence each other, except that random rules draw once for all samples (the first dimension of an x of
    three dimensions or more).

    With an operand, inputs and weights are quantised to it before they are multiplied, and recomputed entries have
    full-precision operands; `copies` are the weights' (`QuantisedMatrix.store`), made anew where they aren't given.

    With transforms, inputs and weights are changed before that, for each sample anew: fitted to the statistics of its
    inputs, or to calibrated ones (`moments`, (1, inputs)). The product of the inputs' mean that `center` takes off is
    added in float32 like a bias, and the result isn't rounded to the accumulator's format again.

    Tender's operand biases and groups the channels of the inputs in chunks of each sample's rows, by their own ranges
    or by calibrated ones (`ranges`, (1, chunks, inputs)); the product of its bias is added in the same way.
    """
    if transforms:
        copies = None
    elif copies is None and not operand.is_float32:
        copies = [QuantisedMatrix.store(m.matrix.detach().T, operand, accumulator) for m in maps]
    _check(x, maps)
    if rule.needs_generator and generator is None:
        raise ValueError(f"rule {str(rule)!r} draws random numbers: pass a generator")
    flat = x.detach().reshape(-1, x.shape[-1])
    outputs = [flat.new_empty(flat.shape[0], m.matrix.shape[1]) for m in maps]
    selected = torch.zeros(flat.shape[0], dtype=torch.int64, device=x.device)
    width = sum(m.matrix.shape[1] for m in maps)
    # Every sample sees the same draws and its own statistics, so that its result doesn't depend on its neighbours.
    alone = rule.needs_generator or transforms or operand.is_tender
    samples = x.shape[0] if alone and x.ndim > 2 else 1
    length = flat.shape[0] // max(1, samples)
    chunk = max(1, CHUNK_ENTRIES // max(1, width))
    start = generator.get_state() if generator is not None else None
    overflowed = 0
    for sample in range(samples):
        if generator is not None and start is not None:
            generator.set_state(start)
        own = flat[sample * length : (sample + 1) * length]
        sides = [side_of(own, m, operand, transforms, moments, accumulator) for m in maps]
        if copies is not None:
            sides = [replace(side, copy=copy) for side, copy in zip(sides, copies, strict=True)]
        if operand.is_tender:
            sides = with_chunks(sides, operand, accumulator, ranges)
        for first in range(0, length, chunk):
            some = slice(first, min(first + chunk, length))
            rows = slice(sample * length + some.start, sample * length + some.stop)
            pieces = [Sums(side, some, accumulator, rule, operand) for side in sides]
            overflowed += sum(piece.overflowed for piece in pieces)
            selected[rows] = look_ahead(pieces, rows, rule, next_function, generator, layer)
            for output, piece in zip(outputs, pieces, strict=True):
                output[rows] = piece.y
    shaped = tuple(o.reshape(*x.shape[:-1], o.shape[1]) for o in outputs)
    return LinearResult(shaped, width, selected.reshape(x.shape[:-1]), overflowed)


class Arrangement:
    """How the sums of several maps make rows that one function reads: the outputs of all maps side by side."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """(rows, outputs of all) from (rows, outputs) of each map."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)

    def split(self, joined: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """The way back, to the shapes of `parts`."""
        return torch.split(joined, [part.shape[1] for part in parts], dim=-1)


SIDE_BY_SIDE = Arrangement()


def look_ahead(
    pieces: Sequence["Sums"],
    rows: slice,
    rule: Rule,
    next_function: LookAhead,
    generator: torch.Generator | None,
    layer: int,
    arrangement: Arrangement = SIDE_BY_SIDE,
) -> Tensor:
    """Select and recompute; the number of recomputed entries of each row, int64 (rows,)."""
    sums, join = [p.y for p in pieces], arrangement.join
    y = join(sums)
    if isinstance(rule, Nothing):
        return torch.zeros(len(y), dtype=torch.int64, device=y.device)
    if isinstance(rule, Everything):
        chosen = torch.ones(1, 1, dtype=torch.bool, device=y.device).expand(y.shape)
    else:
        low = LowPass(
            y=y,
            rows=rows,
            error=(lambda: join([p.error for p in pieces])) if "squares" in rule.byproducts else None,
            bridge_error=lambda: join([p.bridge_error for p in pieces]),
            exact=lambda: join([p.exact for p in pieces]),
            numerator=lambda: join([p.numerator for p in pieces]),
            cheap_numerator=lambda: join([p.cheap_numerator for p in pieces]),
            generator=generator,
            layer=layer,
        )
        chosen = rule.select(next_function(low))
    counts = chosen.sum(dim=-1)
    if bool(counts.any()):
        for piece, mask in zip(pieces, arrangement.split(chosen, sums), strict=True):
            piece.recompute(mask)
    return counts


def _check(x: Tensor, maps: Sequence[Weights]) -> None:
    for m in maps:
        tensors = (x, m.matrix) if m.bias is None else (x, m.matrix, m.bias)
        if any(t.dtype != torch.float32 for t in tensors):
            dtypes = ", ".join(str(t.dtype) for t in tensors)
            raise TypeError(
                f"linear takes float32 input, weight and bias, got {dtypes}: convert with .float()"
            )
        fits = m.matrix.ndim == 2 and x.ndim >= 1 and x.shape[-1] == m.matrix.shape[0]
        if not fits or (m.bias is not None and m.bias.shape != m.matrix.shape[1:]):
            raise ValueError(
                f"input of shape {tuple(x.shape)} doesn't fit a weight of shape {tuple(m.matrix.T.shape)}: "
                "they must be (..., inputs) and (outputs, inputs)"
            )
