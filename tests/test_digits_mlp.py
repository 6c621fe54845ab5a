"""The example on multilayer perceptrons, in small."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
FILE = Path(__file__).parents[1] / "examples" / "digits_mlp.py"


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("digits_mlp", FILE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["digits_mlp"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["digits_mlp"]


@pytest.fixture(scope="module")
def figures(example):
    rules = (
        "none",
        "condition:4",
        "random-like:condition:4",
        "running:0.01",
        "random-like:running:0.01",
        "all",
    )
    found = example.measure(accumulators=["e4m3fn", "ps10"], rules=rules, seeds=1, epochs=12)
    return {(f.activation, f.accumulate, f.rule): f for f in found}


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_mixed_lies_between_uniform_low_and_high(figures, activation):
    low, mixed, high = (figures[activation, "e4m3fn", rule] for rule in ("none", "condition:4", "all"))
    assert low.rate == 0 < mixed.rate < 1 == high.rate
    assert low.cost == 0.25
    assert high.component == high.error == 0
    assert 0 < mixed.component < 0.9 * low.component
    assert 0 < mixed.error < low.error
    assert low.accuracy > 0.9  # digits are easy: even the narrowest sums recognise them
    assert abs(mixed.accuracy - high.accuracy) < 0.02


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_condition_number_beats_chance_in_what_it_bounds(figures, activation):
    """The relative error of the components; each recomputes as many."""
    chosen, chance = (
        figures[activation, "e4m3fn", rule] for rule in ("condition:4", "random-like:condition:4")
    )
    assert chosen.rate == pytest.approx(chance.rate, rel=0.1)
    assert chosen.component < 0.9 * chance.component


def test_in_norm_it_beats_chance_for_tanh_only(figures):
    """And the expected error weighed by the next layer beats it for both."""
    ratios = {
        (activation, rule): figures[activation, "e4m3fn", f"random-like:{rule}"].error
        / figures[activation, "e4m3fn", rule].error
        for activation in ("relu", "tanh")
        for rule in ("condition:4", "running:0.01")
    }
    assert ratios["tanh", "condition:4"] > 1.2 > ratios["relu", "condition:4"]
    assert ratios["relu", "running:0.01"] > 2
    assert ratios["tanh", "running:0.01"] > 1.2


def test_uniform_competitors_run_plain(figures):
    assert ("relu", "ps10", "none") in figures
    assert ("relu", "ps10", "condition:4") not in figures


def test_the_layers_are_those_of_torch(example):
    """Inference in float32 equals the network as torch runs it."""
    images, labels, test_images, _ = example.digits(3)
    layers = example.train("tanh", images, labels, seed=3, epochs=1)
    hidden, y, rate = example.infer(layers, "tanh", test_images, "fp32", "all")
    h, expected = test_images, []
    for layer in layers[:-1]:
        h = torch.tanh(layer(h))
        expected.append(h)
    torch.testing.assert_close(hidden, torch.cat(expected, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(y, layers[-1](h), rtol=0, atol=1e-5)
    assert rate == 1


def test_costs(example):
    assert example.cost("fp32", "none", 0) == 1
    assert example.cost("e5m2", "none", 0) == 8 / 32
    assert example.cost("ps4", "condition-cheap:4", 0.5) == 13 / 32 + 0.5
    assert example.cost("ps4", "condition:4", 0.5) == 26 / 32 + 0.5


def test_table_and_figure(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "WIDTHS", (64, 16, 10))
    monkeypatch.setattr(example.train, "__defaults__", (1,))
    few = example.measure(
        ["relu"], ["e5m2", "ps7"], ["none", "condition:2", "running:0.01"], seeds=2, epochs=1
    )
    monkeypatch.setattr(example, "measure", lambda seeds: few)
    picture = tmp_path / "digits.svg"
    monkeypatch.setattr(sys, "argv", ["digits_mlp.py", "--seeds", "2", "--figure", str(picture)])
    example.main()
    printed = capsys.readouterr().out
    assert printed.count("condition:2") == 1
    assert "ps7" in printed
    assert "e5m2 condition" in picture.read_text()


def test_bad_arguments(example, monkeypatch, capsys):
    for arguments, said in (
        (["--seeds", "0"], "at least 1"),
        (["--figure", "no/such/a.svg"], "there is no folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["digits_mlp.py", *arguments])
        with pytest.raises(SystemExit):
            example.main()
        assert said in capsys.readouterr().err
