"""What a look-ahead costs: operations and bytes of low pass, selection and recomputation against full precision.

A product g of M rows and N columns, each entry a sum of K multiply-adds, E of its entries eligible. One float32
multiply-add is one operation. f itself is left out on both sides: full precision applies it once, and so does the
look-ahead, which only repeats it for what is recomputed. Relative to full precision, which takes E K operations,

    low pass    c_low, or 1 + c_low / B for /blockB, or c_low + 1 / B for /promoteB
    look-ahead  operations of the rule * c_op / K
                + c_error         if it needs the running error: the sum of squares of the partial sums
                + r (1 + a') c_distance   if it weighs by ||v_j - o||: values as long as keys, r the entry rate; for
                                  every recomputed entry its correction of the output o, which the low pass has formed
                                  in the place of f's, and a' products v_j.o, for entries that the bound on the
                                  distance doesn't settle (docs/method.md 4.9)
                + (M + N) / E     if it estimates errors from norms (`bridge`): one norm a row and a column
    transforms  Transform.operations / (E K) + Transform.operations_a_sum / K, in float32, if any are named: each head
                is charged its own keys, so that heads which share keys pay too much
    recompute   p (1 + a / K), p the share of the units (entries, 1 x 16 row blocks, 16 x 16 tiles) that are touched:
                a touched unit is recomputed as a whole, a operations of f again for each of its entries
    total       the sum of the four; p* = (1 - low pass - look-ahead - transforms) / (1 + a / K) breaks even

    bytes       full (M + N) K b;  low pass (M + N) K b_low;  scores and masks stay on the chip
                recompute min(units touched * (R + C), M + N) K b: R rows and C columns of operands for each R x C
                unit, or all operands once more if that is less

The share of touched units is measured (`Result.block_rates`) where the evaluation counted blocks. Where it didn't, it
is estimated from the entry rate r as if entries were chosen independently, 1 - (1 - r)^(R C), which is too high for
rules whose choices cluster; the result says so.

References
----------
Derived; docs/report.md, "Cost".
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.formats import Format
from torchlamp.arithmetic.transforms import Transform
from torchlamp.rules.rule import Rule

#: Granularity -> rows and columns of the unit that is recomputed as a whole. The keys are those of block rates.
GRANULARITIES: dict[str, tuple[int, int]] = {"entry": (1, 1), "row_block_16": (1, 16), "tile_16x16": (16, 16)}


@dataclass(frozen=True)
class Shape:
    """A product: `rows` queries against `columns` keys (or outputs), each entry a sum of `depth` terms.

    Raises
    ------
    ValueError
        A size below 1.
    """

    rows: int
    columns: int
    depth: int
    #: Row i sees the columns 0..i only (rows = columns).
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"shape with {name}={getattr(self, name)}: at least 1 is needed")
        if self.causal and self.rows != self.columns:
            raise ValueError(f"causal shape {self.rows} x {self.columns}: rows and columns must be equal")

    @property
    def entries(self) -> int:
        """E, the eligible entries."""
        return self.rows * (self.rows + 1) // 2 if self.causal else self.rows * self.columns


@dataclass(frozen=True)
class CostModel:
    """The unit costs; change what you know better about your hardware.

    Raises
    ------
    ValueError
        A negative cost.
    """

    #: c_low: a multiply-add into the narrow accumulator, in float32 multiply-adds; None: bits of the format / 32.
    low: float | None = None
    #: c_error: one step of the running sum of squares that error estimates need; None: as c_low. The simulation
    #: carries it in float32.
    error: float | None = 1.0
    #: c_distance: a multiply-add of what output-aware rules need (values as long as keys); None: as c_low.
    distance: float | None = 1.0
    #: a': entries whose distance must be formed, for each entry recomputed: 1.5 to 2.7 were counted, the more the lower
    #: the rate (docs/study).
    candidates: float = 2.7
    #: c_op: an elementary operation of a rule (a comparison, a product).
    operation: float = 1.0
    #: a: elementary operations of f to repeat for a recomputed entry: subtract, exponential, twice renormalise.
    apply: float = 4.0
    #: b_low and b: bytes of an operand's element in the low pass and in full precision. Only accumulators are narrow
    #: in the simulation; a low-bit copy of the operands has 1 or 0.5.
    low_bytes: float = 4.0
    full_bytes: float = 4.0

    def __post_init__(self) -> None:
        for name in (
            "low",
            "error",
            "distance",
            "candidates",
            "operation",
            "apply",
            "low_bytes",
            "full_bytes",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"cost {name}={value}: it can't be negative")

    def multiply_add(self, accumulator: Accumulator) -> float:
        """Cost of one step of the low pass, the promotion's or the block's float32 additions included."""
        narrow = format_bits(accumulator.format) / 32 if self.low is None else self.low
        if accumulator.block > 1:
            return 1 + narrow / accumulator.block
        return narrow + (1 / accumulator.promote if accumulator.promote else 0.0)

    def look_ahead(self, rule: Rule, shape: Shape, accumulator: Accumulator, rate: float) -> float:
        """Operations of the selection at an entry rate, relative to full precision; none for a random control."""
        if rule.role == "control":
            return 0.0
        narrow = format_bits(accumulator.format) / 32 if self.low is None else self.low
        total = rule.operations * self.operation / shape.depth
        if "squares" in rule.byproducts:
            total += narrow if self.error is None else self.error
        if "distances" in rule.further_work:
            total += rate * (1 + self.candidates) * (narrow if self.distance is None else self.distance)
        if "norms" in rule.further_work:
            total += (shape.rows + shape.columns) / shape.entries
        return total


@dataclass(frozen=True)
class Cost:
    """Cost of one policy at one granularity, in units of full precision (1 = the same)."""

    granularity: str
    #: p, the share of units recomputed.
    touched: float
    #: True: `touched` was derived from the entry rate as if entries were independent.
    estimated: bool
    #: Operations, relative.
    low_pass: float
    look_ahead: float
    recompute: float
    #: Bytes of operands, relative.
    low_pass_bytes: float
    recompute_bytes: float
    #: p*: share of units recomputed at which the operations equal full precision's; 0 if there is no gain at all.
    break_even: float
    #: False for an oracle: it needs the full-precision result, which isn't counted.
    realisable: bool
    #: Operations of the transforms of the operands, relative.
    transforms: float = 0.0

    @property
    def total(self) -> float:
        """Operations relative to full precision."""
        return self.low_pass + self.look_ahead + self.transforms + self.recompute

    @property
    def total_bytes(self) -> float:
        """Bytes relative to full precision."""
        return self.low_pass_bytes + self.recompute_bytes


def format_bits(format: Format) -> int:
    """Storage bits: sign, exponent and mantissa. PS(mu) has float32's 8 exponent bits, so ps4 has 13."""
    grid = format.grid
    # Codes of the normal numbers' exponents, and one more for zero and the subnormals.
    codes = grid.max_exponent - grid.min_exponent + 2
    return int(grid.signed) + (codes - 1).bit_length() + grid.mantissa_bits


