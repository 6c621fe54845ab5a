import pytest
import torch
from scalar_oracle import round_exact

from operands import FORMATS, draw, same_bits
from torchlamp.arithmetic import Format
from torchlamp.kernels.rounding import round_to_grid
from torchlamp.kernels.specification import Grid

#: Corners that no named format reaches.
GRIDS = [Format.parse(name).grid for name in FORMATS] + [
    Grid(mantissa_bits=3, min_exponent=-125),
    Grid(mantissa_bits=23, min_exponent=-125, max_exponent=126),
    Grid(mantissa_bits=1, min_exponent=0, max_exponent=0),
    Grid(mantissa_bits=5, min_exponent=-100, max_exponent=100, top_codes_lost=7, overflow="nan"),
    Grid(mantissa_bits=23, overflow="nan"),
    Grid(mantissa_bits=23, subnormals=False),
    Grid(mantissa_bits=23, signed=False, negative_zero=False),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_even_equals_exact_rational_rounding(grid):
    near_the_range = torch.exp2(
        torch.linspace(grid.min_exponent - grid.mantissa_bits - 3, grid.max_exponent + 2, 1500)
    )
    bounds = torch.tensor(
        [grid.max_value, grid.smallest_normal, 2.0 ** (grid.min_exponent - grid.mantissa_bits)]
    )
    bounds = torch.cat([bounds * f for f in (0.25, 0.5, 0.75, 1.0, 1.5)])
    bounds = torch.cat([bounds, torch.nextafter(bounds, bounds * 2), torch.nextafter(bounds, bounds * 0)])
    x = torch.cat([near_the_range, bounds, draw("extreme", 1500).abs(), draw("special", 300).abs()])
    x = torch.cat([x, -x])
    want = torch.tensor([round_exact(value, grid) for value in x.tolist()], dtype=torch.float64).float()
    assert same_bits(round_to_grid(x, grid), want)


def test_any_shape_and_strides():
    grid = Format.parse("e4m3fn").grid
    x = draw("wide", 6, 8)
    want = round_to_grid(x, grid)
    assert same_bits(round_to_grid(x.T, grid), want.T)
    assert same_bits(round_to_grid(x[::2, 1::3], grid), want[::2, 1::3])
    assert same_bits(round_to_grid(x[:1].expand(4, 8), grid), want[:1].expand(4, 8))
    assert same_bits(round_to_grid(x[2, 3], grid), want[2, 3])
    assert round_to_grid(x[:0], grid).shape == (0, 8)


def test_the_argument_is_left_alone():
    for name in FORMATS:
        x = draw("special", 100)
        before = x.clone()
        round_to_grid(x, Format.parse(name).grid)
        assert same_bits(x, before)
