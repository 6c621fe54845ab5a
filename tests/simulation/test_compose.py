"""Any f(g(x)): the look-ahead of known functions, exact recomputation, and what a choice is worth."""

import pytest
import torch

import torchlamp
from torchlamp.arithmetic import Accumulator
from torchlamp.rules import Rule
from torchlamp.simulation.activation import activated
from torchlamp.simulation.compose import compose
from torchlamp.simulation.linear import linear
from torchlamp.simulation.statistics import Statistics
from torchlamp.simulation.vocabulary import Vocabulary


def softmax(y):
    return y.softmax(-1)


def draw(rows=7, inputs=40, outputs=19):
    g = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=g) * 0.5)
        layer.bias.copy_(torch.randn(outputs, generator=g))
    return layer, torch.randn(rows, inputs, generator=g)


FUNCTIONS = {
    "softmax": softmax,
    "normalised": lambda y: torch.nn.functional.layer_norm(y, y.shape[-1:]),
    "elementwise": torch.nn.functional.gelu,
    "pairs": lambda y: y[:, ::2].sin() * y[:, :10].exp(),
    "one number": lambda y: y.logsumexp(-1, keepdim=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("precision", ["ps3", "ps3.center.sort", "int4@ps5", "int4", "int4.smooth"])
def test_recomputing_all_is_the_composition(name, precision):
    layer, x = draw()
    f = FUNCTIONS[name]
    expected = f(layer(x)).detach()
    torch.testing.assert_close(compose(layer, f, x, f"{precision}+all"), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(compose(layer, f, x, f"{precision}+none"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["strict:0.05", "running:0.01", "oracle:0.01"])
def test_a_softmax_is_looked_through_as_the_vocabularys(rule):
    layer, x = draw()
    found = compose(layer, softmax, x, f"ps4+{rule}")
    known = linear(x, layer.weight.detach(), layer.bias.detach(), accumulator=Accumulator.parse("ps4"),
                   rule=Rule.parse(rule), next_function=Vocabulary())  # fmt: skip
    torch.testing.assert_close(found, known.output.softmax(-1), rtol=1e-6, atol=1e-7)
    assert 0 < int(known.selected.sum()) < known.selected.numel() * 19


def test_an_elementwise_function_selects_what_is_steep():
    layer, x = draw()
    statistics = Statistics()
    compose(layer, torch.relu, x, "ps4+strict:0.1", statistics=statistics)
    known = linear(x, layer.weight.detach(), layer.bias.detach(), accumulator="ps4", rule="none",
                   next_function=activated(torch.relu))  # fmt: skip
    y = known.output
    weight = (y > 0) * y.abs() / torch.relu(y).sum(-1, keepdim=True)
    assert statistics.selected == int((weight > 0.1).sum())
    assert statistics.eligible == y.numel()


def test_the_gain_bounds_the_change_to_first_order():
    layer, x = draw(rows=1)
    y = layer(x).detach()
    f = FUNCTIONS["normalised"]
    jacobian = torch.autograd.functional.jacobian(lambda row: f(row[None])[0], y[0])
    gains = jacobian.abs().sum(0) / f(y).abs().sum()
    threshold = float((gains * y[0].abs()).median())
    statistics = Statistics()
    compose(layer, f, x, f"ps23+strict:{threshold}", statistics=statistics)
    assert abs(statistics.selected - 9) <= 1  # half of 19


def test_looking_ahead_beats_chance():
    layer, x = draw(rows=200)
    exact = softmax(layer(x).detach())
    statistics = Statistics()
    chosen = compose(layer, softmax, x, "ps3+running:0.02", statistics=statistics)
    rate = statistics.selected / statistics.eligible
    random = compose(layer, softmax, x, f"ps3+random:{rate}", generator=torch.Generator().manual_seed(0))
    plain = compose(layer, softmax, x, "ps3")
    errors = [float((y - exact).norm()) for y in (chosen, random, plain)]
    assert rate < 0.4
    assert errors[0] < errors[1] / 2 < errors[2]


def test_a_weight_any_leading_dimensions_and_no_gradient():
    layer, x = draw(rows=12)
    weight = layer.weight.detach()
    found = torchlamp.compose(weight, softmax, x.view(3, 4, -1), "ps4+strict:0.1")
    assert found.shape == (3, 4, 19)
    torch.testing.assert_close(found.view(12, 19), compose(weight, softmax, x, "ps4+strict:0.1"))
    assert not compose(layer, softmax, x.requires_grad_(), "ps4").requires_grad


def test_what_is_refused():
    layer, x = draw()
    with pytest.raises(ValueError, match=r"rule 'topz:0.1' looks through a softmax of its own"):
        compose(layer, softmax, x, "ps4+topz:0.1")
    with pytest.raises(TypeError, match="float64"):
        compose(layer, softmax, x.double(), "ps4")
    with pytest.raises(ValueError, match="doesn't fit a weight"):
        compose(layer, softmax, x[:, :3], "ps4")
