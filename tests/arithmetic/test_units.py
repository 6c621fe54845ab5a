"""Matrix units against mmasim, models that were measured against hardware, bit for bit.

100,000 dot products a unit and operand type: UNIT_DOTS=100000 python -m pytest tests/arithmetic/test_units.py
"""

import functools
import os

import pytest
import torch

from hardware import nv_ptx
from operands import same_bits
from torchlamp import matmul
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.units import UNITS
from torchlamp.policy.policy import Policy

DOTS = int(os.environ.get("UNIT_DOTS", "1280"))
SIDE = 16
DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32,
    "e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip
#: Units and their instructions, by the PTX names of the operands' types.
MMA = {
    "volta": ("MMA", "Volta", "m8n8k4.f32.{0}.{0}.f32"),
    "turing": ("MMA", "Turing", "m16n8k8.f32.{0}.{0}.f32"),
    "ampere": ("MMA", "Ampere", "m16n8k16.f32.{0}.{0}.f32"),
    "ada": ("MMA", "Ada Lovelace", "m16n8k16.f32.{0}.{0}.f32"),
    "ada-fp8": ("MMA", "Ada Lovelace", "m16n8k32.f32.{0}.{1}.f32"),
    "hopper": ("WGMMA", "Hopper", "m64n8k16.f32.{0}.{0}"),
    "hopper-fp8": ("WGMMA", "Hopper", "m64n8k32.f32.{0}.{1}"),
    "blackwell": ("TCGen05MMA", "Blackwell", "m64n8k16.kind::f16.f32.{0}.{0}"),
    "blackwell-fp8": ("TCGen05MMA", "Blackwell", "m64n8k32.kind::f8f6f4.f32.{0}.{1}"),
}
WIDE = [(unit, t, t) for unit in ("ampere", "ada", "hopper", "blackwell") for t in ("fp16", "bf16", "tf32")]
NARROW = [
    (unit, left, right)
    for unit in ("ada-fp8", "hopper-fp8", "blackwell-fp8")
    for left in ("e4m3fn", "e5m2")
    for right in ("e4m3fn", "e5m2")
]
CASES = [("volta", "fp16", "fp16"), ("turing", "fp16", "fp16"), *WIDE, *NARROW]
KINDS = ("ordinary", "patterns", "cancelling", "sparse", "nonfinite")


def ptx(format):
    return {"fp16": "f16", "e4m3fn": "e4m3"}.get(format, format)


def instruction(unit, left, right, result="f32"):
    kind, arch, name = MMA[unit]
    name = name.format(ptx(left), ptx(right)).replace("f32", result)
    if left == "tf32":
        name = name.replace("k16", "k8").replace("kind::f16", "kind::tf32")
    return getattr(nv_ptx, kind)(arch, name)


