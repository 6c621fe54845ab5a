import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit_oracle import quantise, shorts

from operands import NATIVE, draw, same_bits
from torchlamp.kernels import native, reference_lowbit
from torchlamp.kernels.low_bit_matrix import LowBitMatrix

#: The fixtures only choose an implementation, once for all examples.
over_shapes = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.integers(0, 40) | st.sampled_from([1, 15, 16, 17, 31, 32, 33, 64, 65, 200])
seeds = st.integers(0, 2**20)
scales = st.sampled_from([1e-44, 1e-30, 1e-3, 1.0, 1e18, 1e38])


def exact(weight, bits, x):
    """Products of the oracle's quantised operands in float64, and the bound that `reference_lowbit.products` states."""
    rows, vectors, groups = len(weight), len(x), -(-weight.shape[1] // 32)
    if 0 in (rows, vectors, groups):
        return torch.zeros(vectors, rows).double(), torch.zeros(vectors, rows).double()
    codes, factors = quantise(weight.tolist(), bits)
    own_codes, own_factors = zip(*(shorts(row) for row in x.tolist()), strict=True)
    integers = torch.tensor(codes).view(rows, groups, 32)
    own_integers = torch.tensor(own_codes).view(vectors, groups, 32)
    sums = torch.einsum("rgi,vgi->vrg", integers, own_integers).double()
    factors = torch.from_numpy(np.array(factors, dtype=np.float64))
    own_factors = torch.from_numpy(np.array(own_factors, dtype=np.float64))
    terms = sums * factors * own_factors[:, None]
    bound = (groups + 3) * 2.0**-24 * 1.000001 * terms.abs().sum(-1)
    bound += ((sums.abs() + 1) * 2.0**-149).sum(-1)
    overflows = (factors * own_factors[:, None]).abs().amax(-1) > 3.4e38
    return terms.sum(-1), torch.where(overflows | (terms.abs().sum(-1) > 3.4e38), torch.inf, bound)


def close_to_exact(got, weight, bits, x):
    want, bound = exact(weight, bits, x)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert got[want.isnan()].isnan().all()
    checked = bound.isfinite()
    assert ((got.double() - want).abs() <= bound)[checked].all()


@over_shapes
@given(sizes, sizes, st.integers(0, 9), st.sampled_from([4, 8, 12]), scales, scales, seeds)
def test_products_are_those_of_the_quantised_operands(
    implementation, rows, columns, vectors, bits, scale, own_scale, seed
):
    weight = draw("gaussian", rows, columns, seed=seed).clamp(-3, 3) * scale
    x = draw("gaussian", vectors, columns, seed=seed + 1).clamp(-3, 3) * own_scale
    close_to_exact(LowBitMatrix.pack(weight, bits).products(x), weight, bits, x)


@over_shapes
@given(sizes, sizes, st.sampled_from([4, 8, 12]), st.sampled_from(["wide", "special", "extreme"]), seeds)
def test_products_of_awkward_numbers(implementation, rows, columns, bits, kind, seed):
    weight, x = draw(kind, rows, columns, seed=seed), draw(kind, 3, columns, seed=seed + 1)
    close_to_exact(LowBitMatrix.pack(weight, bits).products(x), weight, bits, x)
    plain = draw("gaussian", 3, columns, seed=seed)
    close_to_exact(LowBitMatrix.pack(weight, bits).products(plain), weight, bits, plain)


@over_shapes
@given(sizes, sizes, st.integers(0, 9), st.sampled_from([4, 8, 12]), seeds)
def test_every_instruction_set_gives_the_same_bits(rows, columns, vectors, bits, seed):
    weight, x = draw("wide", rows, columns, seed=seed), draw("wide", vectors, columns, seed=seed + 1)
    results = []
    for name in NATIVE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHLAMP_KERNELS", name)
            results.append(LowBitMatrix.pack(weight, bits).products(x))
    assert all(same_bits(got, results[0]) for got in results)


@pytest.mark.parametrize("kind", ["gaussian", "wide", "special", "extreme"])
def test_vectors_are_rounded_to_the_references_integers(instruction_set, kind):
    # One code of 7 in each row of the matrix, its scale 1: products show every integer times its scale.
    x = draw(kind, 50, 32)
    codes, own = reference_lowbit.quantise_vector(x)
    got = LowBitMatrix.pack(7 * torch.eye(32), 4).products(x)
    assert same_bits(got, (7 * codes.int()).float() * own)


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_the_largest_sums_of_integers_fit(implementation, bits):
    weight, x = torch.full((3, 64), 5.0), torch.full((2, 64), 3.0)
    weight[1], x[1] = -5.0, -3.0
    for repeats in (1, 8):
        got = LowBitMatrix.pack(weight, bits).products(x.repeat(repeats, 1))
        signs = torch.tensor([[1.0, -1, 1], [-1, 1, -1]]).repeat(repeats, 1)
        assert (got / signs - 960).abs().max() < 960 * 2**-7


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_what_is_not_finite_makes_its_row_or_vector_nan(implementation, bits):
    weight, x = draw("gaussian", 20, 70), draw("gaussian", 3, 70)
    weight[3, 69], weight[7, 0], weight[18, 40] = torch.nan, torch.inf, -torch.inf
    matrix = LowBitMatrix.pack(weight, bits)
    rows = torch.zeros(20, dtype=torch.bool)
    rows[[3, 7, 18]] = True
    assert torch.equal(matrix.products(x).isnan(), rows.expand(3, 20))
    assert torch.equal(matrix.products(torch.zeros(1, 70)).isnan()[0], rows)
    x[1, 5] = torch.inf
    got = matrix.products(x)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]].isnan(), rows.expand(2, 20))


