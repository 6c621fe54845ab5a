import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit_oracle import KINDS, LARGEST, blocks, pairs, quantise, shorts

from operands import draw
from torchlamp.kernels import native, reference_lowbit
from torchlamp.kernels.low_bit_matrix import LowBitMatrix

#: The fixtures only choose an implementation, once for all examples.
over_shapes = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.integers(0, 40) | st.sampled_from([1, 15, 16, 17, 31, 32, 33, 64, 65, 96])
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**20)


def matrix(kind, rows, columns, seed=0):
    if kind == "huge":
        return draw("gaussian", rows, columns, seed=seed).clamp(-3, 3) * 1.1e38
    if kind == "tiny":
        return draw("gaussian", rows, columns, seed=seed) * 10.0 ** -(36 + seed % 10)
    return draw(kind, rows, columns, seed=seed)


def same_errors(got, want):
    assert got.shape == want.shape
    close = (got - want).abs() <= 1e-6 * want.abs() + 2**-148
    assert (close | (got == want) | (got.isnan() & want.isnan())).all()


@over_shapes
@given(sizes, sizes, st.sampled_from([4, 8, 12]), kinds, seeds)
def test_blocks_equal_the_reference_byte_for_byte(instruction_set, rows, columns, bits, kind, seed):
    x = matrix(kind, rows, columns, seed)
    copy = LowBitMatrix.pack(x, bits)
    codes, scales, errors = reference_lowbit.pack_blocks(x, bits)
    assert torch.equal(copy.codes, codes)
    assert torch.equal(copy.scales.view(torch.int16), scales.view(torch.int16))
    same_errors(copy.block_errors, errors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(32, 70), (16, 1), (48, 32)])
@pytest.mark.parametrize("bits", [4, 8])
def test_pairs_of_rows_equal_the_oracle(kind, rows, columns, bits):
    x = matrix(kind, rows, columns, seed=3)
    integers, patterns = reference_lowbit.quantise_rows(x, bits)
    codes, scales = reference_lowbit.join_pairs(integers, patterns, bits)
    want_codes, want_scales = pairs(x.tolist(), bits)
    assert np.array_equal(codes.flatten().numpy(), want_codes)
    assert np.array_equal(scales.flatten().numpy(), want_scales)
    back = reference_lowbit.split_pairs(codes, scales, bits)
    assert torch.equal(back[0], integers)
    assert torch.equal(back[1], patterns)
    whole = reference_lowbit.unpack_blocks(*reference_lowbit.pack_blocks(x, bits)[:2], bits, rows, columns)
    assert torch.equal(
        reference_lowbit.unpack_pairs(codes, scales, bits, columns).nan_to_num(7.0), whole.nan_to_num(7.0)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(19, 70), (1, 1), (16, 32), (3, 33)])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_copies_equal_the_oracle(implementation, kind, rows, columns, bits):
    x = matrix(kind, rows, columns, seed=3)
    copy = LowBitMatrix.pack(x, bits)
    codes, scales = blocks(x.tolist(), bits)
    assert np.array_equal(copy.codes.numpy(), codes)
    assert np.array_equal(copy.scales.numpy(), scales)
    integers, factors = quantise(x.tolist(), bits)
    factors = torch.tensor(np.array(factors, dtype=np.float32)).repeat_interleave(32, 1)
    want = (torch.tensor(integers).float() * factors)[:, :columns]
    assert torch.equal(copy.dequantised().nan_to_num(7.0), want.nan_to_num(7.0))


@over_shapes
@given(sizes, sizes, st.sampled_from([4, 8, 12]), kinds, seeds)
def test_the_error_is_half_a_scale_and_its_norm_is_noted(implementation, rows, columns, bits, kind, seed):
    x = matrix(kind, rows, columns, seed)
    copy = LowBitMatrix.pack(x, bits)
    integers, scales = reference_lowbit.block_integers(copy.codes, copy.scales, bits, rows, columns)
    scale = scales.double().repeat_interleave(32, 1)[:, :columns]
    left = x.double() - scale * integers[:, :columns].double()
    # The quotient x / scale is rounded before it is rounded to an integer; the scale itself may underflow to 0.
    half = scale * (0.5 + LARGEST[bits] * 2.0**-23) + LARGEST[bits] * 2.0**-150
    assert (left.abs() <= half)[scale.isfinite()].all()
    norm = left.norm(dim=1)
    finite = x.isfinite().all(1)
    assert (copy.errors.double() >= norm)[finite].all()
    assert (copy.errors.double() <= norm * 1.000002 + 2.0**-149)[finite].all()
    assert not copy.errors[~finite].isfinite().any()


