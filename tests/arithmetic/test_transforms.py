"""Transforms: each is exact, each does what its derivation in docs/transforms.md promises."""

import itertools
import pickle
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.quantise import quantise
from torchlamp.arithmetic.transforms import TRANSFORMS, Change, Transform, in_order
from torchlamp.arithmetic.transforms.chain import Changed, change_rows, fit, moments_of, transformed
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Diagonal, Side
from torchlamp.kernels.products import products

CHAINS = [[*names] for count in range(1, 8) for names in itertools.combinations(TRANSFORMS, count)]
SIDES: list[Side] = ["left", "right"]


def chain(names):
    return [Transform.parse(name) for name in names]


def draw(groups=1, shared=1, rows=20, columns=24, size=16, seed=0):
    """Operands (groups, rows, size) and (shared, size, columns) with channels of uneven energy and means."""
    g = torch.Generator().manual_seed(seed)
    uneven = torch.logspace(-1, 0.5, size)
    a = torch.randn(groups, rows, size, generator=g) * uneven[torch.randperm(size, generator=g)]
    b = torch.randn(shared, columns, size, generator=g) * uneven[torch.randperm(size, generator=g)]
    means = torch.randn(2, shared, 1, size, generator=g)
    return a + means[0].repeat_interleave(groups // shared, 0), (b + 2 * means[1]).mT


def product(a, b):
    """Float64 (G, M, N), batch g with b[g // (G // Gb)]."""
    return a.double() @ b.double().repeat_interleave(len(a) // len(b), 0)


def total(changed: Changed):
    """Products of changed operands with what they lack, in float64."""
    out = product(changed.left, changed.right)
    for shift in (changed.row_shift, changed.column_shift):
        out = out if shift is None else out + shift
    return out


def assert_exact(changed: Changed, a, b, tolerance=3e-6):
    """To the rounding of operands and shifts to float32: relative to the norms of the rows and columns."""
    norms = product(a.double().norm(dim=-1, keepdim=True), b.double().norm(dim=-2, keepdim=True))
    assert total(changed).shape == norms.shape
    assert bool(((total(changed) - product(a, b)).abs() <= tolerance * norms).all())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("names", CHAINS, ids=".".join)
def test_every_composition_is_exact(names, side):
    for groups, shared in ((1, 1), (6, 2)):
        a, b = draw(groups, shared)
        changed = transformed(a, b, chain(names), side)
        assert changed.left.shape == a.shape
        assert changed.right.shape == b.shape
        assert changed.left.dtype == changed.right.dtype == torch.float32
        assert_exact(changed, a, b, 2e-5 if "balance" in names else 3e-6)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([*TRANSFORMS]), min_size=1, max_size=5),
    st.sampled_from(SIDES),
    st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 9)] * 2, st.sampled_from([1, 2, 8, 64])),
    st.integers(0, 999),
)
def test_any_sequence_and_any_sizes_are_exact(names, side, sizes, seed):
    times, shared, rows, columns, size = sizes
    a, b = draw(times * shared, shared, rows, columns, size, seed)
    # One row or column leaves moments of rank 1; regularised maps have condition numbers up to 1e4 each.
    assert_exact(transformed(a, b, chain(names), side), a, b, 2e-3 if "balance" in names else 1e-5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_right_operand_has_a_change_of_its_own(name):
    a, b = draw(6, 3)
    together = transformed(a, b, chain([name]))
    for group in range(3):
        alone = transformed(a[2 * group : 2 * group + 2], b[group : group + 1], chain([name]))
        torch.testing.assert_close(together.left[2 * group : 2 * group + 2], alone.left)
        torch.testing.assert_close(together.right[group : group + 1], alone.right)


def test_center_takes_the_mean_off_one_side():
    a, b = draw(4, 2)
    right = transformed(a, b, chain(["center"]), "right")
    torch.testing.assert_close(right.right, b - b.mean(-1, keepdim=True))
    assert torch.equal(right.left, a)
    assert right.row_shift.shape == (4, 20, 1)
    assert right.column_shift is None
    left = transformed(a, b, chain(["center"]), "left")
    mean = a.view(2, 40, 16).mean(1, keepdim=True)
    torch.testing.assert_close(left.left.view(2, 40, 16), a.view(2, 40, 16) - mean)
    torch.testing.assert_close(left.column_shift[::2], mean @ b)
    assert left.row_shift is None


def test_bicenter_takes_both_means_off_scores_and_the_inputs_mean_off_linear_layers():
    a, b = draw(groups=2, shared=1)
    both = transformed(a, b, chain(["bicenter"]), "right")
    rows, columns = a.flatten(0, 1).mean(0), b[0].mean(1)
    torch.testing.assert_close(both.left, a - rows)
    torch.testing.assert_close(both.right, b - columns[:, None])
    torch.testing.assert_close(both.row_shift, a @ columns[:, None])
    torch.testing.assert_close(both.column_shift, (rows @ (b - columns[:, None])).expand(2, 1, -1))
    left, center = (transformed(a, b, chain([name]), "left") for name in ("bicenter", "center"))
    assert left.row_shift is None
    assert torch.equal(left.left, center.left)
    assert torch.equal(left.column_shift, center.column_shift)


def test_bicenter_on_queries_with_a_common_part():
    a, b = draw(rows=200, columns=200)
    a = a + torch.linspace(-6, 6, a.shape[-1])
    assert error(a, b, ["bicenter", "balance"]) < error(a, b, ["center", "balance"]) / 1.5


def test_one_row_and_one_column_keep_their_shift_on_its_side():
    a, b = draw(rows=1, columns=1)
    assert transformed(a, b, chain(["center"]), "left").column_shift.shape == (1, 1, 1)
    assert transformed(a, b, chain(["center"]), "right").row_shift.shape == (1, 1, 1)


def test_rows_are_changed_alone_as_with_the_right_operand():
    a, b = draw(4, 2)
    names = chain(["center", "smooth", "balance", "sort"])
    changes = fit(names, *moments_of(a, b, names))
    left, shift = change_rows(changes, a)
    both = transformed(a, b, names)
    assert torch.equal(left, both.left)
    assert torch.equal(shift, both.row_shift)


def test_sort_is_one_permutation_in_ascending_energy():
    a, b = draw(4, 2)
    changed = transformed(a, b, chain(["sort"]))
    for group in range(2):
        own = b[group]
        order = (a.view(2, 40, 16)[group].double().square().mean(0) * own.double().square().mean(1)).argsort()
        assert sorted(order.tolist()) == [*range(16)]
        assert torch.equal(changed.right[group], own[order])
        assert torch.equal(changed.left[2 * group : 2 * group + 2], a[2 * group : 2 * group + 2, :, order])


def test_equal_energies_stay_in_their_order():
    a, b = torch.ones(1, 3, 40), torch.arange(1.0, 3.0).expand(1, 40, 2)
    (change,) = fit(chain(["sort"]), *moments_of(a, b, chain(["sort"])))
    assert change.order.tolist() == [[*range(40)]]


def second_moments(changed: Changed, groups):
    left = changed.left.reshape(groups, -1, changed.left.shape[-1]).double()
    right = changed.right.double()
    return left.mT @ left / left.shape[1], right @ right.mT / right.shape[-1]


def test_balance_makes_both_second_moments_equal_diagonal_and_ascending():
    a, b = draw(4, 2, rows=200, columns=150)
    for left, right in zip(*second_moments(transformed(a, b, chain(["balance"])), 2), strict=True):
        scale = left.diagonal().max()
        torch.testing.assert_close(left / scale, right / scale, rtol=0, atol=1e-3)
        assert (left - left.diagonal().diag()).abs().max() < 1e-3 * scale
        assert (left.diagonal().diff() > -1e-4 * scale).all()


def rank_two(rows, size, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, rows, 2, generator=g) @ torch.randn(1, 2, size, generator=g)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "names", [["balance"], ["center", "balance"], ["center", "smooth", "balance", "sort"]]
)
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (rank_two(30, 16, 0), rank_two(30, 16, 1).mT),
        (rank_two(30, 16, 0) * 1e-18, rank_two(30, 16, 1).mT * 1e18),
        (torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2)), rank_two(1, 16, 3).mT),
        (draw(size=1)[0], draw(size=1)[1]),
        (torch.zeros(1, 3, 16), draw()[1]),
        (draw()[0], torch.zeros(1, 16, 3)),
        (torch.zeros(1, 3, 16), torch.zeros(1, 16, 3)),
        (1e4 + 1.7 * torch.arange(16).expand(1, 90, 16), draw()[1]),
        (draw()[0], (1e4 + 1.7 * torch.arange(16).expand(1, 90, 16)).mT),
    ],
    ids=["rank 2", "rank 2, scaled", "one row", "K = 1", "zeros left", "zeros right", "zeros", "constant left",
         "constant right"],
)  # fmt: skip
def test_moments_without_full_rank(a, b, names, side):
    assert_exact(transformed(a, b, chain(names), side), a, b, 2e-3)


