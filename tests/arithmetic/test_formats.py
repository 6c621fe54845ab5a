import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.arithmetic import Format, round_to
from torchlamp.arithmetic.formats import DTYPES, NAMED
from torchlamp.kernels.specification import Grid

BASES = st.one_of(
    st.sampled_from([*NAMED]),
    st.integers(1, 23).map("ps{}".format),
    st.builds("{}e{}m{}".format, st.sampled_from(["", "u"]), st.integers(2, 8), st.integers(1, 23)),
)


@given(BASES, st.sampled_from(["", "-sat", "-flush", "-sat-flush", "-flush-sat"]))
def test_names_round_trip(base, modifiers):
    format = Format.parse(base + modifiers)
    assert Format.parse(str(format)) == format
    assert Format.parse(format) is format
    assert str(format).startswith(base)


def test_the_canonical_spelling():
    assert str(Format.parse(" E4M3FN-flush-sat ")) == "e4m3fn-sat-flush"
    assert str(Format.parse("e2m1fn-sat")) == "e2m1fn"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", ml_dtypes.bfloat16),
        ("fp16", np.float16),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e4m3", ml_dtypes.float8_e4m3),
        ("e3m4", ml_dtypes.float8_e3m4),
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
        ("e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
        ("e4m3b11fnuz", ml_dtypes.float8_e4m3b11fnuz),
        ("e2m1fn", ml_dtypes.float4_e2m1fn),
        ("e2m3fn", ml_dtypes.float6_e2m3fn),
        ("e3m2fn", ml_dtypes.float6_e3m2fn),
        ("fp32", np.float32),
        ("ps23", np.float32),
    ],
)
def test_the_numbers_of_a_format_are_those_of_ml_dtypes(name, dtype):
    format, info = Format.parse(name), ml_dtypes.finfo(dtype)
    assert format.max == float(info.max)
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)
    assert format.unit_roundoff == float(info.eps) / 2


def test_other_numbers():
    assert Format.parse("tf32").unit_roundoff == 2.0**-11
    assert Format.parse("e4m3fn-flush").smallest_subnormal == 2.0**-6
    assert Format.parse("ue5m3").max == Format.parse("e5m3").max == 61440
    assert Format.parse("ps7").grid == Format.parse("bf16").grid == Format.parse("e8m7").grid == Grid(7)
    assert Format.parse("ps23").grid == Format.parse("fp32").grid == Grid()


@pytest.mark.parametrize(
    "name",
    [
        *[
            "ps0",
            "ps24",
            "ps04",
            "ps",
            "e1m3",
            "e9m3",
            "e4m0",
            "e4m24",
            "e4m03",
            "float16",
            "",
            "ups4",
            "fp64",
        ],
        *["ps\N{ARABIC-INDIC DIGIT FOUR}", "e\N{FULLWIDTH DIGIT EIGHT}m3"],
    ],
)
def test_unknown_names_list_what_is_allowed(name):
    with pytest.raises(
        ValueError, match=f"unknown format '{name}'.*allowed: ps1..ps23, fp32, .*eXmY and ueXmY"
    ):
        Format.parse(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bf61", "bf16"),
        ("e4m3fnz", "e4m3fnuz"),
        ("tf23", "tf32"),
        ("float16", "fp16"),
        ("float8_e4m3fn", "e4m3fn"),
        ("ps0", "ps1"),
        ("ps24", "ps23"),
        ("ps04", "ps4"),
    ],
)
def test_the_nearest_name_is_suggested(name, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        Format.parse(name)


def test_unknown_modifiers_and_types():
    with pytest.raises(
        ValueError, match="unknown modifier '-ftz' in format 'ps4-ftz'; allowed: -sat and -flush"
    ):
        Format.parse("ps4-ftz")
    with pytest.raises(TypeError, match="got int: 4"):
        Format.parse(4)


def test_torch_types_name_formats():
    for dtype, name in DTYPES.items():
        format = Format.parse(dtype)
        assert str(format) == name
        information = torch.finfo(dtype)
        assert (format.max, format.bits) == (information.max, information.bits)
    x = torch.randn(100)
    assert torch.equal(round_to(x, torch.bfloat16), x.bfloat16().float())
    with pytest.raises(TypeError, match=r"torch.float64 is no format; allowed types: torch.float32"):
        Format.parse(torch.float64)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("fp16", "s1 e5 m10"), ("e4m3fn", "s1 e4 m3"), ("ue8m3", "e8 m3"), ("ps4", "s1 e8 m4")],
)
def test_layouts(name, layout):
    assert Format.parse(name).layout == layout
