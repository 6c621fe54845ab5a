import math

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import Domain, FormatInfo, RoundMode, round_ndarray
from gfloat import formats as gf
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.arithmetic import Format, round_to

ML_DTYPES = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
    "e2m3fn": ml_dtypes.float6_e2m3fn,
    "e3m2fn": ml_dtypes.float6_e3m2fn,
}
#: They can't hold NaN; ours keeps it in its float32 container.
WITHOUT_NAN = {"e2m1fn", "e2m3fn", "e3m2fn"}


def generic(exponent_bits, mantissa_bits):
    """gfloat's description of our eXmY."""
    return FormatInfo(
        f"e{exponent_bits}m{mantissa_bits}",
        k=1 + exponent_bits + mantissa_bits,
        precision=mantissa_bits + 1,
        bias=2 ** (exponent_bits - 1) - 1,
        is_signed=True,
        domain=Domain.Extended,
        has_nz=True,
        num_high_nans=2**mantissa_bits - 1,
        has_subnormals=True,
        is_twos_complement=False,
    )


GFLOAT = {
    "fp32": gf.format_info_binary32,
    "fp16": gf.format_info_binary16,
    "bf16": gf.format_info_bfloat16,
    "e5m2": gf.format_info_ocp_e5m2,
    "e4m3fn": gf.format_info_ocp_e4m3,
    "e2m1fn": gf.format_info_ocp_e2m1,
    "e2m3fn": gf.format_info_ocp_e2m3,
    "e3m2fn": gf.format_info_ocp_e3m2,
    "tf32": generic(8, 10),
    **{f"ps{mu}": generic(8, mu) for mu in (1, 2, 4, 7, 13, 22)},
    **{f"e{x}m{y}": generic(x, y) for x, y in ((2, 1), (2, 5), (3, 4), (4, 3), (6, 20), (7, 23))},
}


def inputs():
    """All 16-bit patterns as bfloat16 and float16, and random float32 patterns, part of them subnormal."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2**17,), generator=generator).to(torch.int32)
    subnormal = torch.randint(2**23, (2**13,), generator=generator).to(torch.int32)
    # values of ordinary size, where the small formats have their numbers
    ordinary = torch.randn(2**16, generator=generator)
    ordinary = ordinary * torch.exp2(torch.randint(-24, 17, (2**16,), generator=generator).float())
    parts = [patterns.view(torch.bfloat16), patterns.view(torch.float16), random.view(torch.float32)]
    parts += [subnormal.view(torch.float32), -subnormal.view(torch.float32), ordinary]
    return torch.cat([part.float() for part in parts])


INPUTS = inputs()


def assert_same(got, want):
    """Equal bit for bit, any NaN being equal to any other."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype == np.float32
    differ = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
    assert not differ.any(), f"{differ.sum()} differ, such as {got[differ][0]!r}, not {want[differ][0]!r}"


@pytest.mark.parametrize("name", ML_DTYPES)
def test_nearest_even_equals_ml_dtypes(name):
    x = INPUTS[~INPUTS.isnan()] if name in WITHOUT_NAN else INPUTS
    with np.errstate(all="ignore"):
        want = x.numpy().astype(ML_DTYPES[name]).astype(np.float32)
    assert_same(round_to(x, name), want)


@pytest.mark.parametrize("name", GFLOAT)
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("mode", ["nearest_even", "toward_zero"])
def test_modes_and_saturation_equal_gfloat(name, saturate, mode):
    x = INPUTS[~INPUTS.isnan()] if name in WITHOUT_NAN else INPUTS
    gfloat_mode = RoundMode.TiesToEven if mode == "nearest_even" else RoundMode.TowardZero
    with np.errstate(all="ignore"):
        want = round_ndarray(
            GFLOAT[name], x.numpy().astype(np.float64), gfloat_mode, sat=saturate or name in WITHOUT_NAN
        )
        want = want.astype(np.float32)
    assert_same(round_to(x, f"{name}-sat" if saturate else name, mode), want)