def test_balance_of_one_centred_row_is_finite():
    a, b = draw(rows=1, columns=1, size=2, seed=1)
    for side in SIDES:
        assert_exact(transformed(a, b, chain(["hadamard", "center", "balance"]), side), a, b, 2e-3)


def test_moments_that_are_rounding_errors_alone_have_a_factor():
    # Taking off the mean of equal vectors leaves differences of numbers near 1e8, of either sign.
    constant = 1e4 + 1.7 * torch.arange(16).expand(1, 90, 16)
    left, right = Moments.of(draw()[0], True), Moments.of(constant, True)
    centred = right.centred(right.mean.float().double())
    assert (torch.linalg.eigvalsh(centred.second) < 0).any()
    for pair in ((left, centred), (centred, left)):
        change = Transform.parse("balance").fit(*pair, "right")
        torch.testing.assert_close(
            change.matrix @ change.inverse, torch.eye(16, dtype=torch.float64)[None], rtol=0, atol=1e-9
        )


def test_smooth_takes_powers_of_two_and_equalises_energies():
    a, b = draw(rows=300, columns=300)
    changed = transformed(a, b, chain(["smooth"]))
    ratio = a[0, 0] / changed.left[0, 0]
    assert torch.equal(ratio.log2(), ratio.log2().round())
    assert torch.equal(changed.right, b * ratio[None, :, None])
    energies = changed.left.square().mean(1) / changed.right.square().mean(2)
    assert energies.max() <= 4.001  # scales within a factor sqrt(2), each of them counted four times
    assert energies.min() >= 1 / 4.001
    original = a.square().mean(1) / b.square().mean(2)
    assert original.max() / original.min() > 100