def test_close_to_the_full_product(implementation):
    weight, x = draw("gaussian", 64, 576), draw("gaussian", 4, 576)
    full = x.double() @ weight.double().T
    for bits, limit in ((4, 0.15), (8, 0.01), (12, 6e-4)):
        matrix = LowBitMatrix.pack(weight, bits)
        left = matrix.products(x) - full
        assert left.norm() / full.norm() < limit
        # What the integers of the vectors leave out adds a little to what `errors` bounds.
        assert (left.abs() <= 1.01 * x.norm(dim=1)[:, None] * matrix.errors + 2e-2).all()


def test_results_depend_neither_on_threads_nor_on_other_vectors(instruction_set):
    weight, x = draw("wide", 517, 100), draw("wide", 11, 100)
    matrix = LowBitMatrix.pack(weight, 8)
    want = matrix.products(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert same_bits(matrix.products(x), want)
    finally:
        torch.set_num_threads(before)
    for piece in (slice(0, 1), slice(2, 4), slice(3, 6), slice(4, 11)):
        assert same_bits(matrix.products(x[piece]), want[piece])
    assert same_bits(LowBitMatrix.pack(weight[32:48], 8).products(x), want[:, 32:48])


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("kind", ["wide", "special"])
def test_many_vectors_are_multiplied_as_each_alone(instruction_set, bits, kind):
    """Panels and tiles, the last ones not full: rows of one block and of several, columns of more than a panel."""
    x = draw(kind, 600, 300, seed=1)
    for rows in (5, 16, 33, 100):
        matrix = LowBitMatrix.pack(draw("wide", rows, 300), bits)
        alone = torch.cat([matrix.products(row[None]) for row in x[:160]])
        for count in (5, 8, 13, 127, 131, 160):
            assert same_bits(matrix.products(x[:count]), alone[:count])
    assert same_bits(matrix.products(x)[440:], matrix.products(x[440:]))


def test_any_strides_of_vectors(implementation):
    x = draw("gaussian", 5, 70)
    matrix = LowBitMatrix.pack(draw("gaussian", 9, 70), 8)
    want = matrix.products(x)
    negated = torch.complex(torch.zeros(5, 70), -x).conj().imag
    spread = torch.zeros(5, 140)[:, ::2].copy_(x)
    for other in (x.T.contiguous().T, spread, negated, x.clone().requires_grad_()):
        assert same_bits(matrix.products(other), want)
    assert not matrix.products(x.clone().requires_grad_()).requires_grad


def test_many_threads_at_once(implementation):
    matrix = LowBitMatrix.pack(draw("gaussian", 300, 100), 8)
    inputs = [draw("gaussian", 1 + i % 5, 100, seed=i) for i in range(40)]
    want = [matrix.products(x) for x in inputs]
    packed = LowBitMatrix.pack(draw("gaussian", 300, 100, seed=9), 4).codes
    fresh = copy.deepcopy(matrix)  # its native object is made by several threads at once
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        for _ in range(5):
            assert same_bits(fresh.products(inputs[i % 40]), want[i % 40])
            assert torch.equal(LowBitMatrix.pack(draw("gaussian", 300, 100, seed=9), 4).codes, packed)
            i += 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(implementation, again):
    x = draw("gaussian", 2, 40)
    matrix = LowBitMatrix.pack(draw("gaussian", 20, 40), 12)
    want = matrix.products(x)
    other = again(matrix)
    del matrix
    assert same_bits(other.products(x), want)
    assert (other.rows, other.columns, other.bits, other.bytes) == (20, 40, 12, 64 * 32 * 3 // 2 + 2 * 64)


def test_the_kernels_may_change_after_packing(monkeypatch):
    x = draw("gaussian", 2, 40)
    matrix = LowBitMatrix.pack(draw("gaussian", 20, 40), 8)
    want = matrix.products(x)
    for name in ["torch", *NATIVE, "torch"]:
        monkeypatch.setenv("TORCHLAMP_KERNELS", name)
        assert torch.allclose(matrix.products(x), want, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 7, 0), (0, 0, 0)])