@pytest.mark.parametrize("name", GFLOAT)
def test_flush_takes_the_subnormal_results_away(name):
    flushed, kept = round_to(INPUTS, f"{name}-flush"), round_to(INPUTS, name)
    small = kept.abs() < Format.parse(name).smallest_normal
    assert_same(flushed[~small], kept[~small])
    assert_same(flushed[small], torch.copysign(torch.zeros(1), kept[small]))


@pytest.mark.parametrize("name", ["ue5m3", "ue4m3", "ue8m7", "ue2m1"])
def test_unsigned_formats_are_the_positive_half(name):
    rounded = round_to(INPUTS, name)
    negative = INPUTS.signbit() & ~INPUTS.isnan()
    assert_same(rounded[~negative], round_to(INPUTS, name[1:])[~negative])
    assert_same(rounded[negative], torch.zeros(int(negative.sum())))


def test_numbers_by_hand():
    x = torch.tensor(
        [1.0625, 1.1875, -1.1875, 448.0, 464.0, 465.0, 0.0009765625, 0.00097657, -1e-9, math.inf]
    )
    want = torch.tensor([1.0, 1.25, -1.25, 448.0, 448.0, math.nan, 0.0, 0.001953125, -0.0, math.nan])
    assert_same(round_to(x, "e4m3fn"), want)
    want[[5, 9]] = 448.0
    assert_same(round_to(x, "e4m3fn-sat"), want)
    assert_same(round_to(torch.tensor([3.4e38, -3.4e38]), "ps4"), torch.tensor([math.inf, -math.inf]))
    assert_same(
        round_to(torch.tensor([3.4e38, -3.4e38]), "ps4-sat"), torch.tensor([1, -1]) * Format.parse("ps4").max
    )


@pytest.mark.parametrize("name", ["ps4", "bf16", "e4m3fn", "fp16", "e2m1fn", "ps4-flush"])
def test_stochastic_rounding_picks_neighbours_with_the_right_expectation(name):
    generator = torch.Generator().manual_seed(0)
    draws = 40_000
    for value in (1.03, -1.7, 0.3, 0.011, -0.0004):
        x = torch.full((draws,), value)
        rounded = round_to(x, name, "stochastic", generator)
        down = round_to(x[:1], name, "toward_zero").item()
        found = sorted({abs(v) for v in rounded.tolist()})
        assert found[0] >= abs(down)
        assert len(found) <= 2
        if name.endswith("flush") or len(found) == 1:
            continue
        gap = found[1] - found[0]
        assert round_to(torch.tensor(found), name).tolist() == found
        # six standard deviations of a mean of coin flips at their widest
        assert abs(rounded.double().mean().item() - x[0].double().item()) <= 6 * gap * 0.5 / math.sqrt(draws)