@pytest.mark.parametrize("accumulator", ["ps4", "fp32", "ps7/block4", "e5m2"])
def test_smooth_changes_no_bit_of_a_narrow_sum(accumulator):
    a, b = draw()
    changed = transformed(a, b, chain(["smooth"]))
    how = Accumulator.parse(accumulator).accumulation
    assert torch.equal(
        products(changed.left.contiguous(), changed.right.contiguous(), how)[0],
        products(a, b.contiguous(), how)[0],
    )


def test_smooth_leaves_channels_without_energy_and_bounds_the_scales():
    a, b = draw()
    a[..., 3], b[:, 5], a[..., 7], b[:, 7] = 0.0, 0.0, a[..., 7] * 1e30, b[:, 7] * 1e-30
    changed = transformed(a, b, chain(["smooth"]))
    assert torch.equal(changed.right[:, 3], b[:, 3])
    assert torch.equal(changed.left[..., 5], a[..., 5])
    assert torch.equal(changed.left[..., 7], a[..., 7] / 2**20)


def test_hadamard_is_the_orthogonal_rotation():
    identity = torch.eye(16)[None]
    rotated = transformed(identity, identity, chain(["hadamard"]))
    assert torch.equal(rotated.left[0].abs(), torch.full((16, 16), 0.25))
    assert torch.equal(rotated.left @ rotated.left.mT, identity)
    assert torch.equal(rotated.right, rotated.left.mT)


