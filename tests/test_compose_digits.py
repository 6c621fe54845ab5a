"""examples/compose_digits.py: the compositions are what they say, and looking ahead beats chance on each."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra study")
FILE = Path(__file__).parents[1] / "examples" / "compose_digits.py"


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("compose_digits", FILE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["compose_digits"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["compose_digits"]


@pytest.fixture(scope="module")
def four(example):
    found = example.compositions(0)
    return {c.name: example.Composition(c.name, c.g, c.f, c.x[:60]) for c in found}


def test_kernel_regression_is_nadaraya_and_watsons(example, four):
    c = four["kernel regression"]
    train, labels, _ = example.digits(0)
    distances = torch.cdist(c.x.double(), train.double()).square()
    weights = (-distances / (2 * 1.5**2)).softmax(-1)
    wanted = weights @ torch.nn.functional.one_hot(labels, 10).double()
    torch.testing.assert_close(c.f(c.g(c.x)).detach().double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["softmax regression", "convolution", "kernel regression", "log-sum-exp pooling"]
)
def test_looking_ahead_beats_chance_at_the_same_rate(example, four, name):
    found = example.measure(four[name], "ps4", "running:0.002", 0)
    assert 0 < found.rate < 0.6
    assert found.error < found.random_error / 1.5
    assert example.measure(four[name], "ps4", "none", 0).rate == 0


def test_options(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compose_digits.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        example.main()
    assert "at least 2 are needed" in capsys.readouterr().err


def test_the_table(example, capsys, monkeypatch):
    few = [example.Composition(c.name, c.g, c.f, c.x[:10]) for c in example.compositions(0)[:1]]
    monkeypatch.setattr(example, "compositions", lambda seed: few)
    monkeypatch.setattr(sys, "argv", ["compose_digits.py", "--seeds", "2"])
    example.main()
    printed = capsys.readouterr().out
    assert "softmax regression" in printed
    assert printed.count("ps4+") == len(example.RULES)