@over_shapes
@given(sizes, sizes, kinds, seeds)
def test_vectors_become_the_oracles_integers(vectors, columns, kind, seed):
    x = matrix(kind, vectors, columns, seed)
    codes, scales = reference_lowbit.quantise_vector(x)
    want = [shorts(row) for row in x.tolist()]
    assert codes.tolist() == [c for c, _ in want]
    for got, (_, row) in zip(scales.numpy(), want, strict=True):
        assert np.array_equal(got, np.array(row, np.float32), equal_nan=True)
    left = x.double() - (codes.double() * scales.double().repeat_interleave(32, 1))[:, :columns]
    scale = scales.double().repeat_interleave(32, 1)[:, :columns]
    assert (left.abs() <= scale * (0.5 + 2.0**-10))[scale.isfinite()].all()


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_rows_of_one_kind(implementation, bits):
    x = draw("gaussian", 8, 70)
    x[0] = 0.0
    x[1, 40] = torch.inf
    x[2, 0] = torch.nan
    x[3] = 7 * 2.0**-149
    x[4] = 3.4e38
    x[5] = -3.4e38
    x[6, 1:] = 0.0
    x[7] *= 1e-39
    copy = LowBitMatrix.pack(x, bits)
    back = copy.dequantised()
    assert (back[0] == 0).all()
    assert copy.errors[0] == 0
    assert back[1, 32:64].isnan().all()
    assert back[2, :32].isnan().all()
    assert back[[1, 2]].isfinite().sum() == (70 - 32) * 2
    assert copy.errors[1] == torch.inf
    assert copy.errors[2].isnan()
    assert (back[3] == 0).all()  # nothing of it is left, and `errors` says so
    assert 7 * 2.0**-149 * 70**0.5 <= copy.errors[3] <= 1e-43
    scale = copy.scales.view(torch.bfloat16)[4].item()
    assert abs(scale * LARGEST[bits] - 3.4e38) <= 3.4e38 * 2**-7
    assert copy.errors[[4, 5, 6, 7]].isfinite().all()
    assert (back[6, 1:] == 0).all()


def test_rows_that_fill_up_a_block_are_zeros(implementation):
    copy = LowBitMatrix.pack(draw("gaussian", 5, 40), 4)
    assert (copy.codes.view(-1, 16)[:, 5:] == 0).all()
    assert (copy.scales.view(torch.int16).view(-1, 16)[:, 5:] == 0).all()
    assert (copy.block_errors[5:] == 0).all()
    assert copy.errors.shape == (5,)
    assert copy.bytes == 64 * 8 + 2 * 32


def test_any_strides_and_any_number_of_threads(implementation):
    x, pack = draw("wide", 150, 70), LowBitMatrix.pack
    want = pack(x, 8)
    spread = torch.zeros(150, 140)[:, ::2].copy_(x)
    negated = torch.complex(torch.zeros(150, 70), -x).conj().imag
    assert negated.is_neg()
    padded = torch.zeros(150, 99)[:, 3:73].copy_(x)
    for other in (x.T.contiguous().T, spread, padded, negated, x.clone().requires_grad_()):
        copy = pack(other, 8)
        assert torch.equal(copy.codes, want.codes)
        assert torch.equal(copy.scales.view(torch.int16), want.scales.view(torch.int16))
    same_row = pack(x[:1].expand(150, 70), 8)
    assert torch.equal(same_row.dequantised(), want.dequantised()[:1].expand(150, 70))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(pack(x, 8).codes, want.codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("pack", "x", "bits", "error", "message"),
    [
        (LowBitMatrix.pack, torch.ones(2, 2), 5, ValueError, "bits=5: LowBitMatrix takes 4, 8 or 12"),
        (LowBitMatrix.pack, torch.ones(2), 4, ValueError, r"shape \(rows, columns\), got \(2,\)"),
        (LowBitMatrix.pack, torch.ones(1, 2, 2), 4, ValueError, r"got \(1, 2, 2\)"),
        (LowBitMatrix.pack, torch.ones(2, 2).double(), 4, TypeError, r"float64: convert with .float\(\)"),
        (LowBitMatrix.pack, torch.ones(2, 2, device="meta"), 4, ValueError, r"got meta: move with .cpu\(\)"),
    ],
)
def test_what_cannot_be_packed_is_refused(implementation, pack, x, bits, error, message):
    with pytest.raises(error, match=message):
        pack(x, bits)


@pytest.mark.parametrize("wrong", ["codes", "scales", "errors", "bits", "rows", "isa", "x"])
def test_the_native_object_refuses_memory_of_another_size(instruction_set, wrong):
    matrix = LowBitMatrix.pack(torch.ones(5, 40), 8)
    given = {
        "isa": native.instruction_set(),
        "codes": matrix.codes,
        "scales": matrix.scales,
        "errors": matrix.block_errors,
        "bits": 8,
        "rows": 5,
        "columns": 40,
    }
    if wrong == "x":
        kernel = native.extension().BlockMatrix(**given)
        for x in (torch.ones(5, 41), torch.ones(4, 40), torch.ones(5, 80)[:, ::2]):
            with pytest.raises(ValueError, match="x must have shape"):
                kernel.pack(x, 1)
        return
    other = {"bits": 5, "rows": -1, "isa": "sse"}
    given[wrong] = other[wrong] if wrong in other else given[wrong][:-1]
    with pytest.raises(ValueError, match=r"\w"):
        native.extension().BlockMatrix(**given)
