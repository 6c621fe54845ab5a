import copy
import pickle

import pytest
import torch
from head_cases import CASES, SHAPES, case

from operands import same_bits
from torchlamp.decoding.head import LowBitHead
from torchlamp.kernels import native
from torchlamp.kernels.reference_lowbit import quantise_vector

NOTHING, EVERYTHING = float("inf"), -1.0
BITS = (4, 8, 12)


@pytest.fixture(autouse=True)
def one_thread():
    """Heads this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit(columns):
    """What a float32 sum loses at most, of the product of norms: docs/decoding.md counts the roundings."""
    return (columns / 32 + 16) * 2.0**-24


def norms(x):
    return x.double().norm(dim=-1, keepdim=True)


def same_top(got, want, top):
    """The `top` largest, values and tokens, are equal bit for bit; ties at the end may hold any of the tied."""
    top = min(top, want.shape[1])
    values = want.topk(top, dim=1).values
    assert same_bits(got.topk(top, dim=1).values, values)
    last = values[:, -1:]
    assert torch.equal(got >= last, want >= last)
    assert same_bits(torch.where(want >= last, got, 0.0), torch.where(want >= last, want, 0.0))


def as_float64_says(weight, x, got, top):
    """The `top` tokens are those of float64 up to logits that a float32 sum can't tell apart."""
    exact = x.double() @ weight.double().T
    top = min(top, exact.shape[1])
    picked = got.topk(top, dim=1).indices
    left = exact.scatter(1, picked, -torch.inf).amax(1)
    worst = exact.gather(1, picked).amin(1)
    # A sum of each side, and what float32 loses where it underflows.
    allowed = 2 * unit(x.shape[1]) * norms(x)[:, 0] * norms(weight).max() + x.shape[1] * 2.0**-148
    assert (left <= worst + allowed).all()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_the_largest_logits_are_those_of_full_precision(implementation, kind, bits):
    for tokens, columns in SHAPES:
        for seed in range(4 if native.available() else 1):
            weight, x = case(kind, tokens, columns, seed)
            head = LowBitHead.pack(weight, bits)
            full = head.run(x, EVERYTHING)[0]
            for top in (1, 5, 50):
                got, for_top, recomputed = head.run(x, NOTHING, top)
                assert min(top, tokens) * len(x) <= for_top == recomputed <= full.numel()
                if full.isfinite().all():
                    same_top(got, full, top)
                    as_float64_says(weight, x, got, top)
                else:  # nothing but full precision knows where a sum overflows
                    assert same_bits(got, full)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "overflow"])
@pytest.mark.parametrize("bits", BITS)
def test_low_bit_and_full_logits_are_within_the_bound(implementation, kind, bits):
    for tokens, columns in SHAPES:
        weight, x = case(kind, tokens, columns)
        head = LowBitHead.pack(weight, bits)
        low, exact = head.head.products(x).double(), x.double() @ weight.double().T
        codes, scales = quantise_vector(x)
        groups = scales.shape[1]
        rounded = (codes.view(4, groups, 32).double() * scales.double()[..., None]).flatten(1)
        e = norms(x - rounded[:, :columns])
        slack = norms(weight).max() + float(head.head.errors.max())
        slack = slack * (e + norms(x) * (columns / 8 + 40) * 2.0**-24) + groups * 2.0**-118
        assert ((low - exact).abs() <= head.head.errors.double() * norms(x) * 1.00001 + slack).all()
        full = head.run(x, EVERYTHING)[0].double()
        assert (
            (full - exact).abs() <= unit(columns) * norms(x) * norms(weight).T + columns * 2.0**-149
        ).all()


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "integers", "aligned", "on the grid", "zeros", "huge"])
@pytest.mark.parametrize("bits", BITS)
def test_kernel_and_reference(instruction_set, kind, bits):
    for tokens, columns in SHAPES:
        weight, x = case(kind, tokens, columns)
        head = LowBitHead.pack(weight, bits)
        for threshold in (NOTHING, 1e-3, EVERYTHING):
            got, for_top, recomputed = head.run(x, threshold, 3)
            want, reference_for_top, reference_recomputed = head.reference(x, threshold, 3)
            allowed = 3 * (unit(columns) * norms(x) * norms(weight).max() + 1e-30)
            # A token right at the threshold may fall on either side.
            differ = (got.double() - want.double()).abs() > allowed
            assert differ.sum() <= 1
            assert abs(for_top - reference_for_top) <= 1
            assert abs(recomputed - reference_recomputed) <= 1


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("bits", BITS)
def test_tokens_above_the_threshold_are_recomputed_and_no_others(implementation, bits, threshold):
    for kind in ("gaussian", "heavy"):
        weight, x = case(kind, 3000, 65)
        head = LowBitHead.pack(weight, bits)
        low, full = head.head.products(x), head.run(x, EVERYTHING)[0]
        for_top = head.run(x, NOTHING)[0] != low
        got, _, recomputed = head.run(x, threshold)
        z = low.double().softmax(dim=1)
        r = (head.head.errors * norms(x) / 65**0.5).double()
        # Errors beyond a nat: z counts as what it might be four standard deviations higher.
        raised = (z.clamp(min=2.0**-126) * torch.exp((4 * r).clamp(max=87))).clamp(max=1)
        weights = torch.where(r > 1, 2 * raised, 2 * z * (1 - z)) * r
        must = (weights > threshold * 1.001 + 1e-30) | for_top
        may = (weights > threshold * 0.998) | for_top
        assert same_bits(torch.where(must, got, 0.0), torch.where(must, full, 0.0))
        assert same_bits(torch.where(may, 0.0, got), torch.where(may, 0.0, low))
        # A recomputed logit can equal the low-bit one by chance: the flags above miss those.
        assert must.sum() - 8 <= recomputed <= may.sum() + 8


