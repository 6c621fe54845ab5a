import pytest
import torch

import torchlamp
from torchlamp.rules import RULES, Rule
from torchlamp.simulation.linear import LowPass
from torchlamp.simulation.norms import Norm, Normed, norm_input

ANY = [e for rule in RULES.values() if rule.looks_through == "any" for e in rule.examples]


def a_norm(kind, size=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=g)
    return Norm(kind, weight, torch.randn(size, generator=g) if kind == "layer" else None, 1e-5)


def vectors(rows=5, size=9, outlier=False):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(2)) + 1
    if outlier:
        x[:, 3] *= 300
    return x


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_it_is_the_norm_of_torch(kind):
    norm, x = a_norm(kind), vectors()
    if kind == "rms":
        expected = torch.nn.functional.rms_norm(x, (9,), norm.weight, norm.eps)
    else:
        expected = torch.nn.functional.layer_norm(x, (9,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gain_is_the_column_norm_of_the_jacobian(kind, outlier):
    norm, x = a_norm(kind), vectors(outlier=outlier).double()
    double = Norm(kind, norm.weight.double(), None if norm.bias is None else norm.bias.double(), norm.eps)
    for i, row in enumerate(x):
        J = torch.autograd.functional.jacobian(double, row)
        expected = J.norm(dim=0) / double(row).norm()
        torch.testing.assert_close(double.gain(x)[i], expected, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(norm.gain(x.float())[i].double(), expected, rtol=1e-3, atol=1e-7)


def test_without_weights_the_rms_gain_is_that_of_method_md():
    """||col_j||_2 |x_j| / ||f|| = sqrt(w_j (1 - w_j)), w_j = x_j^2 / ||x||^2."""
    x = vectors()
    w = x.square() / x.square().sum(dim=-1, keepdim=True)
    gain = Norm("rms", torch.ones(9), None, 0.0).gain(x)
    torch.testing.assert_close(gain * x.abs(), (w * (1 - w)).sqrt())


def test_a_normed_sum_carries_the_gain_of_the_sum_at_the_part():
    norm, x = a_norm("rms"), vectors()
    residual = torch.randn(8, 9, generator=torch.Generator().manual_seed(4))
    tile = Normed(norm, residual)(LowPass(y=x, rows=slice(2, 7), numerator=x.abs()))
    assert torch.equal(tile.gain, norm.gain(x + residual[2:7]))
    assert torch.equal(tile.scores, x)
    torch.testing.assert_close(tile.condition, x.abs() / (x + residual[2:7]).abs())
    alone = Normed(norm)(LowPass(y=x, rows=slice(2, 7)))
    assert torch.equal(alone.gain, norm.gain(x))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_input_is_rounded_but_for_what_the_rule_takes(kind):
    norm, x = a_norm(kind), vectors().view(1, 5, 9)
    rounded = torchlamp.round_to(x, "ps3")
    chosen = norm.gain(rounded) * rounded.abs() > 0.3
    result = norm_input(x, norm, accumulator="ps3", rule="strict:0.3")
    assert torch.equal(result.x, torch.where(chosen, x, rounded))
    assert torch.equal(result.selected, chosen.sum(-1))
    assert (result.eligible, result.selected.shape) == (9, (1, 5))
    assert 0 < chosen.sum() < chosen.numel()
    assert torch.equal(norm_input(x, norm, accumulator="ps3", rule="none").x, rounded)
    assert torch.equal(norm_input(x, norm, accumulator="ps3", rule="all").x, x)
    assert torch.equal(norm_input(x, norm, accumulator="ps23", rule="none").x, x)
    # One rounding errs by about (u / 2) |x|: the same rule in another unit.
    unit = 2.0**-4 / 2
    assert torch.equal(norm_input(x, norm, accumulator="ps3", rule=f"running:{0.3 * unit}").x, result.x)


@pytest.mark.parametrize("spelling", ANY)
def test_every_rule_that_looks_through_anything(spelling):
    norm, x = a_norm("rms"), vectors(rows=6).view(2, 3, 9)
    rule = Rule.parse(spelling)

    def run(x):
        return norm_input(x, norm, accumulator="ps3", rule=rule, generator=torch.Generator().manual_seed(1))

    together = run(x)
    assert torch.equal(run(x[1:]).x[0], together.x[1])
    assert torch.equal(together.x[..., :0], x[..., :0])
    assert (together.selected <= 9).all()


def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"norm_input takes float32 input, got torch.float64"):
        norm_input(vectors().double(), a_norm("rms"), accumulator="ps3", rule="none")
