"""Convolutions under `compose`: sums of patches, one row of outputs for each sample."""

import pytest
import torch
from torch import nn

from torchlamp.simulation.compose import compose
from torchlamp.simulation.convolution import Convolution
from torchlamp.simulation.linear import linear
from torchlamp.simulation.statistics import Statistics

KINDS = {
    "plain": (nn.Conv2d, (3, 5, 3), {}, (3, 9, 8)),
    "everything": (
        nn.Conv2d,
        (4, 6, (3, 2)),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
        (4, 9, 8),
    ),
    "same": (nn.Conv2d, (2, 3, 4), {"padding": "same", "bias": False}, (2, 7, 6)),
    "depthwise": (nn.Conv1d, (4, 8, 3), {"groups": 4, "padding": 2}, (4, 11)),
    "volumes": (nn.Conv3d, (2, 3, 2), {"stride": 2}, (2, 5, 4, 6)),
}


def draw(name, samples=3):
    kind, sizes, options, shape = KINDS[name]
    torch.manual_seed(1)
    return kind(*sizes, **options), torch.randn(samples, *shape)


@pytest.mark.parametrize("name", KINDS)
def test_patches_times_weights_are_the_convolution(name):
    module, x = draw(name)
    convolution = Convolution(module)
    wanted = module(x).detach()
    assert convolution.output_shape(x) == tuple(wanted.shape[1:])
    parts = [p @ m.matrix for p, m in zip(convolution.patches(x), convolution.maps, strict=True)]
    sums = torch.cat([part.view(len(x), -1, part.shape[1]) for part in parts], dim=-1).transpose(1, 2)
    if module.bias is not None:
        sums = sums + module.bias.detach()[:, None]
    torch.testing.assert_close(sums.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("precision", ["ps3", "ps3.center.sort", "int4@ps5", "mxfp4@fp32"])
def test_recomputing_all_is_the_composition(name, precision):
    module, x = draw(name)
    f = torch.tanh
    expected = f(module(x)).detach()
    torch.testing.assert_close(compose(module, f, x, f"{precision}+all"), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(compose(module, f, x, f"{precision}+none"), expected, rtol=1e-4, atol=1e-4)


def test_a_window_of_one_is_a_linear_layer():
    """The same sums and selections, position by position, under an elementwise function of one position."""
    torch.manual_seed(2)
    module, x = nn.Conv1d(6, 5, 1), torch.randn(1, 6, 1)
    statistics = Statistics()
    found = compose(module, torch.tanh, x, "ps3+strict:0.05", statistics=statistics)
    weight, bias = module.weight.detach()[:, :, 0], module.bias.detach()
    known = Statistics()
    expected = compose_linear(weight, bias, x[:, :, 0], known)
    assert torch.equal(found[:, :, 0], expected)
    assert statistics.selected == known.selected > 0


def compose_linear(weight, bias, x, statistics):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return compose(layer, torch.tanh, x, "ps3+strict:0.05", statistics=statistics)


def test_the_look_ahead_sees_the_whole_sample():
    """Through a pooling and a linear layer behind the convolution, against chance at the same rate."""
    module, x = draw("plain", samples=60)
    behind = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(4), nn.Softmax(-1))
    exact = behind(module(x)).detach()
    statistics = Statistics()
    chosen = compose(module, behind, x, "ps2+running:0.005", statistics=statistics)
    rate = statistics.selected / statistics.eligible
    random = compose(module, behind, x, f"ps2+random:{rate}", generator=torch.Generator().manual_seed(0))
    errors = [float((y - exact).norm()) for y in (chosen, random)]
    assert 0 < rate < 0.4
    assert errors[0] < errors[1] / 2


def test_samples_do_not_influence_each_other():
    module, x = draw("everything")
    for policy in ("ps3+strict:0.01", "ps3.sort+running:0.01"):
        together = compose(module, torch.tanh, x, policy)
        torch.testing.assert_close(
            together, torch.cat([compose(module, torch.tanh, s[None], policy) for s in x])
        )
    draws = [torch.Generator().manual_seed(4) for _ in range(2)]
    same = compose(module, torch.tanh, x[:1].expand(2, -1, -1, -1), "ps2+random:0.5", generator=draws[0])
    assert torch.equal(same[0], same[1])


def test_what_is_refused():
    module, x = draw("plain")
    with pytest.raises(
        ValueError, match=r"stored operand 'int8': convolutions run operands with an accumulator"
    ):
        compose(module, torch.tanh, x, "int8")
    with pytest.raises(ValueError, match=r"it must be \(samples, 3, size, size\)"):
        compose(module, torch.tanh, x[0], "ps4")
    with pytest.raises(ValueError, match="smaller than the window"):
        compose(module, torch.tanh, x[..., :2], "ps4")
    with pytest.raises(ValueError, match="padding_mode='circular'"):
        compose(nn.Conv2d(3, 5, 3, padding_mode="circular"), torch.tanh, x, "ps4")
    with pytest.raises(TypeError, match="g is a ConvTranspose2d: linear maps are"):
        compose(nn.ConvTranspose2d(3, 5, 3), torch.tanh, x, "ps4")
    with pytest.raises(TypeError, match="float64"):
        compose(module, torch.tanh, x.double(), "ps4")
    with pytest.raises(ValueError, match="pass a generator"):
        compose(module, torch.tanh, x, "ps4+random:0.1")


def test_linear_alone_is_untouched():
    """`linear` and `compose` of a weight agree as before."""
    x, weight = torch.randn(4, 7), torch.randn(3, 7)
    assert torch.equal(
        compose(weight, lambda y: y, x, "ps4"), linear(x, weight, accumulator="ps4", rule="none").output
    )
