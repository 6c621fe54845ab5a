"""Column norms of Jacobians: closed forms and backward passes against torch.func, probes without bias."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from torchlamp.simulation import jacobian
from torchlamp.simulation.jacobian import column_norms
from torchlamp.simulation.known_functions import is_elementwise, known_columns

INPUTS = 12


def norm_module(kind):
    module = kind(INPUTS)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(INPUTS, generator=g))
    return module


KNOWN = {
    "softmax module": nn.Softmax(-1),
    "softmax": partial(torch.softmax, dim=-1),
    "log-softmax module": nn.LogSoftmax(dim=1),
    "log-softmax": partial(functional.log_softmax, dim=-1),
    "layer norm": norm_module(nn.LayerNorm),
    "layer norm without weight": nn.LayerNorm(INPUTS, elementwise_affine=False),
    "rms norm": norm_module(nn.RMSNorm),
    "glu": nn.GLU(),
    "glu function": functional.glu,
    "gelu": nn.GELU("tanh"),
    "elu": partial(functional.elu, alpha=0.5),
    "tanh": torch.tanh,
    "relu": functional.relu,
}
OTHERS = {
    "pairs": lambda y: y[:, ::2].sin() * y[:, :6].exp(),
    "a number": lambda y: y.logsumexp(-1),
    "a grid": lambda y: (y[:, :, None] * y[:, None, :3]).tanh(),
}


def rows(count=5, scale=1.0):
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(1)) * scale


def expected(f, y, order):
    jacobians = torch.stack([torch.func.jacrev(lambda row: f(row[None])[0].flatten())(row) for row in y])
    return torch.linalg.vector_norm(jacobians, ord=order, dim=1)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_closed_forms(name, order):
    f = KNOWN[name]
    closed = known_columns(f, order)
    assert closed is not None
    for scale in (0.1, 1.0, 4.0):
        y = rows(scale=scale)
        torch.testing.assert_close(closed(y).detach(), expected(f, y, order).detach(), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_every_output_differentiated(name, order):
    f, y = OTHERS[name], rows()
    assert known_columns(f, order) is None
    found = column_norms(f, y, order)
    torch.testing.assert_close(found.norms, expected(f, y, order), rtol=1e-5, atol=1e-6)
    assert found.probes == found.outputs.shape[1]
    assert not found.standard_error.any()
    torch.testing.assert_close(found.outputs, f(y).reshape(len(y), -1))


@pytest.mark.parametrize("order", [1, 2])
def test_probes_are_unbiased_and_know_their_error(order):
    """Over many draws the mean is the norm (its square in the 2-norm), and the spread what the standard errors say."""
    f, y = OTHERS["a grid"], rows(2)
    truth = expected(f, y, order)
    draws = torch.Generator().manual_seed(3)
    found = [column_norms(f, y, order, probes=8, generator=draws) for _ in range(400)]
    norms = torch.stack([n.norms for n in found])
    estimates = norms if order == 1 else norms.square()
    spread = estimates.std(0)
    assert ((estimates.mean(0) - truth**order).abs() <= 5 * spread / 20 + 1e-6).all()
    said = torch.stack([n.standard_error for n in found]).square().mean(0).sqrt()
    ratio = (said / norms.std(0))[norms.std(0) > 1e-6]
    assert 0.6 < float(ratio.median()) < 1.7


def test_many_outputs_are_probed(monkeypatch):
    monkeypatch.setattr(jacobian, "MAX_EXACT", 20)
    monkeypatch.setattr(jacobian, "PROBES", 9)
    found = column_norms(OTHERS["a grid"], rows())
    assert found.probes == 9
    assert (found.standard_error > 0).any()
    again = column_norms(OTHERS["a grid"], rows())
    assert torch.equal(found.norms, again.norms)
    assert column_norms(OTHERS["a grid"], rows(), probes=10**6).probes == 36


def test_what_is_not_recognised():
    hooked = nn.Softmax(-1)
    hooked.register_forward_hook(lambda module, x, y: y * 2)

    class Own(nn.Softmax):
        """A class of somebody's own."""

    for f in (
        hooked,
        Own(-1),
        nn.Softmax(0),
        torch.softmax,
        lambda y: y,
        nn.LayerNorm((2, 6)),
        nn.ReLU(inplace=True),
    ):
        assert known_columns(f, 1) is None
    assert is_elementwise(torch.relu)
    assert not is_elementwise(partial(functional.relu, inplace=True))


def test_what_is_refused():
    with pytest.raises(ValueError, match="gives no gradient"):
        column_norms(lambda y: y.sign().detach(), rows())
    with pytest.raises(ValueError, match="must map each row to a row"):
        column_norms(lambda y: y.sum(0), rows())
    with pytest.raises(ValueError, match="order=3"):
        column_norms(torch.tanh, rows(), 3)
    with pytest.raises(ValueError, match="probes=1: give at least 2"):
        column_norms(torch.tanh, rows(), probes=1)
