"""Quantised values against the kernels' copies, gfloat, ml_dtypes, and formulas written out in float64."""

import gfloat.block
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.arithmetic import round_to
from torchlamp.arithmetic.operands import BLOCKS
from torchlamp.arithmetic.quantise import quantise
from torchlamp.kernels import reference_lowbit
from torchlamp.kernels.low_bit_matrix import LowBitMatrix

SCALED = ["int4", "int8", "int12", "int8/7", "int5/64", "int8/row", "int8/tensor", "e4m3fn/row", "bf16/row",
          "e5m2/tensor", *BLOCKS]  # fmt: skip
MICROSCALING = {
    "mxfp8": gfloat.formats.format_info_mxfp8_e4m3,
    "mxfp8-e5m2": gfloat.formats.format_info_mxfp8_e5m2,
    "mxfp6": gfloat.formats.format_info_mxfp6_e2m3,
    "mxfp6-e3m2": gfloat.formats.format_info_mxfp6_e3m2,
    "mxfp4": gfloat.formats.format_info_mxfp4_e2m1,
}
ELEMENTS = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
}


def draw(*shape, seed=0, spread=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp(spread * torch.randn(shape, generator=generator))


def hard(columns=64):
    """Rows of ordinary size, of many binades, of zeros, of subnormal numbers, near the largest, and of ties."""
    x = torch.cat([draw(3, columns), draw(3, columns, seed=1, spread=8.0), torch.zeros(5, columns)])
    x[6, : columns // 2] = 1e-44
    x[7] = draw(columns, seed=2) * 1e-40
    x[8, 3] = 3.4e38
    x[9] = draw(columns, seed=3) * 1e38
    x[10] = torch.arange(columns) / 4.0 - 8
    return x


def cast(values, dtype):
    """Float64 numbers in an ml_dtypes format, the largest number in the place of overflow: float64."""
    limit = float(ml_dtypes.finfo(dtype).max)
    return np.clip(values, -limit, limit).astype(dtype).astype(np.float64)


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("columns", [64, 77, 5])
def test_integers_in_groups_of_32_are_the_kernels_copies(bits, columns, implementation):
    x = hard(columns)
    x[2, 1], x[4, 3] = torch.nan, -torch.inf
    codes, scales, _ = reference_lowbit.pack_blocks(x, bits)
    expected = reference_lowbit.unpack_blocks(codes, scales, bits, *x.shape)
    found = quantise(x, f"int{bits}/32")
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    native = LowBitMatrix.pack(x, bits).dequantised()
    torch.testing.assert_close(found, native, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MICROSCALING)
def test_microscaling_formats_are_those_of_gfloat(name):
    x = hard()
    found = quantise(x, name)
    for row, quantised in zip(x, found, strict=True):
        for first in range(0, len(row), 32):
            group = row[first : first + 32].double().numpy()
            expected = gfloat.block.quantize_block(MICROSCALING[name], group, gfloat.block.compute_scale_amax)
            np.testing.assert_array_equal(quantised[first : first + 32].double().numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*MICROSCALING]), st.integers(0, 999), st.integers(-40, 34), st.floats(0, 6))
def test_microscaling_of_any_block_is_that_of_gfloat(name, seed, exponent, spread):
    x = draw(32, seed=seed, spread=spread) * 10.0**exponent
    x = torch.where(x.isfinite(), x, 1.0)
    expected = gfloat.block.quantize_block(
        MICROSCALING[name], x.double().numpy(), gfloat.block.compute_scale_amax
    )
    np.testing.assert_array_equal(quantise(x, name).double().numpy(), expected)


def nvfp4(x):
    """NVFP4 written out: rows (rows, columns), columns a multiple of 16, finite."""
    second = np.float32(np.abs(x).max() / np.float32(6 * 448))
    out = np.zeros(x.shape)
    for row in range(len(x)):
        for first in range(0, x.shape[1], 16):
            group = x[row, first : first + 16].astype(np.float64)
            wanted = np.abs(group).max() / 6 / np.float64(second) if second else 0.0
            scale = np.float32(cast(np.array(wanted), ml_dtypes.float8_e4m3fn)) * second
            if scale > 0:
                out[row, first : first + 16] = cast(group / scale, ml_dtypes.float4_e2m1fn) * scale
    return out.astype(np.float32)


