import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from scalar_oracle import fmaf

from operands import draw, same_bits
from torchlamp.kernels.fma import fma

floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def by_libm(a, b, c):
    entries = [fmaf(*xyz) for xyz in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    return torch.tensor(entries, dtype=torch.float64).float()


def test_random_patterns():
    a, b, c = (draw("extreme", 40_000, seed=s) for s in range(3))
    assert same_bits(fma(a, b, c), by_libm(a, b, c))


def test_addends_near_the_product():
    # Cancellation, and results that end near a half unit in the last place.
    a, b = (draw("gaussian", 40_000, seed=s) for s in range(2))
    c = torch.nextafter(-(a * b), draw("gaussian", 40_000, seed=2))
    assert same_bits(fma(a, b, c), by_libm(a, b, c))


def test_ties_broken_by_a_tail_far_below():
    # c + a b where a b is half a unit in the last place of c, less 2^-44 of it: beyond what float64 can hold.
    # Rounding the float64 sum to nearest loses that tail, and ties.
    generator = torch.Generator().manual_seed(0)

    def integers(low, high):
        return torch.randint(low, high, (20_000,), generator=generator).float()

    c = torch.exp2(integers(-20, 20)) * (1 + integers(0, 2**23) * 2.0**-23)
    half = torch.exp2(c.log2().floor() - 24)
    n = integers(1, 4)
    a, b = half * (1 + n * 2.0**-22), 1 - n * 2.0**-22
    for x, y, z in [
        (a, b, c),
        (a, b, -c),
        (-a, b, c),
        (-a, b, -c),
        (a, a / half, c),
        (c, half * 2.0**-60, c),
    ]:
        assert same_bits(fma(x, y, z), by_libm(x, y, z))


def test_subnormal_results():
    scale = torch.exp2(torch.randint(-76, -60, (20_000,)).float())
    a, b = draw("gaussian", 20_000) * scale, draw("gaussian", 20_000, seed=1) * scale
    c = draw("gaussian", 20_000, seed=2) * 1e-42
    assert same_bits(fma(a, b, c), by_libm(a, b, c))


def test_special_values():
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-45,
        -1e-45,
        1.1754944e-38,
        3.4028235e38,
        0.1,
    ]
    a, b, c = torch.tensor(list(itertools.product(values, repeat=3)), dtype=torch.float32).unbind(1)
    assert same_bits(fma(a, b, c), by_libm(a, b, c))


def test_shapes_broadcast_in_any_operand():
    a, b, c = draw("gaussian", 3, 1), draw("gaussian", 4), draw("gaussian", 2, 1, 1)
    want = fma(*(x.contiguous() for x in torch.broadcast_tensors(a, b, c)))
    assert same_bits(fma(a, b, c), want)
    assert same_bits(fma(a.double(), b.double(), c), want)


@given(floats, floats, floats)
def test_any_three_numbers(a, b, c):
    a, b, c = (torch.tensor([x], dtype=torch.float32) for x in (a, b, c))
    assert same_bits(fma(a, b, c), by_libm(a, b, c))