def numbers(kind, format, rows, columns, generator):
    """Numbers of a format, float32: ordinary, all its bit patterns, terms that cancel, mostly zeros, and NaN."""
    dtype = DTYPES[format]
    if kind == "patterns":  # subnormals and the largest numbers; infinities and NaN become zero
        size = dtype.itemsize
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
        limits = torch.iinfo(integers)
        drawn = torch.randint(limits.min, limits.max + 1, (rows, columns), generator=generator)
        x = drawn.to(integers).view(dtype).float()
        x = torch.where(x.isfinite(), x, 0.0)
    else:
        x = torch.randn(rows, columns, generator=generator)
        x *= torch.exp2(torch.randint(-4, 4, x.shape, generator=generator).float())
        if kind == "cancelling":
            x[:, 1::2] = x[:, ::2].roll(1, 1)[:, : columns // 2]
        if kind == "sparse":
            x *= torch.rand(x.shape, generator=generator) < 0.1
    if kind == "nonfinite":
        for value in (torch.inf, -torch.inf, torch.nan):
            x[torch.rand(x.shape, generator=generator) < 0.004] = value
    return truncated(x) if format == "tf32" else x.to(dtype).float()


def truncated(x):
    """float32 numbers without the bits that tf32 lacks."""
    return (x.view(torch.int32) >> 13 << 13).view(torch.float32)


def drawn(unit, left, right, kind, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = max(SIDE, DOTS // len(KINDS) // SIDE)
    a = numbers(kind, left, rows, length, generator)
    b = numbers(kind, right, SIDE, length, generator).T
    if kind == "cancelling":  # every second product is the negative of the one before, but for some
        b[1::2] = -b[::2].roll(1, 0)[: length // 2]
    return a, b.contiguous()


@functools.cache
def expected(unit, left, right, kind, length):
    """Operands, and what mmasim makes of them."""
    a, b = drawn(unit, left, right, kind, length)
    return a, b, simulated(unit, left, right, a, b)


def simulated(unit, left, right, a, b, result="f32"):
    dtype = torch.float16 if result == "f16" else torch.float32
    c = torch.zeros(len(a), b.shape[1], dtype=dtype)
    return instruction(unit, left, right, result)(a.to(DTYPES[left]), b.to(DTYPES[right]), c)


@pytest.mark.parametrize(("unit", "left", "right"), CASES)
def test_sums_equal_those_of_the_hardware(implementation, unit, left, right):
    for kind in KINDS:
        for length in (32, 96):
            a, b, want = expected(unit, left, right, kind, length)
            assert same_bits(matmul(a, b, unit, operands=(left, right)), want), (kind, length)
            if kind == "patterns":  # what a tensor holds tells its format
                assert same_bits(matmul(a, b, unit), want)


@pytest.mark.parametrize("unit", ["volta", "turing", "ampere", "hopper", "blackwell", "hopper-fp8"])
def test_float16_accumulators(implementation, unit):
    """Rounded to nearest, with float16's subnormal numbers in sums, too."""
    format = "e4m3fn" if unit == "hopper-fp8" else "fp16"
    spelling = f"fp16/{UNITS[unit].spelling.removeprefix('ps13/')}/nearest"
    for kind in KINDS:
        a, b = drawn(unit, format, format, kind, 96)
        got = matmul(a, b, spelling, operands=format)
        want = simulated(unit, format, format, a, b, "f16").float()
        assert torch.equal(got.isnan(), want.isnan())
        assert same_bits(got.nan_to_num(0.0), want.nan_to_num(0.0)), kind


def test_the_smallest_formats_enter_blackwell():
    """Numbers of six and four bits, which mmasim reads as codes."""
    generator = torch.Generator().manual_seed(0)
    unit = nv_ptx.TCGen05MMA("Blackwell", "m64n8k32.kind::f8f6f4.f32.e3m2.e2m1")
    six = torch.randint(0, 64, (64, 64), generator=generator).to(torch.uint8)
    four = torch.randint(0, 16, (8, 64), generator=generator).to(torch.uint8) << 2
    from mmasim.arithmetic.helper import decode_uint8_to_fp6_fp4 as decode

    a, b = decode(six, "e3m2").float(), decode(four, "e2m1").float().T
    want = unit(six, four.T, torch.zeros(64, 8))
    assert same_bits(matmul(a, b, "blackwell-fp8", operands=("e3m2fn", "e2m1fn")), want)


def test_what_a_unit_loses():
    """Terms far below the largest of their group are truncated, and two groups of 32 are two roundings."""
    a = torch.tensor([256.0, *[2.0**-6] * 31, *[2.0**-6] * 32])
    ones = torch.ones(64)
    assert matmul(a, ones, "hopper-fp8", operands="e4m3fn") == 256.0  # 2^-6 is below 2^(8 - 13)
    assert matmul(a, ones, "hopper", operands="e4m3fn") == 256.0 + 63 * 2.0**-6
    assert matmul(a, ones, "hopper-fp8/promote32", operands="e4m3fn") == 256.0 + 32 * 2.0**-6
    assert matmul(a.flip(0), ones, "hopper-fp8", operands="e4m3fn") == 256.5


def test_promotion_starts_each_run_anew(implementation):
    a, b = drawn("hopper-fp8", "e4m3fn", "e4m3fn", "ordinary", 288)
    total = torch.zeros(len(a), SIDE)
    for start in range(0, 288, 128):
        run = slice(start, start + 128)
        total = total + matmul(a[:, run], b[run], "hopper-fp8", operands="e4m3fn")
    for spelling in ("hopper-fp8/promote128", "ps13/fuse32/13/promote128"):
        assert same_bits(matmul(a, b, spelling, operands="e4m3fn"), total)


@pytest.mark.parametrize("depth", [0, 1, 31, 33])
def test_a_shorter_group_is_filled_with_zeros(implementation, depth):
    a, b = drawn("hopper-fp8", "e4m3fn", "e4m3fn", "ordinary", 64)
    a[:, depth:] = 0
    want = simulated("hopper-fp8", "e4m3fn", "e4m3fn", a, b)
    assert same_bits(matmul(a[:, :depth], b[:depth], "hopper-fp8", operands="e4m3fn"), want)


@pytest.mark.parametrize("operand", ["float32", "ps4", "int4", "mxfp4", "mxfp8", "e5m2/row", "e4m3fn"])
def test_operands_that_a_unit_takes(operand):
    unit = "hopper" if operand == "ps4" else "hopper-fp8"
    spelling = unit if operand == "float32" else f"{operand}@{unit}"
    policy = Policy.parse(f"mlp_up={spelling}+output:0.01")
    assert str(policy) == f"mlp_up={spelling}+output:0.01"
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("operand", "unit"),
    [("bf16", "hopper-fp8"), ("int8", "ada-fp8"), ("bf16", "volta"), ("ps4", "blackwell-fp8")],
)
def test_operands_that_a_unit_refuses(operand, unit):
    with pytest.raises(ValueError, match=f"'{operand}' can't enter the unit '{unit}', which takes "):
        Policy.parse(f"{operand}@{unit}")
    with pytest.raises(ValueError, match="with operands as they are"):
        matmul(torch.ones(4), torch.ones(4), unit, operands=operand)


def test_length_depends_on_the_bytes_of_operands():
    def length(unit, left, right):
        taken = Accumulator.parse(unit).taking(Operand.parse(left), Operand.parse(right))
        return taken.fuse.length, taken.fuse.floors

    assert length("hopper", "fp16", "bf16") == (16, (-14, -126))
    assert length("hopper", "tf32", "bf16") == (8, (-126, -126))
    assert length("blackwell-fp8", "e4m3fn", "e2m1fn") == (32, (-6, -6))
    assert length("fuse16/25", "e5m2", "float32") == (16, (-14, -126))


def test_a_unit_multiplies_and_fits_no_site_without_products():
    with pytest.raises(ValueError, match="'hopper' can't be used at the site norm: a unit sums products"):
        Policy.parse("norm=hopper+none")


@pytest.mark.parametrize(
    "spelling",
    ["fuse32", "fuse0/3", "fuse2000/13", "fuse8/41", "ps4/fuse8/24/block4", "ps4/unfused/fuse8/24",
     "e4m3fn/fuse8/24", "ue5m3/fuse8/24", "hopper/block4", "hopper/unfused", "fuse8/24/fuse8/24"],
)  # fmt: skip
def test_no_units(spelling):
    with pytest.raises(ValueError):
        Accumulator.parse(spelling)


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [("fp32/fuse16/25", "fuse16/25"), ("fuse4/23", "fuse4/23"),
     (" PS13/Fuse32/13/Promote64 ", "ps13/fuse32/13/promote64"),
     ("ps13/promote64/fuse32/13", "ps13/fuse32/13/promote64"), ("hopper-fp8/promote128", "hopper-fp8/promote128"),
     ("fp16/fuse16/25/nearest", "fp16/fuse16/25/nearest")],
)  # fmt: skip
def test_spellings_of_units(spelling, canonical):
    accumulator = Accumulator.parse(spelling)
    assert str(accumulator) == canonical
    assert Accumulator.parse(canonical) == accumulator
