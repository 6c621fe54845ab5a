import itertools

import pytest
import torch

import torchlamp
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.sort import dealt
from torchlamp.rules import RULES, Rule
from torchlamp.simulation.attention import attention
from torchlamp.simulation.values import Values, weighted_sums

FITTING = [
    e for rule in RULES.values() if rule.looks_through in ("any", "elementwise") for e in rule.examples
]
HEADS, GROUPS, ROWS, KEYS, SIZE = 4, 2, 5, 9, 6


def operands(seed=0):
    g = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(HEADS, ROWS, KEYS, generator=g).softmax(dim=-1)
    return probabilities, torch.randn(GROUPS, KEYS, SIZE, generator=g), torch.rand(HEADS, SIZE, generator=g)


def how(accumulator, rule, norms=None):
    return Values(Accumulator.parse(accumulator), Rule.parse(rule), norms, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("accumulator", ["ps4", "e5m2", "ps6/block4"])
def test_low_sums_are_those_of_matmul(accumulator):
    z, value, _ = operands()
    out, counts, _ = weighted_sums(z, value, how(accumulator, "none"))
    assert torch.equal(out, torchlamp.matmul(z, value.repeat_interleave(2, dim=0), accumulate=accumulator))
    assert not counts.any()


@pytest.mark.parametrize("accumulator", ["fuse16/5", "fuse8/6/promote16", "ps4/block8", "ps7/promote16"])
def test_the_first_key_of_a_tile_does_not_move_blocks_and_groups(accumulator):
    """A tile of a sliding window leaves out the keys that it doesn't see; sums are those of the whole sample."""
    g = torch.Generator().manual_seed(1)
    z, value = torch.rand(HEADS, 3, 50, generator=g), torch.randn(GROUPS, 50, 8, generator=g)
    z[..., :7] = 0
    whole, _, _ = weighted_sums(z, value, how(accumulator, "none"))
    tile, _, _ = weighted_sums(z[..., 7:], value[:, 7:], how(accumulator, "none"), first=7)
    assert torch.equal(whole, tile)


def test_negligible_probabilities_count_as_zero():
    z, value, _ = operands()
    z[..., 0] = 2.0**-46
    z[..., 1] = 2.0**-46 * (1 - 2.0**-24)
    value[:, 2:] = 0.0
    value[:, 1] = 1.0
    out, _, _ = weighted_sums(z, value, how("ps4", "none"))
    expected = torchlamp.round_to(2.0**-46 * value[:, 0], "ps4").repeat_interleave(2, dim=0)
    assert torch.equal(out, expected[:, None].expand(out.shape))


def test_gain_is_the_column_norm_of_the_projection():
    """||W d o|| / ||W o|| for a change of one number, with sqrt(sum o^2 c^2) for ||W o||."""
    z, value, _ = operands()
    W = torch.randn(7, HEADS * SIZE, generator=torch.Generator().manual_seed(1))
    norms = W.norm(dim=0).view(HEADS, SIZE)
    low, _, _ = weighted_sums(z, value, how("ps3", "none"))
    high, _, _ = weighted_sums(z, value, how("fp32", "none"))
    size = (low * norms[:, None]).square().sum(dim=(0, 2)).sqrt()
    weight = norms[:, None] * low.abs() / size[None, :, None]
    for threshold in (0.05, 0.2, 0.4):
        out, counts, _ = weighted_sums(z, value, how("ps3", f"strict:{threshold}", norms))
        assert torch.equal(out, torch.where(weight > threshold, high, low))
        assert torch.equal(counts, (weight > threshold).sum(-1))
    assert counts.any()


@pytest.mark.parametrize("spelling", FITTING)
@pytest.mark.parametrize("masked", [False, True])
def test_every_fitting_rule_within_attention(spelling, masked):
    """Whatever is selected, what isn't hidden counts, samples don't matter to each other, `fp32` is plain attention."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, 70, 8, generator=g) for h in (4, 2, 2))
    mask = torch.ones(70, 70, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1).clone()
    mask[1, :, :, :11] = False
    shown = {"mask": mask} if masked else {"causal": True}

    def run(at, accumulator="ps4"):
        own = {"mask": mask[at]} if masked else shown
        return attention(
            q[at],
            k[at],
            v[at],
            accumulator=Accumulator.parse("fp32"),
            rule=Rule.parse("none"),
            scaling=0.3,
            values=how(accumulator, spelling),
            **own,
        )

    whole = run(slice(0, 3))
    for sample in range(3):
        alone = run(slice(sample, sample + 1))
        assert torch.equal(alone.output[0], whole.output[sample])
        assert torch.equal(alone.values_selected[0], whole.values_selected[sample])
    assert (whole.values_selected <= 8).all()
    plain = attention(
        q, k, v, accumulator=Accumulator.parse("fp32"), rule=Rule.parse("none"), scaling=0.3, **shown
    )
    torch.testing.assert_close(run(slice(0, 3), "fp32").output, plain.output, rtol=1e-4, atol=1e-5)
    if spelling == "all":
        torch.testing.assert_close(whole.output, plain.output, rtol=1e-4, atol=1e-5)


def transformed(accumulator, rule, transforms, mean=None, operand="float32"):
    return Values(
        Accumulator.parse(accumulator),
        Rule.parse(rule),
        operand=Operand.parse(operand),
        transforms=tuple(map(Transform.parse, transforms)),
        mean=mean,
    )


@pytest.mark.parametrize("accumulator", ["ps3", "e4m3", "ps5/block4", "ps4/promote4", "ps4/unfused"])
@pytest.mark.parametrize("transforms", [("sort",), ("center",), ("center", "sort")])
def test_transformed_sums_are_those_of_ordered_and_centred_values(accumulator, transforms):
    """Term by term: the order of each row's probabilities, values less their mean, its product in float32."""
    z, value, _ = operands()
    z[:, 1, 4:] = 0.0
    out, _, _ = weighted_sums(z, value, transformed(accumulator, "none", transforms))
    mean = value.mean(1) if "center" in transforms else torch.zeros(GROUPS, SIZE)
    promote = Accumulator.parse(accumulator).promote
    for head in range(HEADS):
        own = value[head // 2] - mean[head // 2]
        for row in range(ROWS):
            order = torch.arange(KEYS)
            if "sort" in transforms:
                order = z[head, row].argsort(stable=True)[dealt(KEYS, promote)]
            expected = torchlamp.matmul(z[head, row][order], own[order], accumulator)
            if "center" in transforms:
                expected = expected + z[head, row].sum() * mean[head // 2]
            torch.testing.assert_close(out[head, row], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["all", "running:0", "strict:0", "condition:0"])
@pytest.mark.parametrize("transforms", [("sort",), ("center",), ("center", "sort")])
def test_transforms_change_nothing_in_full_precision(rule, transforms):
    z, value, _ = operands()
    value = value + 3.0
    expected = z.double() @ value.double().repeat_interleave(2, 0)
    for accumulator, chosen in (("ps3", rule), ("fp32", "none")):
        out, _, _ = weighted_sums(z, value, transformed(accumulator, chosen, transforms))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_ascending_probabilities_round_least():
    """A key that takes most of the weight comes first, as in attention: the sum carries it through all roundings."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(HEADS, 40, 300, generator=g) * 2
    logits[..., 0] += 8
    z, value = logits.softmax(-1), torch.randn(GROUPS, 300, SIZE, generator=g) + 0.5
    exact = z.double() @ value.double().repeat_interleave(2, 0)

    def error(transforms):
        out, _, _ = weighted_sums(z, value, transformed("ps4", "none", transforms))
        return float((out - exact).square().mean().sqrt())

    assert error(("sort",)) < error(()) / 4
    assert error(("center",)) < error(())
    assert error(("center", "sort")) < 1.1 * error(("sort",))


def test_order_and_quantised_operands():
    """Groups of operands run along the keys as they are; only the sum has another order."""
    z, value, _ = operands()
    out, _, _ = weighted_sums(z, value, transformed("fp32", "none", ("sort",), operand="int4/4"))
    plain, _, _ = weighted_sums(z, value, transformed("fp32", "none", (), operand="int4/4"))
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-6)


def test_rows_of_a_transformed_tile_do_not_depend_on_the_others():
    z, value, _ = operands()
    how = transformed("ps4", "running:0.001", ("center", "sort")).fitted(value)
    whole, counts, _ = weighted_sums(z, value, how)
    for row in range(ROWS):
        out, count, _ = weighted_sums(z[:, row : row + 1], value, how)
        # The share of each row is a float32 sum, whose order may depend on the shape.
        torch.testing.assert_close(out[:, 0], whole[:, row], rtol=0, atol=1e-6)
        assert torch.equal(count[:, 0], counts[:, row])
    assert counts.any()


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("promote", [0, 1, 2, 3, 4, 5, 20])
def test_dealt_terms_make_the_least_of_the_expected_squares(size, promote):
    """Of all orders of distinct energies (all of them up to 6 terms, random ones beyond), none has a smaller sum."""
    energies = torch.arange(1.0, size + 1)

    def total(order):
        parts = [order] if promote == 0 else order.split(promote)
        return float(sum(part.cumsum(0).sum() for part in parts))

    best = total(energies[dealt(size, promote)])
    if size <= 6:
        orders = [torch.tensor(p) for p in itertools.permutations(range(size))]
    else:
        orders = [torch.randperm(size) for _ in range(200)]
    assert best <= min(total(energies[order]) for order in orders)