def test_everything_and_nothing(implementation):
    weight, x = case("gaussian", 100, 40)
    head = LowBitHead.pack(weight)
    full, _, recomputed = head.run(x, EVERYTHING)
    assert recomputed == 400
    torch.testing.assert_close(full, x @ weight.T)
    got, for_top, recomputed = head.run(x, NOTHING)
    assert for_top == recomputed < 40
    assert (got != full).sum() == 400 - int((got == full).sum())


def test_more_bits_recompute_fewer_tokens(implementation):
    weight, x = case("gaussian", 3000, 64)
    counts = [LowBitHead.pack(weight, bits).run(x, NOTHING)[1] for bits in BITS]
    assert counts[0] > counts[1] > counts[2] >= 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_vectors_that_are_not_finite_or_overflow_get_full_logits(implementation, bad):
    weight, x = case("gaussian", 70, 33)
    x[1, 5] = bad
    head = LowBitHead.pack(weight)
    clean = head.run(x[[0, 2, 3]], NOTHING)[0]
    got, for_top, _ = head.run(x, NOTHING)
    assert for_top >= 70
    assert same_bits(got[[0, 2, 3]], clean)
    want = (x[1].double() @ weight.double().T).float()
    assert torch.equal(got[1].isnan(), want.isnan())
    torch.testing.assert_close(got[1], want, equal_nan=True)


def test_results_depend_neither_on_threads_nor_on_other_vectors(instruction_set):
    weight, x = case("heavy", 9000, 40)
    x = torch.cat([x / k for k in range(1, 13)])  # enough that threads take whole vectors
    assert len(x) >= 10
    head = LowBitHead.pack(weight)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(head.run(x, 1e-4, 3))
    for got, *counts in results[1:]:
        assert same_bits(got, results[0][0])
        assert tuple(counts) == results[0][1:]
    assert same_bits(torch.cat([head.run(v[None], 1e-4, 3)[0] for v in x]), results[0][0])


def test_copies_and_pickles(implementation):
    weight, x = case("gaussian", 50, 33)
    head = LowBitHead.pack(weight, 12)
    want = head.run(x, 1e-3)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        got = other.run(x, 1e-3)
        assert same_bits(got[0], want[0])
        assert got[1:] == want[1:]


def test_strides_and_empty_sizes(implementation):
    weight, x = case("gaussian", 50, 33)
    want = LowBitHead.pack(weight).run(x, NOTHING)[0]
    spread = torch.zeros(4, 66)[:, ::2].copy_(x)
    assert same_bits(LowBitHead.pack(weight.T.contiguous().T).run(spread, NOTHING)[0], want)
    assert LowBitHead.pack(weight).run(x[:0], 1e-3)[0].shape == (0, 50)
    assert LowBitHead.pack(weight[:0]).run(x, 1e-3)[0].shape == (4, 0)
    assert (LowBitHead.pack(weight[:, :0]).run(x[:, :0], 1e-3)[0] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(implementation, bad):
    weight, _ = case("gaussian", 50, 33)
    weight[7, 7] = bad
    with pytest.raises(ValueError, match=r"weights \(50, 33\) hold infinities, NaN"):
        LowBitHead.pack(weight)


def test_what_it_cannot_run_is_refused(implementation):
    weight, x = case("gaussian", 50, 33)
    head = LowBitHead.pack(weight)
    with pytest.raises(ValueError, match=r"vectors of shape \(4, 32\) don't fit a matrix of 33 columns"):
        head.run(x[:, :32], 0.0)
    with pytest.raises(TypeError, match=r"must be float32, got torch\.float64"):
        head.run(x.double(), 0.0)
    with pytest.raises(ValueError, match="top=0: give at least 1"):
        head.run(x, 0.0, 0)
    with pytest.raises(ValueError, match="bits=5"):
        LowBitHead.pack(weight, 5)
    with pytest.raises(TypeError, match=r"must be float32 or of half precision, got torch\.float64"):
        LowBitHead.pack(weight.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_gives_the_numbers_of_its_widened_copy(implementation, dtype):
    weight, x = case("gaussian", 70, 33)
    narrow = weight.to(dtype)
    few, many = LowBitHead.pack(narrow), LowBitHead.pack(narrow.float())
    for threshold in (-1.0, 0.001, float("inf")):
        found, expected = few.run(x, threshold), many.run(x, threshold)
        assert torch.equal(found[0], expected[0])
        assert found[1:] == expected[1:]
    assert few.full.dtype == dtype


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_errors_beyond_a_nat_raise_the_weight(implementation, scale):
    """With 4 bits a logit may be off by nats; then z counts as what it might be four standard deviations higher."""
    weight, x = torch.randn(200, 64), scale * torch.randn(3, 64)
    head = LowBitHead.pack(weight, 4)
    low, error = head.head.products(x), head.head.errors * x.norm(dim=1, keepdim=True) / 8
    assert (error > 1).any()
    z = low.softmax(1)
    far = 2 * (z.clamp(min=2.0**-126) * torch.exp((4 * error).clamp(max=87))).clamp(max=1) * error
    weights = torch.where(error > 1, far, 2 * z * (1 - z) * error)
    _, for_top, recomputed = head.run(x, 0.5)
    assert abs(recomputed - int((weights > 0.5).sum())) <= for_top
    assert recomputed >= int((weights > 0.501).sum())
    assert recomputed > int((2 * z * (1 - z) * error > 0.5).sum())
