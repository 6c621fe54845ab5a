import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchlamp
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.rules import RULES, Rule
from torchlamp.simulation import linear as module
from torchlamp.simulation import linear_sums
from torchlamp.simulation.linear import HeadVectors, linear, linears, relative
from torchlamp.simulation.linear_sums import Weights

FITTING = [
    e for rule in RULES.values() if rule.looks_through in ("any", "elementwise") for e in rule.examples
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(rows=5, inputs=24, outputs=10, seed=0, bias=True):
    g = generator(seed)
    x = torch.randn(rows, inputs, generator=g)
    weight = torch.randn(outputs, inputs, generator=g) / inputs**0.5
    return x, weight, torch.randn(outputs, generator=g) if bias else None


@pytest.mark.parametrize(
    "accumulator", ["ps4", "e4m3fn", "ps7/unfused", "ps5/block8", "ps3/promote8", "fp32"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_low_sums_are_those_of_matmul_and_the_bias_is_one_more_rounding(accumulator, bias):
    x, weight, b = layer(bias=bias)
    expected = torchlamp.matmul(x, weight.T, accumulate=accumulator)
    if b is not None:
        # A promoted sum is float32, and so is the sum with the bias.
        promoted = Accumulator.parse(accumulator).promote
        form = "fp32" if promoted else str(Accumulator.parse(accumulator).format)
        expected = torchlamp.round_to(expected + b, form)
    result = linear(x, weight, b, accumulator=accumulator, rule="none")
    assert torch.equal(result.output, expected)
    assert result.eligible == 10
    assert result.selected.tolist() == [0] * 5


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0), (3, 1, 2)])
def test_any_leading_dimensions(shape):
    _, weight, b = layer()
    x = torch.randn(*shape, 24, generator=generator(3))
    result = linear(x, weight, b, accumulator="fp32", rule="strict:0.3")
    torch.testing.assert_close(result.output, torch.nn.functional.linear(x, weight, b))
    assert result.selected.shape == shape


def test_all_is_the_float32_layer():
    x, weight, b = layer()
    result = linear(x, weight, b, accumulator="ps1", rule="all")
    torch.testing.assert_close(result.output, torch.nn.functional.linear(x, weight, b))
    assert result.selected.tolist() == [10] * 5


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_selected_entries_are_float32_and_all_others_low(dense, monkeypatch):
    """Whichever way entries are recomputed: one by one, or in a pass over everything."""
    monkeypatch.setattr(linear_sums, "_DENSE", dense)
    x, weight, b = layer(rows=40)
    low = linear(x, weight, b, accumulator="ps3", rule="none").output
    high = linear(x, weight, b, accumulator="fp32", rule="none").output
    chosen = low.abs() / low.norm(dim=-1, keepdim=True) > 0.4
    result = linear(x, weight, b, accumulator="ps3", rule="strict:0.4")
    assert torch.equal(result.output, torch.where(chosen, high, low))
    assert torch.equal(result.selected, chosen.sum(-1))
    assert 0 < chosen.sum() < chosen.numel() / 2


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 100))
def test_the_running_error_is_the_root_of_the_squared_partial_sums(rows, inputs, seed):
    x, weight, b = layer(rows=rows, inputs=inputs, outputs=4, seed=seed)
    seen = []

    def look(low):
        seen.append(low)
        return relative(low)

    linear(x, weight, b, accumulator="ps4", rule="running:1e9", next_function=look)
    acc, squares = torch.zeros(rows, 4), torch.zeros(rows, 4)
    for k in range(inputs):
        acc = torchlamp.round_to(
            torch.addcmul(acc.double(), x[:, k, None].double(), weight[:, k].double()).float(), "ps4"
        )
        squares += acc**2
    y = torchlamp.round_to(acc + b, "ps4")
    torch.testing.assert_close(seen[0].error(), 2.0**-5 / 2 * (squares + y**2).sqrt())
    assert torch.equal(seen[0].y, y)


