"""What an attention call is given, what it returns, and what an observer sees of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import Transform
from torchlamp.rules.rule import Rule
from torchlamp.rules.tile import Tile
from torchlamp.simulation.ahead import Ahead
from torchlamp.simulation.score_biases import ScoreRanges
from torchlamp.simulation.score_operands import ScoreMoments
from torchlamp.simulation.stored_attention import (
    KeyStorage,
    StoredValues,
)
from torchlamp.simulation.values import Values
from torchlamp.simulation.visibility import Visibility

_AS_THEY_ARE = Operand()


@dataclass(frozen=True)
class AttentionResult:
    """What an attention call returns.

    Attributes
    ----------
    output : Tensor
        float32 (batch, queries, heads, value size), contiguous.
    eligible, selected : Tensor
        int64 (batch, heads, queries): visible keys of each row, and how many of its scores were recomputed.
    last_key : Tensor
        int64 (batch, queries): index of the last key that any head of the query sees, -1 where none does.
    values_selected : Tensor or None
        int64 (batch, heads, queries): how many numbers of each row's output were recomputed, if values are summed in
        low precision.
    blocks : Tensor or None
        uint8 (batch, heads, queries, ceil(keys / 16)), if asked for: the marks of `torchlamp.simulation.blocks`.
    doubt : pair of int or None
        Rows that were looked at, and those of them in which the low pass isn't to be trusted
        (`torchlamp.simulation.doubt`).
    overflowed, values_overflowed : int
        Visible scores, and sums of values, that didn't fit an integer register.
    tiles : Tensor or None
        int64, the counts of an online softmax's tiles (`torchlamp.simulation.tile_counts`).
    """

    output: Tensor
    eligible: Tensor
    selected: Tensor
    last_key: Tensor
    values_selected: Tensor | None = None
    blocks: Tensor | None = None
    doubt: tuple[int, int] | None = None
    overflowed: int = 0
    values_overflowed: int = 0
    tiles: Tensor | None = None


@dataclass(frozen=True)
class Observation:
    """What an observer sees of a tile, after the selection and before the recomputation.

    The tensors of `tile` and `chosen` are (1, heads, rows, keys). The tile's scores change after the call: an observer
    copies what it keeps and asks the tile before it returns.
    """

    sample: int
    rows: range
    #: Number of the tile's first key.
    first_key: int
    tile: Tile
    #: bool: the entries that will be recomputed.
    chosen: Tensor

    @property
    def exact(self) -> Tensor:
        """The visible scores in float32, as the recomputation gives them; (1, heads, rows, keys)."""
        return self.tile.exact


@dataclass(frozen=True)
class AttentionCall:
    """How an attention runs: all that is given beside query, key and value, see `attention`."""

    accumulator: Accumulator
    rule: Rule
    #: Factor of the scores, commonly 1 / sqrt(size).
    scaling: float
    #: Mask, causality and bias.
    seen: Visibility = field(default_factory=Visibility)
    #: c > 0: logits are c tanh(score / c). None: no softcap.
    softcap: float | None = None
    #: float32 (heads,): a logit per head that enters the normaliser but has no value.
    sinks: Tensor | None = None
    #: On the CPU; needed by random rules and rounding. Every sample starts from the state it has now.
    generator: torch.Generator | None = None
    #: Called with an `Observation` of every tile that sees a key; the fused kernel, which has no tiles, is not used.
    observe: Callable[[Observation], None] | None = None
    #: How the values are summed, or read; None: in float32.
    values: Values | StoredValues | None = None
    #: How queries and keys are stored in the low pass.
    operand: Operand = _AS_THEY_ARE
    #: Exact changes of queries and keys before they are stored or summed, in the order they are applied.
    transforms: tuple[Transform, ...] = ()
    #: Calibrated statistics that the transforms are fitted to; None: those of the call's own queries and keys.
    moments: ScoreMoments | None = None
    #: Calibrated ranges for Tender's operand; None: those of the call's own queries and keys.
    ranges: ScoreRanges | None = None
    #: How the keys are stored; the accumulator isn't used then. None: as they are.
    keys: KeyStorage | None = None
    #: What follows the heads' outputs; rules that look as far as the residual stream need it.
    ahead: Ahead | None = None
    #: Number of the layer, for rules that choose by it.
    layer: int = 0
    #: Whether to mark which blocks of 16 keys are seen and touched.
    blocks: bool = False

    @property
    def error_scale(self) -> float:
        """Factor from the root of a running sum of squares to the expected error of a score."""
        return self.accumulator.unit_roundoff / 2 * abs(self.scaling)