def test_empty_sizes(implementation, shape):
    rows, columns, vectors = shape
    got = LowBitMatrix.pack(torch.ones(rows, columns), 8).products(torch.ones(vectors, columns))
    assert same_bits(got, torch.zeros(vectors, rows))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 39), ValueError, r"\(2, 39\) don't fit a matrix of 40 columns"),
        (torch.ones(40), ValueError, r"shape \(vectors, columns\), got \(40,\)"),
        (torch.ones(2, 40).double(), TypeError, r"vectors must be float32, got torch.float64"),
        (torch.ones(2, 40, device="meta"), ValueError, r"vectors must be on the CPU, got meta"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(implementation, x, error, message):
    with pytest.raises(error, match=message):
        LowBitMatrix.pack(torch.ones(3, 40), 8).products(x)


def test_the_native_object_refuses_results_of_another_size(instruction_set):
    matrix = LowBitMatrix.pack(torch.ones(5, 40), 8)
    tensors = (matrix.codes, matrix.scales, matrix.block_errors)
    kernel = native.extension().BlockMatrix(native.instruction_set(), *tensors, 8, 5, 40)
    for x, y in [
        (torch.ones(2, 40), torch.ones(2, 4)),
        (torch.ones(2, 40), torch.ones(1, 5)),
        (torch.ones(2, 40), torch.ones(2, 10)[:, ::2]),
        (torch.ones(2, 41), torch.ones(2, 5)),
        (torch.ones(2, 80)[:, ::2], torch.ones(2, 5)),
    ]:
        with pytest.raises(ValueError, match="must be contiguous"):
            kernel.products(x, y, 1)


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_parts_of_a_matrix_are_what_packing_them_makes(implementation, bits):
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(16 + 48 + 21, 70, generator=generator), torch.randn(3, 70, generator=generator)
    matrix = LowBitMatrix.pack(weight, bits)
    parts = matrix.split([16, 48, 21])
    for part, rows in zip(parts, weight.split([16, 48, 21]), strict=True):
        alone = LowBitMatrix.pack(rows, bits)
        assert torch.equal(part.products(x), alone.products(x))
        assert torch.equal(part.errors, alone.errors)
    assert torch.equal(torch.cat([part.products(x) for part in parts], 1), matrix.products(x))
    assert all(part.codes.untyped_storage().data_ptr() == matrix.codes.data_ptr() for part in parts)
    for sizes in ([16, 48], [20, 65]):
        with pytest.raises(ValueError, match="don't split 85 rows"):
            matrix.split(sizes)