def test_numerators_and_condition_numbers():
    x, weight, b = layer()
    exact, cheap = [], []
    for rule, seen in (("condition:1", exact), ("condition-cheap:1", cheap)):
        linear(
            x,
            weight,
            b,
            accumulator="ps4",
            rule=rule,
            next_function=lambda low, s=seen: s.append(relative(low)) or s[0],
        )
    absolute = x.abs() @ weight.abs().T + b.abs()
    torch.testing.assert_close(exact[0].numerator, absolute)
    torch.testing.assert_close(exact[0].condition, absolute / exact[0].scores.abs())
    torch.testing.assert_close(
        cheap[0].cheap_numerator, x.norm(dim=1)[:, None] * weight.norm(dim=1) + b.abs()
    )
    assert (cheap[0].cheap_numerator >= exact[0].numerator * (1 - 1e-6)).all()


def test_condition_numbers_against_their_definition():
    """kappa = sup of the relative change of y per componentwise relative change of the weights: attained by signs."""
    x, weight, _ = layer(bias=False)
    seen = []
    linear(
        x,
        weight,
        accumulator="fp32",
        rule="condition:1",
        next_function=lambda low: seen.append(relative(low)) or seen[0],
    )
    h = 1e-6
    for i in range(x.shape[0]):
        for j in range(weight.shape[0]):
            w, v = weight[j].double(), x[i].double()
            y = w @ v
            moved = (w * (1 + h * torch.sign(w * v))) @ v
            assert float((moved - y).abs() / (h * y.abs())) == pytest.approx(
                float(seen[0].condition[i, j]), rel=1e-3
            )


def test_gain_of_head_vectors_is_the_relative_l2_error():
    x, weight, _ = layer(outputs=12, bias=False)
    seen = []
    look = HeadVectors(4)
    linear(
        x,
        weight,
        accumulator="fp32",
        rule="strict:9",
        next_function=lambda low: seen.append(look(low)) or seen[0],
    )
    y = seen[0].scores
    for j in range(12):
        moved = y.double().clone()
        moved[:, j] += 1e-3
        head = slice(j // 4 * 4, j // 4 * 4 + 4)
        change = (moved - y)[:, head].norm(dim=1) / y[:, head].double().norm(dim=1)
        torch.testing.assert_close(seen[0].gain[:, j].double(), change / 1e-3, rtol=1e-4, atol=0)


@pytest.mark.parametrize("spelling", FITTING)
def test_every_fitting_rule_runs_and_neither_chunks_nor_neighbours_matter(spelling, monkeypatch):
    _, weight, b = layer()
    x = torch.randn(3, 7, 24, generator=generator(5))
    rule, look = Rule.parse(spelling), HeadVectors(5)

    def run(x):
        return linear(x, weight, b, accumulator="ps4", rule=rule, next_function=look, generator=generator(1))

    whole = run(x)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 20)
    chunked = run(x)
    assert torch.equal(whole.output, chunked.output) or rule.needs_generator
    for sample in range(3):
        alone = run(x[sample : sample + 1])
        assert torch.equal(alone.output[0], chunked.output[sample])
        assert torch.equal(alone.selected[0], chunked.selected[sample])


def test_several_maps_are_one_row_of_the_rule():
    x, weight, b = layer(outputs=8)
    maps = [Weights(weight[:3].T, b[:3]), Weights(weight[3:].T, b[3:])]
    keywords = {
        "accumulator": Accumulator.parse("ps3"),
        "rule": Rule.parse("strict:0.3"),
        "next_function": relative,
    }
    apart = linears(x, maps, **keywords)
    together = linears(x, [Weights(weight.T, b)], **keywords)
    assert torch.equal(torch.cat(apart.outputs, dim=-1), together.output)
    assert torch.equal(apart.selected, together.selected)
    assert together.selected.any()


def test_zero_rows_and_numbers_that_are_none():
    x, weight, _ = layer(bias=False)
    x[0] = 0
    x[1, 3] = torch.nan
    result = linear(x, weight, accumulator="ps4", rule="strict:0.9")
    assert result.output[0].eq(0).all()
    assert result.selected[0] == 0
    assert result.selected[1] == 10
    assert result.output[1].isnan().all()


