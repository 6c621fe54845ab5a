import functools

import pytest
import torch
from scalar_oracle import products as oracle

from operands import FORMATS, FORMS, KINDS, draw, same_bits
from torchlamp.arithmetic import Accumulator
from torchlamp.kernels import products as module
from torchlamp.kernels import reference
from torchlamp.kernels.products import products
from torchlamp.kernels.reference import products_reference
from torchlamp.kernels.rounding import round_to_grid

SPELLINGS = [name + form for name in FORMATS for form in FORMS]
#: One format for each way in which a native kernel may round.
REPRESENTATIVE = [
    "ps4",
    "ps22",
    "ps23",
    "fp16",
    "e4m3fn",
    "e4m3fn-flush",
    "e4m3fnuz",
    "ue5m3",
    "e7m23",
    "ps4-sat",
]
SOME = [
    "ps4",
    "ps7/unfused",
    "ps7/block4",
    "ps13/promote5",
    "e4m3fn",
    "e5m2/block3",
    "ue4m3/promote3",
    "ps23",
]


def how(spelling):
    return Accumulator.parse(spelling).accumulation


@functools.cache
def operands(kind, groups=4, shared=2, rows=3, depth=11, columns=5):
    return draw(kind, groups, rows, depth), draw(kind, shared, depth, columns, seed=1)


@functools.cache
def expected(spelling, kind, scaling=None):
    return oracle(*operands(kind), how(spelling), scaling)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_products_and_squares_equal_the_scalar_oracle(implementation, spelling):
    for kind in KINDS:
        out, squares = products(*operands(kind), how(spelling), squares=True)
        want, want_squares = expected(spelling, kind)
        assert same_bits(out, want)
        assert same_bits(squares, want_squares)


@pytest.mark.parametrize("spelling", SOME)
@pytest.mark.parametrize("scaling", [0.125, 0.0721687836, -1.0, 1e-38])
def test_scaling_is_a_float32_product_rounded_again(implementation, spelling, scaling):
    for kind in KINDS:
        out, squares = products(*operands(kind), how(spelling), scaling=scaling)
        assert squares is None
        assert same_bits(out, expected(spelling, kind, scaling)[0])


@pytest.mark.parametrize("spelling", SOME)
@pytest.mark.parametrize("depth", [0, 1, 2, 64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (1, 3)])
def test_depths_and_thin_shapes(implementation, spelling, depth, rows, columns):
    a, b = draw("wide", 2, rows, depth), draw("wide", 1, depth, columns, seed=1)
    for scaling in (None, -0.5):
        out, squares = products(a, b, how(spelling), scaling=scaling, squares=True)
        want, want_squares = oracle(a, b, how(spelling), scaling)
        assert same_bits(out, want)
        assert same_bits(squares, want_squares)


@functools.cache
def by_reference(spelling, kind, **options):
    return products_reference(*operands(kind, 2, 1, 7, 19, 70), how(spelling), squares=True, **options)


@pytest.mark.parametrize("spelling", [name + form for name in REPRESENTATIVE for form in FORMS])
def test_sizes_that_fill_no_vector_equal_the_reference(instruction_set, spelling):
    for kind in ("gaussian", "wide", "special"):
        for options in ({}, {"scaling": 0.3, "causal": 64}):
            got = products(*operands(kind, 2, 1, 7, 19, 70), how(spelling), squares=True, **options)
            want = by_reference(spelling, kind, **options)
            assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", [*REPRESENTATIVE, "ps7", "e5m2", "e2m1fn"])
def test_one_term_is_a_rounding(instruction_set, name):
    # Every 16-bit pattern as bfloat16 and as float16, plus random ones: 1 x + 0 is x, but for the sign of
    # zero.
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    random = draw("extreme", 2**14)
    ordinary = draw("wide", 2**14)
    everything = [
        patterns.view(torch.bfloat16).float(),
        patterns.view(torch.float16).float(),
        random,
        ordinary,
    ]
    for x in everything:
        out, _ = products(torch.ones(1, 1, 1), x.view(1, 1, -1), how(name))
        assert same_bits(out.flatten(), round_to_grid(x + 0.0, how(name).grid))


@pytest.mark.parametrize("name", ["ps4", "ps7", "ps22", "e4m3fn", "e5m2", "fp16", "e3m4"])
def test_ties_and_their_neighbours(instruction_set, name):
    # Halves between two grid values and the floats next to them, in every binade near the format's range.
    grid = how(name).grid
    codes = torch.arange(2 ** min(grid.mantissa_bits + 2, 10)).float()
    steps = (1 + codes / len(codes)).view(1, -1) * torch.exp2(torch.arange(-24.0, 17.0)).view(-1, 1)
    x = torch.cat([steps, torch.nextafter(steps, steps * 2), torch.nextafter(steps, steps * 0)]).flatten()
    x = torch.cat([x, -x])
    out, _ = products(torch.ones(1, 1, 1), x.view(1, 1, -1), how(name))
    assert same_bits(out.flatten(), round_to_grid(x, grid))


