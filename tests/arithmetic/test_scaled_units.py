"""The unit of block-scaled four-bit operands against mmasim, bit for bit.

100,000 dot products an operand and kind: UNIT_DOTS=100000 python -m pytest tests/arithmetic/test_scaled_units.py
"""

import os

import pytest
import torch

from hardware import nv_ptx
from operands import same_bits
from torchlamp import matmul, quantise
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.kernels.products import products
from torchlamp.policy.policy import Policy

DOTS = int(os.environ.get("UNIT_DOTS", "400"))
DEPTH = 192
KINDS = ("ordinary", "wide", "cancelling", "sparse", "vanishing")
INSTRUCTIONS = {
    "mxfp4": "m16n8k64.kind::mxf4.block32.f32.e2m1.e2m1.f32.ue8m0",
    "nvfp4": "m16n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.f32.ue4m3",
}
LENGTHS = {"mxfp4": 32, "nvfp4": 16}


def drawn(operand, kind, generator):
    """Numbers of an operand, float32 (dots, DEPTH); of nvfp4 with a tensor scale of 1 and no subnormal scale."""
    length, exponents = LENGTHS[operand], 8 if operand == "mxfp4" else 2
    x = torch.randn(DOTS, DEPTH, generator=generator)
    blocks = (DOTS, DEPTH // length)
    if kind == "wide":
        exponents = 40 if operand == "mxfp4" else 5
    spread = torch.randint(-exponents, exponents + 1, blocks, generator=generator).float()
    if kind == "vanishing" and operand == "mxfp4":
        spread = torch.randint(-120, -50, blocks, generator=generator).float()
    x = x * torch.exp2(spread).repeat_interleave(length, dim=1)
    if kind == "cancelling":
        x[:, 1::2] = x[:, ::2]
    if kind == "sparse":
        x = x * (torch.rand(x.shape, generator=generator) < 0.1)
        x = x.unflatten(1, (-1, length)) * (torch.rand(*blocks, 1, generator=generator) < 0.5)
        x = x.flatten(1)
    if operand == "nvfp4":
        x = x.clamp(-1000, 1000)
        x[0, 0] = 6 * 448.0  # the largest number sets the scale of the tensor: to 1
        x = x.unflatten(1, (-1, length))
        small = x.abs().amax(-1, keepdim=True) < 6 * 2.0**-5
        x = torch.where(small, torch.zeros(()), x).flatten(1)
    return quantise(x, operand)


def stored(x, operand, generator):
    """Codes, two a byte, and scales of numbers; blocks of zeros have any scale."""
    blocks = x.unflatten(1, (-1, LENGTHS[operand]))
    largest = blocks.abs().amax(-1)
    arbitrary = torch.exp2(torch.randint(-4, 5, largest.shape, generator=generator).float())
    if operand == "mxfp4":
        scale = torch.exp2((torch.frexp(largest)[1] - 3).double()).float()
        dtype = torch.float8_e8m0fnu
    else:
        scale, dtype = largest / 6, torch.float8_e4m3fn
    scale = torch.where(largest == 0, arbitrary, scale)
    assert torch.equal(scale.to(dtype).float(), scale)
    element = (blocks.double() / scale.double()[..., None]).flatten(1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    match = element.abs()[..., None] == values
    assert bool(match.any(-1).all())
    code = (match.int().argmax(-1) + 8 * (element < 0)).to(torch.uint8)
    return code[:, ::2] << 4 | code[:, 1::2], scale.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operand", INSTRUCTIONS)
def test_sums_equal_those_of_the_hardware(operand, kind):
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    a, b = drawn(operand, kind, generator), drawn(operand, kind, generator)
    if kind == "cancelling":
        b[:, 1::2] = -b[:, ::2]
        b[::3, 64:128] = -b[::3, :64]
        a[::3, 64:128] = a[::3, :64]
    (left, alpha), (right, beta) = stored(a, operand, generator), stored(b, operand, generator)
    unit = nv_ptx.MMABlockScale("RTX Blackwell", INSTRUCTIONS[operand])
    want = torch.zeros(DOTS)
    half, count = 32, 64 // LENGTHS[operand]
    for i in range(DEPTH // 64):  # what enters the instruction at a time
        codes, scales = slice(i * half, (i + 1) * half), slice(i * count, (i + 1) * count)
        want = unit.dpa(left[:, codes], right[:, codes], want, alpha[:, scales], beta[:, scales])
    taken = Accumulator.parse("blackwell-fp4").taking(Operand.parse(operand), Operand.parse(operand))
    got, _ = products(a[:, None], b[:, :, None], taken.accumulation)
    assert same_bits(got.flatten(), want)
    if operand == "mxfp4":  # storing these numbers again changes nothing
        assert same_bits(matmul(a[:9], b[:9].T, "blackwell-fp4", operands=operand).diagonal(), want[:9])


def test_scales_align_the_terms():
    """Scales of 4 and 1/4: below 2^-35 nothing is kept, whatever cancels; the products of a group stay together."""
    ones, a = torch.ones(64), torch.zeros(64)
    a[0], a[48] = 16.0, -16.0
    for small, kept in ((2.0**-35, 2.0**-35), (2.0**-36, 0.0)):
        a[32] = small
        assert matmul(a, ones, "fuse64/35/group16") == kept
    a[32], a[33] = 2.0**-36, 2.0**-36
    assert matmul(a, ones, "fuse64/35/group16") == 2.0**-35
    assert matmul(a, ones, "fuse64/35/group8") == 2.0**-35
    assert matmul(a, ones, "fuse64/35") == 0


@pytest.mark.parametrize(
    "spelling",
    ["blackwell-fp4", "mxfp4@blackwell-fp4/promote128", "nvfp4@blackwell-fp4", "fuse64/35/group16/promote32"],
)
def test_spellings(spelling):
    policy = Policy.parse(f"mlp_up={spelling}.sort+output:0.01")
    assert str(policy) == f"mlp_up={spelling}.sort+output:0.01"
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize("spelling", ["fuse60/35/group16", "fuse64/35/group16/promote40"])
def test_groups_that_do_not_fit(spelling):
    with pytest.raises(ValueError, match="group"):
        Accumulator.parse(spelling)


def test_wider_elements_are_refused():
    with pytest.raises(ValueError, match="'e4m3fn' can't enter the unit 'blackwell-fp4', which takes e2m1fn"):
        Policy.parse("e4m3fn@blackwell-fp4")
