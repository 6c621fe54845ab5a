"""Tender's operand: its definition, brute force; its sums in integers and in floats; what is refused."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchlamp
from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.low_operands import left_operand, low_products, right_operand
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.tender import CHUNK, Ranges, Tables


def outliers(rows, channels, seed=0, scale=3.0):
    """Vectors whose channels have very different sizes and means."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(scale * torch.randn(channels, generator=generator))
    means = sizes * torch.randn(channels, generator=generator)
    return torch.randn(rows, channels, generator=generator) * sizes + means


def by_definition(chunk, bits, groups, down=False):
    """Biases, group numbers, scales and codes of one chunk, number by number in float32."""
    f = np.float32
    biases = [f(f(max(c)) / f(2)) + f(f(min(c)) / f(2)) for c in chunk.T]
    reach = [max(abs(f(x) - b) for x in c) for c, b in zip(chunk.T, biases, strict=True)]
    top, largest = max(reach), 2 ** (bits - 1) - 1
    thresholds = [f(top / 2 ** (groups - 1 - i)) for i in range(groups)]
    group = [next(i for i in range(groups) if thresholds[i] >= r) for r in reach]
    if down:
        group = [max(0, i - 1) for i in group]
    scales = [f(f(top) / f(largest)) * f(2.0 ** (i - groups + 1)) for i in range(groups)]
    codes = [
        [min(largest, max(-largest, round(float(f(f(x) - b) / scales[g])))) for x in c]
        for c, b, g in zip(chunk.T, biases, group, strict=True)
    ]
    return np.array(biases), group, scales, np.array(codes).T


@pytest.mark.parametrize(
    ("bits", "groups", "down"), [(4, 8, False), (8, 3, False), (4, 5, True), (2, 1, False)]
)
def test_the_definition_number_by_number(bits, groups, down):
    x = outliers(CHUNK + 40, 12)
    operand = Operand.parse(f"tender{bits}/{groups}{'/down' * down}")
    low = left_operand(x[None], operand, Accumulator.parse("int32/shift"))
    stored = torchlamp.quantise(x, operand)
    for number, chunk in enumerate(x.split(CHUNK)):
        biases, group, scales, codes = by_definition(chunk.numpy(), bits, groups, down)
        rows = slice(number * CHUNK, number * CHUNK + len(chunk))
        assert np.array_equal(low.bias[0, number].numpy(), biases)
        assert np.array_equal(low.codes.powers[0, rows][0].numpy(), group)
        assert np.array_equal(low.codes.codes[0, rows].numpy(), codes)
        values = codes * np.array([scales[g] for g in group])
        assert np.array_equal(low.values[0, rows].numpy(), values.astype(np.float32))
        assert np.array_equal(stored[rows].numpy(), values.astype(np.float32) + biases)


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    groups=st.integers(1, 16),
    rows=st.integers(1, 6),
    depth=st.integers(1, 90),
    scale=st.sampled_from([0.0, 1.0, 4.0]),
)
@settings(max_examples=80, deadline=None)
def test_integers_equal_the_fake_quantised_floats(seed, bits, groups, rows, depth, scale):
    """The register's result is that of exact sums of the dequantised numbers, but for the rounding at its end."""
    x, w = outliers(rows, depth, seed, scale), outliers(5, depth, seed + 1, 0.5)
    operand, accumulator = Operand.parse(f"tender{bits}/{groups}"), Accumulator.parse("int32/shift")
    left = left_operand(x[None], operand, accumulator)
    right = right_operand(w[None], operand, accumulator)
    low = low_products(left, right, accumulator)
    # Codes and scales in rational numbers: the sum of the products of what they stand for.
    a, b = left.codes, right.codes
    for i in range(rows):
        for j in range(5):
            terms = [
                Fraction(float(a.codes[0, i, k]))
                * 2 ** int(a.powers[0, i, k])
                * Fraction(float(b.codes[0, j, k]))
                for k in range(depth)
            ]
            exact = sum(terms) * Fraction(float(a.scales[0, i, 0])) * Fraction(float(b.scales[0, j, 0]))
            if abs(sum(terms)) < 2**31:
                assert low.sums[0, i, j].item() == pytest.approx(float(exact), rel=2**-22)
            else:
                assert bool(low.overflowed[0, i, j])
    floats = low_products(left, right, Accumulator.parse("fp32"))
    sizes = left.values.abs().double() @ right.values.abs().double().mT
    fits = torch.ones_like(low.sums, dtype=torch.bool) if low.overflowed is None else ~low.overflowed
    assert bool(((low.sums - floats.sums).abs() <= 2.0**-20 * sizes)[fits].all())