def touched_rates(
    rate: float, block_rates: Mapping[str, float] | None = None
) -> dict[str, tuple[float, bool]]:
    """Share of touched units at each granularity, and whether it was estimated from the entry rate.

    Raises
    ------
    ValueError
        A rate outside [0, 1].
    """
    measured = dict(block_rates or {}) | {"entry": rate}
    for name, value in measured.items():
        if not 0 <= value <= 1:
            raise ValueError(f"recompute rate {value} at granularity {name!r}: it must be in [0, 1]")
    return {
        name: (measured[name], False) if name in measured else (_any_of(rate, rows * columns), True)
        for name, (rows, columns) in GRANULARITIES.items()
    }


def _any_of(rate: float, count: int) -> float:
    """1 - (1 - rate)^count, accurate for small rates."""
    return -math.expm1(count * math.log1p(-rate)) if rate < 1 else 1.0


def costs(
    shape: Shape,
    accumulator: str | Accumulator,
    rule: str | Rule,
    rate: float,
    block_rates: Mapping[str, float] | None = None,
    model: CostModel | None = None,
    *,
    transforms: Iterable[str | Transform] = (),
    calibrated: bool = False,
) -> dict[str, Cost]:
    """The cost of a site's policy at every granularity, by the formulas at the head of this module.

    Parameters
    ----------
    shape : Shape
        Of the product.
    accumulator, rule : str or object
        Of the site. Random rules are controls and count no look-ahead; an oracle counts its low pass and what it
        recomputes, a lower bound.
    rate : float
        Recompute rate of entries, a share of 1.
    block_rates : mapping, optional
        Measured shares of touched units, keys of `GRANULARITIES` (`Result.block_rates`).
    model : CostModel, optional
        The unit costs; by default those of `CostModel()`.
    transforms : sequence of str or Transform
        Of the operands: of both in a causal shape, which are scores; of the left one, the inputs, elsewhere.
    calibrated : bool
        Whether the transforms' statistics come from another text, and cost nothing here.

    Raises
    ------
    ValueError
        A rate outside [0, 1], an unknown spelling.
    """
    model = CostModel() if model is None else model
    accumulator, rule = Accumulator.parse(accumulator), Rule.parse(rule)
    k = shape.depth
    low = model.multiply_add(accumulator)
    look = model.look_ahead(rule, shape, accumulator, rate)
    changed = 0.0
    right = shape.columns if shape.causal else 0
    for transform in map(Transform.parse, transforms):
        changed += transform.operations(shape.rows, right, k, fitted=not calibrated) / (shape.entries * k)
        changed += transform.operations_a_sum() / k if shape.causal else 0.0
    again = 1 + model.apply / k
    result = {}
    for name, (touched, estimated) in touched_rates(rate, block_rates).items():
        rows, columns = GRANULARITIES[name]
        vectors = touched * shape.entries / (rows * columns) * (rows + columns)
        operands = shape.rows + shape.columns
        result[name] = Cost(
            granularity=name,
            touched=touched,
            estimated=estimated,
            low_pass=low,
            look_ahead=look,
            recompute=touched * again,
            low_pass_bytes=model.low_bytes / model.full_bytes,
            recompute_bytes=min(vectors, operands) / operands,
            break_even=min(max((1 - low - look - changed) / again, 0.0), 1.0),
            realisable=rule.role != "oracle",
            transforms=changed,
        )
    return result
