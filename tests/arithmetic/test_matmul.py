import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.arithmetic import Accumulator, low_operands, matmul, round_to
from torchlamp.kernels.products import products

SHAPES = [
    ((5,), (5,)),
    ((5,), (5, 4)),
    ((3, 5), (5,)),
    ((3, 5), (5, 4)),
    ((2, 3, 5), (5,)),
    ((5,), (2, 5, 4)),
    ((2, 3, 5), (5, 4)),
    ((3, 5), (2, 5, 4)),
    ((2, 3, 5), (2, 5, 4)),
    ((2, 1, 3, 5), (1, 6, 5, 4)),
    ((2, 6, 3, 5), (6, 5, 4)),
    ((2, 6, 3, 5), (2, 1, 5, 4)),
    ((6, 3, 5), (2, 1, 5, 4)),
    ((2, 3, 2, 1, 5), (2, 1, 2, 5, 4)),
    ((0, 3, 5), (5, 4)),
    ((2, 0, 5), (5, 4)),
    ((3, 0), (0, 4)),
    ((1, 0), (0,)),
    ((2, 3, 5), (1, 5, 0)),
]


def one_by_one(a, b, accumulate):
    """torch.matmul's rules spelled out: every matrix of the broadcast batch by itself."""
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = left.expand(*batch, *left.shape[-2:]), right.expand(*batch, *right.shape[-2:])
    how = Accumulator.parse(accumulate).accumulation
    out = torch.zeros(*batch, left.shape[-2], right.shape[-1])
    for index in itertools.product(*map(range, batch)):
        out[index] = products(left[index][None], right[index][None], how)[0][0]
    return out.reshape(torch.matmul(a, b).shape)


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
@pytest.mark.parametrize("accumulate", ["ps4", "ps7/block2"])
def test_shapes_and_broadcasting_are_those_of_torch(a_shape, b_shape, accumulate):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(a_shape, generator=generator), torch.randn(b_shape, generator=generator)
    got = matmul(a, b, accumulate)
    assert got.dtype == torch.float32
    assert got.shape == torch.matmul(a, b).shape
    assert got.is_contiguous()
    assert torch.equal(got, one_by_one(a, b, accumulate))


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
def test_float32_accumulation_is_close_to_torch(a_shape, b_shape):
    a, b = torch.randn(a_shape), torch.randn(b_shape)
    torch.testing.assert_close(matmul(a, b, "fp32"), torch.matmul(a, b), rtol=1e-5, atol=1e-6)


def test_the_shared_operand_is_not_copied_for_its_broadcast(monkeypatch):
    seen = []

    def spy(a, b, accumulation, **others):
        seen.append(b)
        return products(a, b, accumulation, **others)

    monkeypatch.setattr(low_operands, "products", spy)
    for a_shape, b_shape, groups in [
        ((2, 6, 3, 5), (6, 5, 4), 6),
        ((7, 3, 5), (5, 4), 1),
        ((2, 3, 3, 5), (2, 1, 5, 4), 2),
    ]:
        b = torch.randn(b_shape)
        matmul(torch.randn(a_shape), b)
        assert seen[-1].shape[0] == groups
        assert seen[-1].data_ptr() == b.data_ptr()


def test_lazily_negated_operands():
    # The imaginary part of a conjugate is a view of numbers whose sign is yet to be changed.
    values = torch.randn(2, 3, 3)
    negated = torch.complex(torch.zeros(2, 3, 3), -values).conj().imag
    assert negated.is_neg()
    assert torch.equal(matmul(negated, torch.eye(3), "ps23"), values)
    assert torch.equal(matmul(torch.eye(3), negated, "ps23"), values)


@pytest.mark.parametrize("option", ["block", "promote"])
def test_lengths_beyond_any_sum(option):
    a, b = torch.randn(3, 40), torch.randn(40, 5)
    for length in (41, 2**31, 2**64):
        assert torch.equal(matmul(a, b, f"ps4/{option}{length}"), matmul(a, b, f"ps4/{option}40"))


def test_a_sum_rounded_at_every_step_by_hand():
    # In ps2 (4 significant values per binade) 8 + 1 falls back to 8 for ever; summed from the small end it
    # doesn't.
    ones = torch.ones(20)
    assert matmul(ones, ones, "ps2").item() == 8
    assert matmul(ones, ones, "ps2/block4").item() == 20
    assert matmul(ones, ones, "ps2/block5").item() == 20
    assert matmul(ones, ones, "ps2/promote4").item() == 20
    assert matmul(ones, ones).item() == 20
    assert round_to(torch.tensor(9.0), "ps2").item() == 8


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 80),
    st.sampled_from(["ps4", "ps10", "fp16", "ps7/block8", "ps10/promote16"]),
    st.integers(0, 99),
)
def test_the_error_stays_within_the_bound_of_recursive_summation(depth, accumulate, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, depth, generator=generator), torch.randn(depth, 4, generator=generator)
    unit = Accumulator.parse(accumulate).format.unit_roundoff
    error = (matmul(a, b, accumulate).double() - a.double() @ b.double()).abs()
    # gamma_n with the float32 roundings counted in; fp16 adds its subnormal spacing
    gamma = (1 + unit) ** (depth + 2) * (1 + 2.0**-24) ** (2 * depth + 2) - 1
    assert (error <= gamma * (a.double().abs() @ b.double().abs()) + depth * 2.0**-24).all()


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((3, 4), (5, 6)), ((4,), (5,)), ((2, 3, 4), (3, 4, 5)), ((), (4,)), ((4,), ()), ((3, 4), (3,))],
)
def test_shapes_that_do_not_fit_are_quoted(a_shape, b_shape):
    with pytest.raises(ValueError, match="can't multiply shapes") as error:
        matmul(torch.ones(a_shape), torch.ones(b_shape))
    assert str(a_shape) in str(error.value)
    assert str(b_shape) in str(error.value)


def test_wrong_dtypes_and_names():
    a = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"got torch\.float32 and torch\.bfloat16: convert with \.float\(\)"):
        matmul(a, a.bfloat16())
    with pytest.raises(TypeError, match=r"got list: convert with torch\.as_tensor"):
        matmul(a, [[1.0], [2.0]])
    with pytest.raises(ValueError, match="unknown format 'ps44'"):
        matmul(a, a, "ps44")


def test_gradients_are_not_lost_in_silence():
    a = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"matmul has no gradient .* torch\.no_grad\(\)"):
        matmul(a, torch.ones(2, 2))
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            assert not matmul(a, a).requires_grad
