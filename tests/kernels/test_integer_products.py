"""Sums of integers in a register: the fast way, its reference, and a machine integer that really wraps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.kernels.integer_products import Codes, Register, integer_products
from torchlamp.kernels.reference_integers import integer_products_reference


def codes(generator, batch, vectors, depth, bits, length, groups=1):
    largest = 2 ** (bits - 1) - 1
    shape = (batch, vectors, depth)
    values = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    if bits > 12:  # mostly extreme, so that sums overflow
        values = torch.where(values < 0, -float(largest), float(largest))
    scales = torch.rand(batch, vectors, -(-depth // length), generator=generator) + 0.1
    powers = torch.randint(0, groups, shape, generator=generator).float() if groups > 1 else None
    return Codes(values, scales, largest, length, powers, groups)


@given(
    seed=st.integers(0, 2**32),
    bits=st.tuples(st.sampled_from([2, 4, 8, 16]), st.sampled_from([2, 4, 8, 16])),
    shape=st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 70)),
    lengths=st.tuples(st.sampled_from([3, 8, 70]), st.sampled_from([3, 12, 70])),
    groups=st.sampled_from([1, 2, 5, 24]),
    shift=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_the_fast_way_equals_the_register_step_by_step(seed, bits, shape, lengths, groups, shift):
    generator = torch.Generator().manual_seed(seed)
    shared, repeats, rows, depth = shape
    if shift:
        lengths = (70, 70)
    if groups > 1:
        bits = (min(bits[0], 8), min(bits[1], 8))
    left = codes(generator, shared * repeats, rows, depth, bits[0], lengths[0], groups)
    right = codes(generator, shared, 3, depth, bits[1], lengths[1])
    register = Register(32, shift)
    found, overflowed = integer_products(left, right, register)
    expected, wrapped = integer_products_reference(left, right, register)
    assert torch.equal(found, expected)
    assert torch.equal(torch.zeros_like(wrapped) if overflowed is None else overflowed, wrapped)


def machine(a, b, powers, groups):
    """The register as a machine has it: NumPy's int32, which wraps around."""
    with np.errstate(over="ignore"):
        register = np.int32(0)
        for power in range(groups - 1, -1, -1):
            register = np.left_shift(register, np.int32(1))
            for x, y, own in zip(a, b, powers, strict=True):
                if own == power:
                    register = np.int32(register + np.int32(x) * np.int32(y))
        return int(register)


@given(data=st.data(), groups=st.integers(1, 24), depth=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_a_shifted_register_equals_int32_and_says_when_64_bits_differ(data, groups, depth):
    draw = st.lists(st.integers(-127, 127), min_size=depth, max_size=depth)
    a, b = data.draw(draw), data.draw(draw)
    powers = data.draw(st.lists(st.integers(0, groups - 1), min_size=depth, max_size=depth))
    ones = torch.ones(1, 1, 1)
    left = Codes(torch.tensor([[a]]).float(), ones, 127, depth, torch.tensor([[powers]]).float(), groups)
    right = Codes(torch.tensor([[b]]).float(), ones, 127, depth)
    found, overflowed = integer_products(left, right, Register(32, shift=True))
    exact = sum(x * y * 2**p for x, y, p in zip(a, b, powers, strict=True))
    assert found.item() == float(np.float32(machine(a, b, powers, groups)))
    fits = -(2**31) <= exact < 2**31
    assert (overflowed is not None and bool(overflowed)) != fits
    if fits:
        assert found.item() == float(np.float32(exact))


@pytest.mark.parametrize(
    ("a", "b", "exact", "fits"),
    [
        ([32767, 32767, 1], [32767, 32767, 131069], 2**31 - 1, True),
        ([-32768, -32768], [32767, 32767], -(2**31) + 65536, True),
        ([-32768, -32768], [32768, 32768], -(2**31), True),
        ([32768, 32768], [32768, 32768], 2**31, False),
        # On the way it wraps twice; what stands there at the end is right.
        ([32767] * 4 + [-32767] * 4, [32767] * 8, 0, True),
    ],
)
def test_the_edges_of_the_register(a, b, exact, fits):
    ones, depth = torch.ones(1, 1, 1), len(a)
    left = Codes(torch.tensor([[a]]).float(), ones, 2**15, depth)
    right = Codes(torch.tensor([[b]]).float(), ones, 2**17, depth)
    assert exact == sum(x * y for x, y in zip(a, b, strict=True))
    found, overflowed = integer_products(left, right, Register())
    assert bool(overflowed) != fits
    assert found.item() == float(np.float32(exact if fits else exact - 2**32))


def test_scaling_and_causality():
    generator = torch.Generator().manual_seed(3)
    left, right = codes(generator, 2, 5, 9, 8, 9), codes(generator, 2, 5, 9, 8, 9)
    plain, _ = integer_products(left, right, Register())
    found, _ = integer_products(left, right, Register(), scaling=0.3, causal=1)
    assert torch.equal(found, (plain * torch.tensor(0.3)).tril(1))


def test_nothing_to_sum_is_zero():
    empty = Codes(torch.zeros(1, 2, 0), torch.zeros(1, 2, 1), 7, 1)
    assert torch.equal(integer_products(empty, empty, Register())[0], torch.zeros(1, 2, 2))
