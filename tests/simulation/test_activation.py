import pytest
import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from torchlamp.rules import Rule
from torchlamp.rules.element_tile import ElementTile
from torchlamp.simulation.activation import activated, derivative, gated
from torchlamp.simulation.linear import LowPass, linear

NAMES = ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "tanh"]
CURVES = {name: ACT2FN[name] for name in NAMES}


def pre_activations(rows=4, size=6, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2


def low(y, numerator=None):
    return LowPass(y=y, rows=slice(0, len(y)), numerator=numerator, cheap_numerator=numerator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inference", [False, True])
def test_derivatives(name, inference):
    y = torch.tensor([[-8.0, -4, -2, -1, 0.5, 1, 3, 8]])
    h = 1e-6
    difference = (CURVES[name](y.double() + h) - CURVES[name](y.double() - h)) / (2 * h)
    with torch.inference_mode(inference):
        slope = derivative(CURVES[name], y.clone())
    torch.testing.assert_close(slope.double(), difference, rtol=1e-4, atol=1e-6)


def test_condition_numbers_of_method_md():
    """|y phi'(y) / phi(y)| at points computed by hand: SiLU 1 + y (1 - sigma(y)), GELU 1 + y pdf(y) / cdf(y)."""
    y = torch.tensor([[-8.0, -4.0, -2.0]], dtype=torch.float64)
    silu = activated(F.silu)(low(y, y.abs())).condition
    torch.testing.assert_close(silu, y.new_tensor([[7.0, 2.93, 0.76]]), atol=0.01, rtol=0)
    gelu = activated(F.gelu)(low(y, y.abs())).condition
    torch.testing.assert_close(gelu, y.new_tensor([[65.0, 15.9, 3.7]]), atol=1.0, rtol=0)
    relu = activated(torch.relu)(low(torch.tensor([[-3.0, 0.0, 2.0]]), torch.ones(1, 3))).condition
    assert relu.tolist() == [[0.0, 0.0, 0.5]]


@pytest.mark.parametrize("name", NAMES)
def test_gain_of_an_activation_is_the_column_norm_of_the_jacobian(name):
    y = pre_activations()
    W = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    tile = activated(CURVES[name], W.norm(dim=0))(low(y))
    for i, row in enumerate(y):
        J = torch.autograd.functional.jacobian(lambda a: CURVES[name](a) @ W.T, row)
        size = (CURVES[name](row) * W.norm(dim=0)).norm()
        torch.testing.assert_close(tile.gain[i], J.norm(dim=0) / size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norms", [False, True])
def test_gain_of_a_glu_is_the_column_norm_of_the_jacobian(name, norms):
    y = pre_activations(size=12)
    W = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) if norms else torch.eye(6)
    tile = gated(CURVES[name], W.norm(dim=0) if norms else None)(low(y))
    for i, row in enumerate(y):
        J = torch.autograd.functional.jacobian(lambda ab: (CURVES[name](ab[:6]) * ab[6:]) @ W.T, row)
        size = (CURVES[name](row[:6]) * row[6:] * W.norm(dim=0)).norm()
        torch.testing.assert_close(tile.gain[i], J.norm(dim=0) / size)


def test_condition_of_a_glu_is_the_relative_change_of_its_product():
    y = pre_activations(size=12).double().float()
    numerator = pre_activations(size=12, seed=4).abs()
    tile = gated(F.silu)(low(y, numerator))
    h = 1e-6
    for j in range(12):
        moved = y.double()
        moved[:, j] += h * numerator[:, j]
        before = F.silu(y[:, :6].double()) * y[:, 6:]
        after = F.silu(moved[:, :6]) * moved[:, 6:]
        change = ((after - before) / before).abs()[:, j % 6] / h
        torch.testing.assert_close(tile.condition[:, j].double(), change, rtol=1e-3, atol=1e-5)


def test_the_rules_select_what_their_formulas_say():
    y, numerator = pre_activations(size=12), pre_activations(size=12, seed=2).abs()
    W = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    tile = gated(F.silu, W.norm(dim=0))(low(y, numerator))
    a, b = y[:, :6], y[:, 6:]
    h, slope = F.silu(a) * b, derivative(F.silu, a)
    size = (h * W.norm(dim=0)).norm(dim=1, keepdim=True)
    kappa_phi, kappa_a, kappa_b = (
        (a * slope / F.silu(a)).abs(),
        numerator[:, :6] / a.abs(),
        numerator[:, 6:] / b.abs(),
    )
    condition = torch.cat([kappa_phi * kappa_a, kappa_b], dim=1)
    output = condition * (h.abs() * W.norm(dim=0) / size).repeat(1, 2)
    for threshold in (0.1, 0.3, 1.0, 3.0):
        chosen = Rule.parse(f"condition:{threshold}").select(tile)
        assert torch.equal(chosen, condition > threshold)
        assert torch.equal(Rule.parse(f"output:{threshold}").select(tile), output > threshold)
    assert 0 < chosen.sum() < chosen.numel()


def test_numbers_that_are_none_are_selected_by_the_rules_for_elementwise_functions():
    y = torch.tensor([[torch.nan, torch.inf, 1.0]])
    tile = activated(F.silu)(low(y, torch.ones(1, 3)))
    for rule in ("condition:1e9", "condition-cheap:1e9"):
        assert Rule.parse(rule).select(tile).tolist() == [[True, True, False]]
    for rule in ("output:1e9", "output-cheap:1e9", "strict:1e9"):  # the norm of such a row is no number
        assert Rule.parse(rule).select(tile).all()
    ones = torch.ones(1, 2)
    without = ElementTile(ones, ones.bool(), ones)
    with pytest.raises(ValueError, match="the tile has no `condition`"):
        Rule.parse("condition:1").select(without)
    with pytest.raises(ValueError, match="the tile has no `numerator`"):
        Rule.parse("output:1").select(without)


def test_a_clipped_unit_needs_no_accuracy():
    """ReLU: what is clearly negative is never recomputed, whatever its condition number."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 40, generator=g), torch.randn(30, 40, generator=g)
    seen = []

    def look(low):
        seen.append(low.y)
        return activated(torch.relu)(low)

    result = linear(x, weight, accumulator="ps3", rule="condition:1.0001", next_function=look)
    assert torch.equal(result.selected, (seen[0] > 0).sum(-1))


def test_output_rule_cuts_the_error_of_the_next_layer_more_than_random():
    g = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(64, 96, generator=g),
        torch.randn(128, 96, generator=g),
        torch.randn(32, 64, generator=g),
    )
    up /= 96**0.5
    exact = (F.silu(x @ up[:64].T) * (x @ up[64:].T)) @ down.T
    errors = {}
    for rule in (
        "none",
        "output:1",
        "random-like:output:1",
        "running:0.02",
        "random-like:running:0.02",
    ):
        result = linear(
            x,
            up,
            accumulator="ps4",
            rule=rule,
            next_function=gated(F.silu, down.norm(dim=0)),
            generator=torch.Generator(),
        )
        a, b = result.output.chunk(2, dim=-1)
        errors[rule] = float(((F.silu(a) * b) @ down.T - exact).norm() / exact.norm())
        assert result.selected.sum() < 0.35 * 64 * 128
    assert errors["output:1"] < 0.6 * errors["random-like:output:1"]
    assert errors["running:0.02"] < 0.6 * errors["random-like:running:0.02"]