class TestRefused:
    def test_dtype(self):
        x, weight, b = layer()
        with pytest.raises(TypeError, match=r"takes float32 input, weight and bias, got torch.float64"):
            linear(x.double(), weight, b, accumulator="ps4", rule="none")

    def test_shapes(self):
        x, weight, b = layer()
        with pytest.raises(
            ValueError, match=r"input of shape \(5, 23\) doesn't fit a weight of shape \(10, 24\)"
        ):
            linear(x[:, 1:], weight, b, accumulator="ps4", rule="none")
        with pytest.raises(ValueError, match="doesn't fit"):
            linear(x, weight, b[1:], accumulator="ps4", rule="none")

    def test_random_without_a_generator(self):
        x, weight, b = layer()
        with pytest.raises(ValueError, match=r"'random:0.5' draws random numbers: pass a generator"):
            linear(x, weight, b, accumulator="ps4", rule="random:0.5")


class TestTransforms:
    def draw(self, rows=40, inputs=32, outputs=24):
        g = torch.Generator().manual_seed(5)
        x = torch.randn(2, rows, inputs, generator=g) + torch.linspace(-3, 6, inputs)
        return x, torch.randn(outputs, inputs, generator=g), torch.randn(outputs, generator=g)

    def run(self, x, weight, bias, accumulator, rule, names, operand="float32", **others):
        return module.linears(
            x,
            [Weights(weight.T, bias)],
            accumulator=Accumulator.parse(accumulator),
            rule=Rule.parse(rule),
            next_function=module.relative,
            operand=Operand.parse(operand),
            transforms=[Transform.parse(name) for name in names],
            **others,
        )

    @pytest.mark.parametrize("names", [("center",), ("center", "sort"), ("balance",), ("smooth", "hadamard")])
    @pytest.mark.parametrize("operand", ["float32", "int8"])
    def test_all_is_the_float32_layer(self, names, operand):
        x, weight, bias = self.draw()
        found = self.run(x, weight, bias, "ps3", "all", names, operand).output
        torch.testing.assert_close(found, x @ weight.T + bias, rtol=1e-4, atol=1e-4)

    def test_the_mean_goes_round_the_narrow_sum(self):
        x, weight, bias = self.draw()
        exact = x @ weight.T + bias
        error = {names: float((self.run(x, weight, bias, "ps5", "none", names).output - exact).norm()) for names in
                 ((), ("center",), ("center", "sort"))}  # fmt: skip
        assert error[("center",)] < error[()] / 2
        assert error[("center", "sort")] < error[("center",)]

    def test_neither_chunks_nor_neighbours_matter(self, monkeypatch):
        x, weight, bias = self.draw()
        whole = self.run(x, weight, bias, "ps4", "running:0.01", ["center", "sort"])
        alone = self.run(x[1:], weight, bias, "ps4", "running:0.01", ["center", "sort"])
        assert torch.equal(whole.output[1], alone.output[0])
        monkeypatch.setattr(module, "CHUNK_ENTRIES", 24 * 7)
        pieces = self.run(x, weight, bias, "ps4", "running:0.01", ["center", "sort"])
        assert torch.equal(pieces.output, whole.output)
        assert torch.equal(pieces.selected, whole.selected)

    def test_calibrated_statistics_of_the_inputs(self):
        x, weight, bias = self.draw()
        own = Moments.of(x[:1])
        dynamic = self.run(x[:1], weight, bias, "ps4", "none", ["center", "sort"]).output
        calibrated = self.run(x, weight, bias, "ps4", "none", ["center", "sort"], moments=own).output
        assert torch.equal(calibrated[0], dynamic[0])


def test_the_step_of_the_bias_is_counted_unless_the_sum_is_promoted():
    """docs/sites.md: `running` takes the rounding after the bias for one more partial sum; a float32 total has none."""
    x, weight, bias = torch.ones(1, 4), torch.ones(1, 4), torch.tensor([3.0])
    unit = 2.0**-6 / 2
    for accumulator, squares in (("ps5", 1 + 4 + 9 + 16 + 49), ("ps5/promote2", 1 + 4 + 1 + 4)):
        seen = []

        def note(low, seen=seen):
            seen.append(low.error() if callable(low.error) else low.error)
            return relative(low)

        linear(x, weight, bias, accumulator=accumulator, rule="running:1", next_function=note)
        torch.testing.assert_close(seen[0], torch.full((1, 1), unit * squares**0.5))
