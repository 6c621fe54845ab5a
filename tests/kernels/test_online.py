"""Formats of an online softmax, its exponentials against exact ones, and its weights against a softmax in float64."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch

import torchlamp
from torchlamp.arithmetic import Accumulator
from torchlamp.kernels.online import exponentials, in_blocks, online_weights, out_of_blocks
from torchlamp.kernels.rounding import round_float64
from torchlamp.kernels.specification import Grid

FORMATS = Accumulator.parse("lamp8").online_formats


def codes(grid, count, step=1):
    """Numbers of an unsigned format in ascending order, from 0."""
    spacing = 2.0 ** (grid.min_exponent - grid.mantissa_bits)
    found = []
    for code in range(0, count, step):
        exponent, fraction = divmod(code, 2**grid.mantissa_bits)
        value = fraction + (2**grid.mantissa_bits if exponent else 0)
        found.append(value * spacing * 2.0 ** max(exponent - 1, 0))
    return found


def nearest(x: Decimal, grid: Grid) -> float:
    """The number of the grid next to x in [0, 1], ties to even."""
    exact = Fraction(x)
    exponent = grid.min_exponent
    while Fraction(2) ** (exponent + 1) <= exact:
        exponent += 1
    quantum = Fraction(2) ** (exponent - grid.mantissa_bits)
    return float(round(exact / quantum) * quantum)


def test_ranges():
    low, high = FORMATS.low, FORMATS.high
    assert (low.max_value, low.overflow) == (448.0, "saturate")
    assert (high.max_value, high.mantissa_bits) == (511.75, 11)
    narrow = FORMATS.exponential(low)
    # 11111000 is 1: the largest exponent of 5 bits, and no mantissa.
    assert codes(narrow, 256)[0b11111000] == 1.0
    assert (narrow.smallest_normal, narrow.max_value) == (2.0**-30, 1.875)
    tiny = torch.tensor([2.0**-33, 2.0**-34 * 1.01, 2.0**-34], dtype=torch.float64)
    assert round_float64(tiny, narrow).tolist() == [2.0**-33, 2.0**-33, 0.0]
    assert torch.equal(
        round_float64(torch.tensor([-1.0, -0.0, 70000.0]).double(), FORMATS.shift(low)),
        torch.tensor([0.0, 0.0, 61440.0]),
    )
    paper = Accumulator.parse("lamp8-ps").online_formats
    assert round_float64(torch.tensor([2.0**-60]).double(), paper.exponential(paper.low)).item() == 2.0**-60


@pytest.mark.parametrize(("scores", "count", "step"), [(FORMATS.low, 256, 1), (FORMATS.high, 2**16, 97)])
def test_exponentials_are_correctly_rounded(scores, count, step):
    """Every 8-bit shift, and many of 16 bits, against decimals of 40 digits."""
    shifts = [s for s in codes(FORMATS.shift(scores), count, step) if s <= 61440]
    shift = torch.tensor(shifts)
    assert torch.equal(round_float64(shift.double(), FORMATS.shift(scores)), shift)
    grid = FORMATS.exponential(scores)
    got = round_float64(torch.exp(-shift.double()), grid).tolist()
    with localcontext() as context:
        context.prec = 40
        assert got == [nearest((-Decimal(s)).exp() if s < 100 else Decimal(0), grid) for s in shifts]


def test_maxima_are_rounded_for_narrow_logits():
    """1.09375 is no e4m3 number: narrow logits are shifted by 1.125, recomputed ones by itself."""
    maximum, logit = torch.tensor([[1.09375]]), torch.tensor([[1.0]])
    one = torch.ones(1, 1, dtype=torch.bool)
    narrow = exponentials(FORMATS, maximum, logit, logit, one, ~one)
    wide = exponentials(FORMATS, maximum, logit, logit, one, one)
    assert narrow.item() == torchlamp.round_to(torch.tensor(-0.125).exp(), "ps3").item()
    assert wide.item() == torchlamp.round_to(torch.tensor(-0.09375).exp(), "ps11").item()
    # A recomputed logit above the maximum counts as if it were the maximum.
    assert exponentials(FORMATS, maximum, logit, logit + 3, one, one).item() == 1.0


def test_wide_formats_give_the_softmax():
    """With as many bits as there are, only the rounding to 21 bits is left, however tiles fall."""
    formats = Accumulator.parse("ps20/online21").online_formats
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 200, generator=g) * 5
    visible = torch.rand(3, 7, 200, generator=g) < 0.7
    chosen, none = torch.ones_like(visible), torch.zeros_like(visible)
    sink = torch.tensor([1.0, 4.0, -3.0]).view(3, 1, 1)
    for offset, extra in ((0, None), (17, None), (63, sink)):
        weights = online_weights(
            logits, logits, visible, chosen, none, formats, offset=offset, sink=extra
        ).double()
        masked = logits.double().masked_fill(~visible, -torch.inf)
        if extra is not None:
            masked = torch.cat([masked, extra.double().expand(3, 7, 1)], -1)
        assert torch.allclose(weights, masked.softmax(-1)[..., :200], rtol=2e-5, atol=1e-12)


def test_blocks():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 37, 100, generator=g)
    for offset in (0, 5, 63):
        blocks = in_blocks(x, offset, 0.0)
        assert blocks.shape == (6, 3, 16, (100 + offset + 63) // 64, 4, 16)
        assert torch.equal(out_of_blocks(blocks, offset, x.shape), x)
        t, s, b = (offset + 40) // 64, (offset + 40) % 64 // 16, (offset + 40) % 16
        assert blocks[4, 1, 2, t, s, b] == x[1, 1, 18, 40]