@pytest.mark.parametrize("spelling", SOME)
@pytest.mark.parametrize("causal", [-9, -1, 0, 2, 30])
def test_the_causal_bound_zeroes_and_changes_nothing_else(implementation, spelling, causal):
    a, b = operands("special", 4, 2, 9, 6, 8)
    full = products(a, b, how(spelling), squares=True)
    got = products(a, b, how(spelling), causal=causal, squares=True)
    computed = torch.ones(9, 8).tril(causal).bool()
    for x, y in zip(got, full, strict=True):
        assert same_bits(x, torch.where(computed, y, 0.0))


@pytest.mark.parametrize("spelling", ["ps4", "ps7/unfused/block5", "e4m3fn/promote4"])
def test_results_depend_neither_on_threads_nor_on_batch_nor_on_tiles(implementation, spelling, monkeypatch):
    a, b = draw("wide", 6, 37, 19), draw("wide", 2, 19, 83, seed=1)
    want, want_squares = products(a, b, how(spelling), scaling=0.25, squares=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            out, squares = products(a, b, how(spelling), scaling=0.25, squares=True)
            assert same_bits(out, want)
            assert same_bits(squares, want_squares)
    finally:
        torch.set_num_threads(before)
    for g in range(6):
        alone, _ = products(a[g : g + 1], b[g // 3 : g // 3 + 1], how(spelling), scaling=0.25)
        assert same_bits(alone, want[g : g + 1])
    for piece in (slice(0, 1), slice(5, 12), slice(36, 37)):
        assert same_bits(products(a[:, piece], b, how(spelling), scaling=0.25)[0], want[:, piece])
        assert same_bits(products(a, b[..., piece], how(spelling), scaling=0.25)[0], want[..., piece])
    for entries in (1, 1000):
        monkeypatch.setattr(reference, "_SLAB_ENTRIES_CPU", entries)
        assert same_bits(products(a, b, how(spelling), scaling=0.25)[0], want)


@pytest.mark.parametrize("spelling", ["ps4", "e4m3fn/block3", "ps7/promote4"])
def test_any_strides(implementation, spelling):
    a, b = draw("wide", 4, 5, 7), draw("wide", 2, 7, 9, seed=1)
    want, _ = products(a, b, how(spelling))
    a_columns = a.transpose(1, 2).contiguous().transpose(1, 2)
    b_columns = b.transpose(1, 2).contiguous().transpose(1, 2)
    a_spread = torch.zeros(4, 5, 14)[..., ::2].copy_(a)
    b_heads = b.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    for x in (a, a_columns, a_spread):
        for y in (b, b_columns, b_heads):
            assert same_bits(products(x, y, how(spelling))[0], want)
    expanded = products(a[:1].expand(4, 5, 7), b[:1], how(spelling))[0]
    assert same_bits(expanded, products(a[:1], b[:1], how(spelling))[0].expand(4, 5, 9))
    same_row = products(a[:, :1].expand(4, 5, 7), b, how(spelling))[0]
    assert same_bits(same_row, want[:, :1].expand(4, 5, 9))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 0), (2, 0, 4, 5, 1), (2, 3, 4, 0, 1), (0, 3, 4, 5, 1)])
def test_empty_results(implementation, shape):
    groups, rows, depth, columns, shared = shape
    out, squares = products(
        torch.ones(groups, rows, depth), torch.ones(shared, depth, columns), how("ps4"), squares=True
    )
    assert out.shape == squares.shape == (groups, rows, columns)


def test_float32_strict_sums_are_close_to_torch(implementation):
    a, b = draw("gaussian", 4, 20, 64), draw("gaussian", 2, 64, 30, seed=1)
    exact = a.double() @ b.double().repeat_interleave(2, 0)
    out, _ = products(a, b, how("ps23"))
    bound = 64 * 2.0**-24 * (a.double().abs() @ b.double().abs().repeat_interleave(2, 0))
    assert ((out - exact).abs() <= bound * 1.001).all()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((2, 3, 4), (2, 5, 6), r"\(2, 3, 4\) and \(2, 5, 6\) don't fit"),
        ((3, 3, 4), (2, 4, 6), "G a multiple of Gb"),
        ((3, 4), (1, 4, 6), "don't fit"),
        ((2, 3, 4), (0, 4, 6), "don't fit"),
    ],
)
def test_shapes_that_do_not_fit(a, b, message):
    with pytest.raises(ValueError, match=message):
        products(torch.ones(a), torch.ones(b), how("ps4"))


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"torch.float64 and torch.float32: convert with .float\(\)"):
        products(torch.ones(1, 1, 1).double(), torch.ones(1, 1, 1), how("ps4"))


def test_a_device_without_float64_is_served_by_the_cpu(monkeypatch):
    a, b = operands("gaussian")
    want = products(a, b, how("ps4"), squares=True)
    monkeypatch.setattr(module, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    got = products(a, b, how("ps4"), squares=True)
    assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))
    assert products(a, b, how("ps4"))[1] is None