def test_stochastic_rounding_of_numbers_far_below_the_spacing():
    # A 32nd of the smallest subnormal number goes up once in 32 times, zero never.
    spacing = Format.parse("e4m3fn").smallest_subnormal
    x = torch.full((100_000,), spacing / 32)
    rounded = round_to(x, "e4m3fn", "stochastic", torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {0.0, spacing}
    assert abs((rounded > 0).double().mean().item() - 1 / 32) < 6 * math.sqrt(1 / 32 / 100_000)
    zeros = round_to(torch.zeros(1000), "e4m3fn", "stochastic", torch.Generator())
    assert (zeros == 0).all()


@pytest.mark.parametrize("name", ["ps4", "e4m3fn", "fp16", "ps23", "e5m2-sat"])
def test_stochastic_rounding_keeps_what_needs_no_rounding(name):
    exact = round_to(INPUTS, name)
    assert_same(round_to(exact, name, "stochastic", torch.Generator().manual_seed(1)), exact)


def test_stochastic_rounding_follows_its_generator():
    x = torch.randn(1000)
    one, two, other = (round_to(x, "ps3", "stochastic", torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
signed_names = st.sampled_from(
    [
        "ps1",
        "ps4",
        "ps7",
        "ps22",
        "ps23",
        "bf16",
        "tf32",
        "fp16",
        "e4m3fn",
        "e4m3fnuz",
        "e5m2",
        "e2m1fn",
        "e3m9",
    ]
)
modifiers = st.sampled_from(["", "-sat", "-flush", "-sat-flush"])
names = st.builds(str.__add__, signed_names, modifiers)
modes = st.sampled_from(["nearest_even", "toward_zero"])


def rounded(x, name, mode="nearest_even"):
    return round_to(torch.tensor(x, dtype=torch.float32), name, mode).item()


@given(finite, names, modes)
def test_rounding_is_idempotent(x, name, mode):
    once = rounded(x, name, mode)
    twice = rounded(once, name, mode)
    assert twice == once or (math.isnan(once) and math.isnan(twice))


@given(finite, finite, names, modes)
def test_rounding_is_monotone(x, y, name, mode):
    low, high = rounded(min(x, y), name, mode), rounded(max(x, y), name, mode)
    assert low <= high or math.isnan(low) or math.isnan(high)


@given(finite, names, modes)
def test_rounding_is_symmetric(x, name, mode):
    positive, negative = rounded(x, name, mode), rounded(-x, name, mode)
    assert positive == -negative or (math.isnan(positive) and math.isnan(negative))


@given(finite, signed_names)
def test_the_relative_error_is_at_most_the_unit_roundoff(x, name):
    format = Format.parse(name)
    if format.smallest_normal <= abs(x) <= format.max:
        assert abs(rounded(x, name) - x) <= format.unit_roundoff * abs(x)
        toward_zero = rounded(x, name, "toward_zero")
        assert abs(toward_zero) <= abs(x)
        assert abs(toward_zero - x) < 2 * format.unit_roundoff * abs(x)


@given(finite, signed_names)
def test_the_absolute_error_below_the_normal_numbers_is_half_a_spacing(x, name):
    format = Format.parse(name)
    if abs(x) < format.smallest_normal:
        assert abs(rounded(x, name) - x) <= format.smallest_subnormal / 2


@given(finite, names)
def test_toward_zero_never_overflows(x, name):
    assert abs(rounded(x, name, "toward_zero")) <= min(abs(x), Format.parse(name).max)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_tensors_are_widened(dtype):
    x = torch.randn(100).to(dtype)
    assert_same(round_to(x, "e4m3fn"), round_to(x.float(), "e4m3fn"))


@pytest.mark.parametrize("name", ["ps4", "e4m3fn", "fp32"])
def test_lazily_negated_views(name):
    # The imaginary part of a conjugate is a view of numbers whose sign is yet to be changed.
    negated = torch.complex(torch.zeros(100), torch.randn(100)).conj().imag
    assert negated.is_neg()
    assert_same(round_to(negated, name), round_to(negated.resolve_neg(), name))


def test_the_result_is_a_new_tensor():
    x = torch.randn(5)
    for name in ("fp32", "ps23", "ps4", "fp16"):
        round_to(x, name).zero_()
    assert (x != 0).all()


def test_wrong_use_is_refused_with_the_way_out():
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"torch\.float64: .*round twice"):
        round_to(x.double(), "ps4")
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        round_to(x.long(), "ps4")
    with pytest.raises(TypeError, match=r"got float: convert with torch\.as_tensor"):
        round_to(1.0, "ps4")
    with pytest.raises(ValueError, match="'stochastic' needs a generator"):
        round_to(x, "ps4", "stochastic")
    with pytest.raises(ValueError, match="unknown mode 'up'; allowed: nearest_even, toward_zero, stochastic"):
        round_to(x, "ps4", "up")
    with pytest.raises(ValueError, match="unknown format 'ps44'"):
        round_to(x, "ps44")


def test_gradients_are_not_lost_in_silence():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        round_to(x, "ps4")
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            assert not round_to(x, "fp32").requires_grad
