import pytest
import torch

import torchlamp
from torchlamp.arithmetic import Accumulator
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
    out, counts = weighted_sums(z, value, how(accumulator, "none"))
    assert torch.equal(out, torchlamp.matmul(z, value.repeat_interleave(2, dim=0), accumulate=accumulator))
    assert not counts.any()


def test_negligible_probabilities_count_as_zero():
    z, value, _ = operands()
    z[..., 0] = 2.0**-46
    z[..., 1] = 2.0**-46 * (1 - 2.0**-24)
    value[:, 2:] = 0.0
    value[:, 1] = 1.0
    out, _ = weighted_sums(z, value, how("ps4", "none"))
    expected = torchlamp.round_to(2.0**-46 * value[:, 0], "ps4").repeat_interleave(2, dim=0)
    assert torch.equal(out, expected[:, None].expand(out.shape))


def test_gain_is_the_column_norm_of_the_projection():
    """||W d o|| / ||W o|| for a change of one number, with sqrt(sum o^2 c^2) for ||W o||."""
    z, value, _ = operands()
    W = torch.randn(7, HEADS * SIZE, generator=torch.Generator().manual_seed(1))
    norms = W.norm(dim=0).view(HEADS, SIZE)
    low, _ = weighted_sums(z, value, how("ps3", "none"))
    high, _ = weighted_sums(z, value, how("fp32", "none"))
    size = (low * norms[:, None]).square().sum(dim=(0, 2)).sqrt()
    weight = norms[:, None] * low.abs() / size[None, :, None]
    for threshold in (0.05, 0.2, 0.4):
        out, counts = weighted_sums(z, value, how("ps3", f"strict:{threshold}", norms))
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
