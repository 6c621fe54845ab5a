"""`matmul` with operands and transforms, against their plain formulas for every matrix of a batch by itself."""

import pytest
import torch
from test_matmul import SHAPES, one_by_one

import torchlamp
from torchlamp.arithmetic import Accumulator, Format, matmul
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import quantise
from torchlamp.arithmetic.transforms import TRANSFORMS, Transform
from torchlamp.arithmetic.transforms.chain import transformed
from torchlamp.kernels.products import products


def draw(a_shape, b_shape, seed=0):
    """Normal numbers, those of b with a mean of 3."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(a_shape, generator=generator), torch.randn(b_shape, generator=generator) + 3


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
@pytest.mark.parametrize(
    "operands", ["int4", "mxfp4", ("int8/2", "bf16"), ("float32", "e4m3fn/row"), ("int8/tensor", "nvfp4")]
)
def test_operands_are_quantised_along_the_sum(a_shape, b_shape, operands):
    a, b = draw(a_shape, b_shape)
    left, right = (operands, operands) if isinstance(operands, str) else operands
    expected = one_by_one(quantise(a, left), quantise(b, right, -2 if b.dim() > 1 else -1), "ps7")
    assert torch.equal(matmul(a, b, "ps7", operands=operands), expected)


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
@pytest.mark.parametrize(
    "transforms", [*TRANSFORMS, ("center", "sort"), ("center", "smooth", "balance", "sort")], ids=str
)
def test_transforms_leave_the_product_what_it_is(a_shape, b_shape, transforms):
    if "hadamard" in transforms:
        a_shape, b_shape = ([8 if size == 5 else size for size in shape] for shape in (a_shape, b_shape))
    a, b = draw(a_shape, b_shape)
    found = matmul(a, b, "fp32", transforms=transforms)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.matmul(a, b), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_matrix_of_b_is_changed_with_the_rows_that_meet_it(name):
    # b of shape (2, 1, 8, 5) against a (2, 3, 7, 8): matrix j of b meets the rows of a[j].
    a, b = draw((2, 3, 7, 8), (2, 1, 8, 5))
    found = matmul(a, b, "ps3", operands="int4", transforms=name)
    for j in range(2):
        rows, matrix = a[j].reshape(1, 21, 8), b[j]
        changed = transformed(rows, matrix, [Transform.parse(name)])
        how = Accumulator.parse("ps3").accumulation
        expected, _ = products(quantise(changed.left, "int4"), quantise(changed.right, "int4", -2), how)
        for shift in (changed.row_shift, changed.column_shift):
            expected = expected if shift is None else expected + shift
        torch.testing.assert_close(found[j], expected.view(3, 7, 5), rtol=0, atol=1e-5)


def test_batches_and_rows_of_one_matrix_are_the_same_thing():
    a, b = draw((4, 6, 16), (16, 9))
    for transforms in ((), ("center", "sort"), ("smooth",)):
        batched = matmul(a, b, "ps4", operands="int8", transforms=transforms)
        flat = matmul(a.view(24, 16), b, "ps4", operands="int8", transforms=transforms)
        torch.testing.assert_close(batched.view(24, 9), flat, rtol=0, atol=1e-6)


def test_center_and_sort_make_a_narrow_sum_of_biased_columns_accurate():
    a, b = draw((64, 64), (64, 64))
    b = b + torch.linspace(-20, 20, 64)[:, None]
    exact = a.double() @ b.double()
    error = {
        names: float((matmul(a, b, "ps4", transforms=names) - exact).norm())
        for names in ((), ("center",), ("center", "sort"))
    }
    assert error[("center",)] < error[()] / 5
    assert error[("center", "sort")] < error[("center",)]


def test_names_and_objects_are_the_same():
    a, b = draw((3, 8), (8, 4))
    expected = matmul(a, b, "ps4", operands=("int8/32", "int8/32"), transforms=("center", "sort"))
    int8 = Operand.parse("int8")
    chain = [Transform.parse("center"), Transform.parse("sort")]
    for operands in ("int8", int8, (int8, "int8"), ["int8", int8]):
        for transforms in (chain, ("sort", "center"), ("center", chain[1]), iter(("center", "sort"))):
            assert torch.equal(matmul(a, b, operands=operands, transforms=transforms), expected)
    assert torch.equal(matmul(a, b, transforms="sort"), matmul(a, b, transforms=[chain[1]]))
    assert torch.equal(matmul(a, b, operands="float32", transforms=()), matmul(a, b))


def test_the_accumulator_by_either_name():
    a, b = draw((3, 8), (8, 4))
    expected = matmul(a, b, "ps2")
    for named in ("ps2", Format.parse("ps2"), Accumulator.parse("ps2")):
        assert torch.equal(matmul(a, b, named), expected)
        assert torch.equal(matmul(a, b, accumulator=named), expected)
        assert torch.equal(matmul(a, b, accumulate=named), expected)
    assert torch.equal(matmul(a, b), matmul(a, b, "ps4"))
    assert not torch.equal(matmul(a, b), expected)
    with pytest.raises(ValueError, match="accumulator='ps7' and accumulate='ps2', two names of one thing"):
        matmul(a, b, "ps7", accumulate="ps2")


def test_a_row_that_is_not_finite_spoils_no_other():
    a, b = draw((6, 8), (8, 5))
    clean = matmul(a.index_fill(0, torch.tensor(2), 0.0)[[0, 1, 3, 4, 5]], b, "fp32")
    a[2, 3] = torch.nan
    for transforms in ((), *((name,) for name in TRANSFORMS)):
        found = matmul(a, b, "fp32", transforms=transforms)
        assert found[2].isnan().all()
        torch.testing.assert_close(found[[0, 1, 3, 4, 5]], clean, rtol=1e-4, atol=1e-4)


def test_errors_of_one_line_quote_what_is_wrong():
    a, b = draw((3, 12), (12, 4))
    wrong = [
        (ValueError, {"operands": "mxpf4"}, "unknown operand 'mxpf4', did you mean 'mxfp4'"),
        (ValueError, {"operands": ("int8",)}, r"operands=\('int8',\) has 1 names: give one for both"),
        (ValueError, {"operands": ("int8",) * 3}, "has 3 names"),
        (TypeError, {"operands": 8}, "operands is a name like 'int8/32' or a pair of them, got int 8"),
        (ValueError, {"transforms": "centre"}, "unknown transform 'centre': did you mean 'center'"),
        (TypeError, {"transforms": (3,)}, "a transform is a name like 'center', got int 3"),
        (ValueError, {"transforms": "hadamard"}, "sums of 12 terms; it needs a power of two"),
        (ValueError, {"accumulate": "ps44"}, "unknown format 'ps44'"),
    ]
    for kind, given, message in wrong:
        with pytest.raises(kind, match=message) as raised:
            matmul(a, b, **given)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="matmul has no gradient"):
        torchlamp.matmul(a.requires_grad_(), b, operands="int8", transforms="center")