@pytest.mark.parametrize(
    "x",
    [draw(7, 64), draw(5, 48, spread=3.0), draw(4, 32, spread=12.0), torch.zeros(2, 16), hard(), draw(3, 16) * 1e-41],
    ids=["ordinary", "spread", "scales underflow", "zeros", "hard", "subnormal"],
)  # fmt: skip
def test_nvfp4_has_two_levels_of_scales(x):
    np.testing.assert_array_equal(quantise(x, "nvfp4").numpy(), nvfp4(x.numpy()))


def test_nvfp4_scales_that_underflow_take_their_groups_to_zero():
    x = torch.ones(1, 32)
    x[0, 16:] = 2.0**-22  # a scale of 2^-22 / 6 is less than half of 2^-9 / (6 * 448), the smallest there is
    found = quantise(x, "nvfp4")
    assert torch.equal(found[0, 16:], torch.zeros(16))
    torch.testing.assert_close(found[0, :16], torch.ones(16))


@pytest.mark.parametrize("name", ELEMENTS)
def test_formats_without_a_scale_are_those_of_ml_dtypes(name):
    x = hard()
    x[0, :3] = torch.tensor([torch.nan, 0.0, -0.0])
    found = quantise(x, name)
    assert torch.equal(found.nan_to_num(nan=7.0), round_to(x, name).nan_to_num(nan=7.0))
    if name == "e2m1fn":  # a NaN stays NaN, which the element can't hold
        x[0, 0] = 0.0
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            quantise(x, name).numpy(), x.numpy().astype(ELEMENTS[name]).astype(np.float32)
        )


@pytest.mark.parametrize("name", ["fp16", "e4m3fn", "e5m2", "e2m1fn"])
@pytest.mark.parametrize("shared", ["row", "tensor"])
def test_a_scale_takes_the_largest_magnitude_to_the_largest_number(name, shared):
    for x in (draw(9, 33), draw(9, 33, spread=6.0), draw(9, 33) * 1e-30, draw(9, 33) * 1e37):
        largest = x.abs().amax(-1, keepdim=True) if shared == "row" else x.abs().amax()
        scale = (largest / float(ml_dtypes.finfo(ELEMENTS[name]).max)).numpy()
        expected = cast(x.double().numpy() / scale, ELEMENTS[name]).astype(np.float32) * scale
        np.testing.assert_array_equal(quantise(x, f"{name}/{shared}").numpy(), expected)


@pytest.mark.parametrize("shared", ["row", "tensor"])
def test_formats_with_the_range_of_float32_need_no_scale(shared):
    x = hard()[:8]
    assert torch.equal(quantise(x, f"bf16/{shared}"), round_to(x, "bf16"))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 16), st.sampled_from(["/7", "/64", "/row", "/tensor"]), st.integers(0, 99))
def test_integers_round_to_the_nearest_of_symmetric_codes(bits, shared, seed):
    x = draw(5, 50, seed=seed, spread=1.0)
    found, largest = quantise(x, f"int{bits}{shared}"), 2 ** (bits - 1) - 1
    for group, quantised in zip(*(grouped(t, shared) for t in (x, found)), strict=True):
        step = group.abs().max().double() / largest
        # bfloat16 rounds a scale up by at most 2^-7 of it
        step *= 1 if shared in ("/row", "/tensor") else 1 + 2.0**-7
        assert ((group.double() - quantised.double()).abs() <= step * 0.500001).all()
        assert len(quantised.abs().unique()) <= largest + 1
        if shared in ("/row", "/tensor"):  # the largest magnitude is the largest code's
            torch.testing.assert_close(quantised.abs().max(), group.abs().max(), rtol=1e-6, atol=0)


