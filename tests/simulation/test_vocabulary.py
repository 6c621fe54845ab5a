import pytest
import torch

from torchlamp.rules import RULES, Rule, Tile
from torchlamp.simulation.linear import LowPass, linear
from torchlamp.simulation.vocabulary import Vocabulary

FITTING = [e for rule in RULES.values() if rule.looks_through in ("any", "softmax") for e in rule.examples]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_it_is_the_softmax_tile(softcap):
    y = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 4
    tile = Vocabulary(softcap)(LowPass(y=y, rows=slice(0, 3), error=y.abs()))
    expected = Tile.from_scores(y, softcap=softcap, error=y.abs())
    for name in ("scores", "logits", "probabilities", "visible", "error", "gain"):
        torch.testing.assert_close(getattr(tile, name), getattr(expected, name), msg=name)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gain_is_the_column_norm_of_the_jacobian(softcap):
    y = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 4

    def probabilities(row):
        return (row if softcap is None else softcap * torch.tanh(row / softcap)).softmax(dim=-1)

    gain = Vocabulary(softcap)(LowPass(y=y, rows=slice(0, 3))).gain
    for i, row in enumerate(y):
        J = torch.autograd.functional.jacobian(probabilities, row)
        torch.testing.assert_close(gain[i], J.abs().sum(dim=0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spelling", FITTING)
def test_every_fitting_rule(spelling):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 16, generator=g), torch.randn(40, 16, generator=g)
    result = linear(
        x,
        weight,
        accumulator="ps3",
        rule=Rule.parse(spelling),
        next_function=Vocabulary(),
        generator=torch.Generator(),
    )
    high = linear(x, weight, accumulator="fp32", rule="none").output
    low = linear(x, weight, accumulator="ps3", rule="none").output
    assert ((result.output == high) | (result.output == low)).all()
    assert torch.equal((result.output != low).sum(-1) <= result.selected, torch.ones(2, 3, dtype=torch.bool))
