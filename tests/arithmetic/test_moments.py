"""Statistics of operands: they add up, and follow the operands through every transform."""

import pickle

import pytest
import torch
from test_transforms import SIDES, chain, draw

from torchlamp.arithmetic.transforms import TRANSFORMS, Transform
from torchlamp.arithmetic.transforms.chain import fit
from torchlamp.arithmetic.transforms.moments import Moments


def assert_same(first: Moments, second: Moments, tolerance=1e-10):
    for name in ("count", "total", "squares", "products"):
        one, other = getattr(first, name), getattr(second, name)
        if one is None or other is None:
            assert one is other
            continue
        scale = float(second.squares.max())
        scale = (scale * float(second.count.max())) ** 0.5 if name == "total" else scale
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("with_products", [False, True])
def test_moments_add_up_over_calls(with_products):
    x = draw(2, 2, rows=50)[0]
    x[1, 7, 2] = torch.nan
    parts = [Moments.of(part, with_products) for part in x.split([1, 30, 0, 19], 1)]
    assert_same(sum(parts[1:], parts[0]), Moments.of(x, with_products))
    assert Moments.of(x).count.tolist() == [50, 49]
    torch.testing.assert_close(Moments.of(x).mean[0], x[0].double().mean(0))
    torch.testing.assert_close(Moments.of(x).energy[0], x[0].double().square().mean(0))
    one = Moments.of(x[:1], with_products)
    assert_same(one.repeated(3), Moments.of(x[:1].expand(3, -1, -1), with_products))
    assert_same(pickle.loads(pickle.dumps(one)), one)


def test_moments_of_no_vectors():
    empty = Moments.of(torch.zeros(1, 0, 4), True)
    assert empty.mean.tolist() == empty.energy.tolist() == [[0.0] * 4]
    bad = Moments.of(torch.full((1, 3, 4), torch.nan), True)
    assert_same(bad, empty)
    for name in TRANSFORMS:
        change = Transform.parse(name).fit(empty, empty, "right")
        assert change.left(torch.ones(1, 2, 4)).isfinite().all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_moments_follow_the_operands(name, side):
    a, b = draw(4, 2, rows=30, columns=40)
    before = Moments.of(a.view(2, 60, 16), True), Moments.of(b.mT, True)
    change = Transform.parse(name).fit(*before, side)
    left, right = change.moments(*before)
    assert_same(left, Moments.of(change.left(a).view(2, 60, 16), True), 1e-5)
    assert_same(right, Moments.of(change.right(b).mT, True), 1e-5)


@pytest.mark.parametrize(
    "names", [["center", "sort"], ["smooth", "sort"], ["center", "balance", "sort"], ["hadamard", "smooth"]]
)
def test_a_chain_is_fitted_as_if_each_saw_the_changed_operands(names):
    a, b = draw(4, 2, rows=100, columns=90)
    changes = fit(chain(names), Moments.of(a.view(2, 200, 16), True), Moments.of(b.mT, True))
    for transform, change in zip(chain(names), changes, strict=True):
        again = transform.fit(Moments.of(a.reshape(2, 200, 16), True), Moments.of(b.mT, True), "right")
        torch.testing.assert_close(change.left(a), again.left(a), rtol=1e-3, atol=1e-3)
        a, b = change.left(a), change.right(b)