def grouped(x, shared):
    if shared == "/tensor":
        return [x.flatten()]
    if shared == "/row":
        return [*x]
    return [part for row in x for part in row.split(int(shared[1:]))]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_spoil_their_group_and_no_other(name, bad):
    x = draw(4, 77)
    clean = quantise(torch.where(x == x[1, 40], 0.0, x), name)
    x[1, 40] = bad
    found = quantise(x, name)
    lengths = {"int8/7": 7, "int5/64": 64, "nvfp4": 16, "int8/row": 77, "e4m3fn/row": 77, "bf16/row": 77}
    first = 40 - 40 % lengths.get(name, 32)
    spoilt = torch.zeros(4, 77, dtype=torch.bool)
    spoilt[1, first : first + lengths.get(name, 32)] = True
    spoilt |= name.endswith("/tensor")
    assert torch.equal(found.isnan(), spoilt)
    assert torch.equal(found[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("name", SCALED)
def test_zeros_stay_zeros(name):
    assert torch.equal(quantise(torch.zeros(3, 40), name), torch.zeros(3, 40))


@pytest.mark.parametrize("name", SCALED)
def test_groups_run_along_the_given_dimension(name):
    x = draw(6, 40, 35)
    for dim in (0, 1, -1, -2):
        expected = quantise(x.movedim(dim, -1).contiguous(), name).movedim(-1, dim)
        assert torch.equal(quantise(x, name, dim), expected)
        assert torch.equal(x, draw(6, 40, 35))
    assert torch.equal(quantise(x[:, ::2, 3:], name), quantise(x[:, ::2, 3:].contiguous(), name))
    assert torch.equal(quantise(x[:2, 0].expand(3, 2, 35), name)[1], quantise(x[:2, 0], name))


@pytest.mark.parametrize("name", [*SCALED, "bf16", "float32"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 5), (2, 0, 3), (1, 1, 33)])
def test_any_shape(name, shape):
    x = torch.full(shape, 0.75)
    found = quantise(x, name)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x, rtol=0.08, atol=0)


def test_rows_do_not_depend_on_their_neighbours(monkeypatch):
    x = draw(40, 100, spread=2.0)
    whole = {name: quantise(x, name) for name in SCALED}
    monkeypatch.setitem(quantise.__globals__, "_SLAB_NUMBERS", 300)
    for name, expected in whole.items():
        assert torch.equal(quantise(x, name), expected)
        if not name.endswith("/tensor") and name != "nvfp4":
            assert torch.equal(quantise(x[7], name), expected[7])


def test_a_group_longer_than_the_row_is_the_row():
    x = draw(5, 33)
    assert torch.equal(quantise(x, "int8/9999999"), quantise(x, "int8/33"))


@pytest.mark.parametrize("name", ["int4", "int8/row", "mxfp4", "nvfp4", "bf16"])
def test_lazily_negated_tensors(name):
    values = draw(3, 64)
    negated = torch.complex(torch.zeros(3, 64), -values).conj().imag
    assert negated.is_neg()
    assert torch.equal(quantise(negated, name), quantise(values, name))


def test_float32_is_given_back_and_everything_else_is_new():
    x = draw(3, 32).bfloat16().float()
    assert quantise(x, "float32") is x
    for name in ("bf16", "fp32/row", "int8"):
        assert quantise(x, name).data_ptr() != x.data_ptr()


def test_wrong_input():
    x = torch.ones(2, 3)
    with pytest.raises(
        TypeError, match=r"quantise takes a float32 tensor, got torch\.float64: convert with \.float\(\)"
    ):
        quantise(x.double(), "int8")
    with pytest.raises(TypeError, match="got list"):
        quantise([1.0], "int8")
    with pytest.raises(ValueError, match=r"dim=2: the tensor of shape \(2, 3\) has no such dimension"):
        quantise(x, "int8", 2)
    with pytest.raises(ValueError, match="dim=1"):
        quantise(torch.tensor(1.0), "int8", 1)
    with pytest.raises(ValueError, match="did you mean 'mxfp4'"):
        quantise(x, "mxpf4")
    with pytest.raises(ValueError, match="quantise has no gradient"):
        quantise(x.requires_grad_(), "int8")