def test_hadamard_refuses_what_is_no_power_of_two():
    a, b = draw(size=12)
    with pytest.raises(
        ValueError, match="transform 'hadamard': sums of 12 terms; it needs a power of two, leave it out"
    ):
        transformed(a, b, chain(["hadamard"]))
    with pytest.raises(ValueError, match="sums of 12 terms"):
        Transform.parse("hadamard").check_size(12)
    for name in TRANSFORMS:
        Transform.parse(name).check_size(16)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("names", CHAINS, ids=".".join)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_spoil_no_other(names, side, bad):
    a, b = draw(2, 1)
    a[1, 4, 3], b[0, 5, 7] = bad, bad
    found = total(transformed(a, b, chain(names), side))
    spoilt = torch.zeros(2, 20, 24, dtype=torch.bool)
    spoilt[1, 4], spoilt[:, :, 7] = True, True
    assert not found[spoilt].isfinite().any()
    clean_a, clean_b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    torch.testing.assert_close(
        found[~spoilt], product(clean_a, clean_b)[~spoilt], rtol=0, atol=2e-3 if "balance" in names else 1e-4
    )


@pytest.mark.parametrize(
    "shapes", [((1, 0, 4), (1, 4, 3)), ((1, 2, 4), (1, 4, 0)), ((0, 2, 4), (0, 4, 3)), ((1, 2, 0), (1, 0, 3))]
)
def test_nothing_to_change(shapes):
    a, b = map(torch.ones, shapes)
    changed = transformed(a, b, chain(["center", "balance", "sort"]))
    assert changed.left is a
    assert changed.right is b


def error(a, b, names, accumulator="ps4", operand="float32"):
    """Root mean square of what narrow sums of the changed and quantised operands are off by."""
    changed = transformed(a, b, chain(names))
    left, right = quantise(changed.left, operand), quantise(changed.right, operand, -2)
    out, _ = products(left.contiguous(), right.contiguous(), Accumulator.parse(accumulator).accumulation)
    found = out.double()
    for shift in (changed.row_shift, changed.column_shift):
        found = found if shift is None else found + shift
    return float((found - product(a, b)).square().mean().sqrt())


def test_center_and_sort_on_keys_with_a_large_bias():
    g = torch.Generator().manual_seed(1)
    query, key = draw(rows=128, columns=128, size=64)
    key = key + 30 * torch.randn(1, 64, 1, generator=g)
    plain, centred = error(query, key, []), error(query, key, ["center"])
    assert centred < plain / 10
    assert error(query, key, ["center", "sort"]) < centred / 1.5
    assert error(query, key, ["center", "balance"]) < centred / 1.5


def test_hadamard_is_for_quantised_operands_and_against_narrow_sums():
    a, b = draw(rows=128, columns=128, size=64)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(2, keepdim=True)
    assert error(a, b, ["hadamard"]) > 1.2 * error(a, b, [])
    assert error(a, b, ["hadamard"]) > 2 * error(a, b, ["sort"])
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(1, 64, 64, generator=g), torch.randn(1, 64, 64, generator=g)
    a[..., 5] *= 20
    assert error(a, b, ["hadamard"], "fp32", "int4") < error(a, b, [], "fp32", "int4") / 1.5


class Reverse(Transform):
    """The terms of a sum in reverse order."""

    name: ClassVar[str] = "reverse"
    summary: ClassVar[str] = "terms in reverse order"

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        order = torch.arange(left.total.shape[1] - 1, -1, -1)
        return Diagonal(order.expand(len(left.total), -1))


def test_a_new_transform_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="unknown transform 'reverse'"):
        Transform.parse("reverse")
    monkeypatch.setitem(TRANSFORMS, "reverse", Reverse())
    a, b = draw(4, 2)
    changed = transformed(a, b, chain(["center", "reverse"]))
    assert torch.equal(changed.left, a.flip(-1))
    assert_exact(changed, a, b)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_names_round_trip(name):
    transform = Transform.parse(name)
    assert str(transform) == name
    assert Transform.parse(f" {name.upper()} ") is Transform.parse(transform) is transform
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert transform.summary


def test_they_are_applied_in_this_order():
    assert [*TRANSFORMS] == ["headwise", "center", "bicenter", "smooth", "balance", "hadamard", "sort"]
    given = [Reverse(), "sort", Transform.parse("hadamard"), "center"]
    assert [*map(str, in_order(given))] == ["center", "hadamard", "sort", "reverse"]


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown transform 'centre': did you mean 'center'") as raised:
        Transform.parse("centre")
    assert "the transforms are headwise, center, bicenter, smooth, balance, hadamard, sort" in str(
        raised.value
    )
    with pytest.raises(TypeError, match="a transform is a name like 'center', got int 3"):
        Transform.parse(3)