def test_with_scales_that_are_powers_of_two_both_forms_have_the_same_bits():
    """Then float32 sums are exact, too, as long as they are short."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-7, 8, (6, 40), generator=generator).float() * 2.0 ** torch.arange(40).remainder(5)
    x[0], x[1] = 7 * 2.0 ** torch.arange(40).remainder(5), -7 * 2.0 ** torch.arange(40).remainder(5)
    w = torch.randint(-7, 8, (9, 40), generator=generator).float()
    w[:, 0] = 7
    shifted = torchlamp.matmul(x, w.T, "int32/shift", operands="tender4/8")
    assert torch.equal(shifted, torchlamp.matmul(x, w.T, "fp32", operands="tender4/8"))
    assert torch.equal(shifted, torchlamp.matmul(x, w.T, "int32", operands="tender4/8"))
    assert torch.equal(shifted, (x.double() @ w.double().T).float())


@pytest.mark.parametrize("accumulator", ["int32/shift", "int32", "fp32", "ps4"])
def test_the_bias_is_added_back_with_weights_in_full(accumulator):
    """Vectors that are all alike are nothing but bias."""
    x = outliers(1, 33).expand(20, 33)
    w = outliers(7, 33, 5)
    found = torchlamp.matmul(x, w.T, accumulator, operands="tender4/8")
    torch.testing.assert_close(found, x @ w.T, rtol=1e-5, atol=1e-4)


def test_more_groups_follow_channels_of_different_sizes():
    x, w = outliers(64, 96, scale=1.5), torch.randn(32, 96, generator=torch.Generator().manual_seed(9))
    exact = x.double() @ w.double().T
    errors = []
    for operand in ("tender8/1", "tender8/3", "tender8/5"):
        low = left_operand(x[None], Operand.parse(operand), Accumulator.parse("fp32"))
        errors.append(float((low.values - low.exact)[0].norm(dim=0).median()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert (
        torchlamp.matmul(x, w.T, "int32/shift", operands="tender8/12") - exact
    ).norm() < 0.02 * exact.norm()


def test_chunks_dont_see_each_other():
    x, w = outliers(2 * CHUNK + 7, 20), outliers(6, 20, 2)
    whole = torchlamp.matmul(x, w.T, "int32/shift", operands="tender4/8")
    parts = [torchlamp.matmul(part, w.T, "int32/shift", operands="tender4/8") for part in x.split(CHUNK)]
    assert torch.equal(whole, torch.cat(parts))


def test_batches_dont_see_each_other_either():
    x, w = torch.stack([outliers(9, 20), outliers(9, 20, 4)]), outliers(6, 20, 2)
    whole = torchlamp.matmul(x, w.T, "int32/shift", operands="tender4/8")
    assert torch.equal(whole[1], torchlamp.matmul(x[1], w.T, "int32/shift", operands="tender4/8"))


@pytest.mark.parametrize("accumulator", ["int32/shift", "int32", "fp32"])
def test_what_isnt_finite_makes_its_chunk_nan(accumulator):
    x, w = outliers(CHUNK + 3, 8), outliers(4, 8, 2)
    x[CHUNK + 1, 3] = torch.inf
    found = torchlamp.matmul(x, w.T, accumulator, operands="tender4/8")
    assert found[:CHUNK].isfinite().all()
    assert found[CHUNK:].isnan().all()
    w[2, 1] = torch.nan
    found = torchlamp.matmul(x[:CHUNK], w.T, accumulator, operands="tender4/8")
    assert found.isnan().any(0).tolist() == [False, False, True, False]


def test_zeros_stay_zeros():
    zeros = torch.zeros(3, 8)
    assert torch.equal(
        torchlamp.matmul(zeros, torch.randn(8, 2), "int32/shift", operands="tender4/8"), zeros[:, :2]
    )
    assert torch.equal(torchlamp.quantise(zeros, "tender4/8"), zeros)


def test_calibrated_ranges_clip_and_end():
    x = outliers(CHUNK, 10)
    ranges = Ranges.of(x[None, :30])
    tables = Tables.of(ranges, Operand.parse("tender4/8").block)
    assert tables.codes(x[None])[1].codes.abs().max() == 7
    with pytest.raises(ValueError, match="257 rows are 2 chunks of 256, and Tender was calibrated on 1"):
        tables.codes(torch.cat([x, x[:1]])[None])


def test_ranges_join_by_chunk():
    x, y = outliers(CHUNK + 5, 4), outliers(30, 4, 8)
    joined = Ranges.of(y[None]).joined(Ranges.of(x[None]))
    assert torch.equal(joined.low[0, 0], torch.cat([x[:CHUNK], y]).amin(0))
    assert torch.equal(joined.high[0, 1], x[CHUNK:].amax(0))


def test_overflow_is_said_and_wraps():
    x, w = torch.full((1, 40000), 32767.0), torch.full((40000, 1), 32767.0)
    with pytest.warns(RuntimeWarning, match="1 of 1 sums don't fit the register of int32 and wrapped around"):
        found = torchlamp.matmul(x, w, "int32")
    exact = 40000 * 32767**2
    assert found.item() == float(np.float32((exact + 2**31) % 2**32 - 2**31))


def test_whole_numbers_need_no_operand():
    a, b = torch.tensor([[3.0, -4.0]]), torch.tensor([[5.0], [6.0]])
    assert torchlamp.matmul(a, b, "int32").item() == -9
    with pytest.raises(ValueError, match="'int32' sums integers: give operands='int8/row'"):
        torchlamp.matmul(a + 0.5, b, "int32")


def test_groups_of_32_are_exact_inside_and_float32_across():
    x, w = outliers(3, 70), outliers(4, 70, 3)
    a, b = torchlamp.quantise(x, "int8"), torchlamp.quantise(w, "int8")
    total = torch.zeros(3, 4)
    for first in range(0, 70, 32):
        some = slice(first, first + 32)
        total = total + (a[:, some].double() @ b[:, some].double().T).float()
    found = torchlamp.matmul(x, w.T, "int32", operands="int8")
    torch.testing.assert_close(found, total, rtol=2e-6, atol=1e-5 * float(total.abs().max()))


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("tender4", "Tender is tenderB/G with B = 2 to 8 bits and G = 1 to 24 groups"),
        ("tender9/8", "write for example 'tender4/8'"),
        ("tender4/25", "G = 1 to 24"),
        ("tender4/0", "G = 1 to 24"),
        ("tender4/8/up", "and /down behind it"),
    ],
)
def test_what_is_no_tender(spelling, message):
    with pytest.raises(ValueError, match=message) as caught:
        Operand.parse(spelling)
    assert repr(spelling) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("int32", "'int32' sums integers, and operand 'float32' has none: write for example 'int8@int32'"),
        ("qkv=mxfp4@int32", "operand 'mxfp4' has none"),
        ("qkv=e4m3fn/row@int32/shift", "write for example 'tender4/8@int32/shift'"),
        ("qkv=int8@int32/shift", "write 'int8@int32', 'int8/row@int32/shift' or 'tender8/8@int32/shift'"),
        ("int8@int32/block4", "registers that sum integers are int32, int32/shift"),
        ("norm=int32", "sums integers"),
        ("norm=tender4/8", "can't be used at the site norm"),
        ("tender4/88", "tenderB/G"),
    ],
)
def test_operands_that_a_register_doesnt_take(policy, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        torchlamp.Policy.parse(policy)


@pytest.mark.parametrize(
    ("given_as", "printed"),
    [
        ("tender4/8", "tender4/8@int32/shift+none"),
        ("qkv=int8/32@int32", "qkv=int8@int32+none"),
        ("mlp_up=tender4/8@int32/shift+output:0.01", "mlp_up=tender4/8@int32/shift+output:0.01"),
        ("values=tender8/16/down@int32", "values=tender8/16/down@int32+none"),
        ("int8/row@int32/shift.center", "int8/row@int32/shift.center+none"),
    ],
)
def test_spellings(given_as, printed):
    policy = torchlamp.Policy.parse(given_as)
    assert str(policy) == printed
    assert torchlamp.Policy.parse(printed) == policy
