"""The two stages over all heads at once against plain loops over one warp, bit for bit, and what the paper says."""

import math

import pytest
import torch

from lamp_attention_reference import Warp
from torchlamp.arithmetic import Accumulator
from torchlamp.kernels.online import OnlineFormats, online_weights
from torchlamp.kernels.rounding import round_to_grid
from torchlamp.policy.policy import Policy
from torchlamp.rules import OnlineTile, Rule, Tile

FORMATS = Accumulator.parse("lamp8").online_formats
SPELLINGS = [
    "lamp-attention:0.00390625,0.5",
    "lamp-attention:0.0625,1",
    "lamp-attention:0,0",
    "lamp-attention:0.00390625,0.02",
    "lamp-attention:0.00390625,0.02/greedy",
    "lamp-attention:none,0.3",
    "lamp-attention:none,0.3/greedy/compact",
    "lamp-attention:0.00390625,0.05/compact",
    "lamp-attention:0.5,0.3/norms",
    "lamp-attention:0,0.3/norms",
]


def tile(heads, rows, keys, *, seed=0, visible=None, offset=0, sink=None, spread=4.0, error=0.3):
    """Logits whose narrow form errs, in sub-blocks of different size so that few of them matter."""
    g = torch.Generator().manual_seed(seed)
    exact = torch.randn(heads, rows, keys, generator=g) * spread
    exact += torch.randn(heads, 1, -(-keys // 16), generator=g).repeat_interleave(16, -1)[..., :keys] * 6
    high = round_to_grid(exact, FORMATS.high)
    low = round_to_grid(exact + error * torch.randn(exact.shape, generator=g), FORMATS.low)
    shown = (
        torch.ones(exact.shape, dtype=torch.bool) if visible is None else visible.expand(exact.shape).clone()
    )
    z = torch.softmax(low.masked_fill(~shown, -torch.inf), -1).nan_to_num(0.0)
    margin = torch.rand(exact.shape, generator=g)
    return OnlineTile(
        low, low, z, shown, recomputed=high, formats=FORMATS, offset=offset, margin=margin, sink=sink
    )


def expected(tile, rule):
    """Chosen, late and weights by the reference, warp by warp."""
    s = rule.setting
    heads, rows, keys = tile.scores.shape
    chosen, late = (torch.zeros(tile.scores.shape, dtype=torch.bool) for _ in range(2))
    weights = torch.zeros(tile.scores.shape)
    for h in range(heads):
        for start in range(0, rows, 16):
            at = slice(start, start + 16)
            parts = [x[h, at].tolist() for x in (tile.logits, tile.recomputed, tile.visible)]
            warp = Warp(
                *parts,
                delta=s.delta,
                tau=s.tau,
                margin=tile.margin[h, at].tolist() if s.norms else None,
                greedy=s.greedy,
                compact=s.compact,
                sink=None if tile.sink is None else float(tile.sink[h]),
            ).run(tile.offset)
            for mask, found in ((chosen, warp.chosen), (late, warp.late)):
                for i, j in found:
                    mask[h, start + i, j] = True
            weights[h, at] = torch.tensor(warp.weights).view(-1, keys)
    return chosen, late, weights


def check(tile, rule):
    chosen, late = rule.stages(tile)
    right = expected(tile, rule)
    assert torch.equal(chosen, right[0])
    assert torch.equal(late, right[1])
    assert torch.equal(rule.select(tile), chosen)
    weights = online_weights(
        tile.logits,
        tile.recomputed,
        tile.visible,
        chosen,
        late,
        FORMATS,
        offset=tile.offset,
        sink=tile.sink,
    )
    assert torch.equal(weights.nan_to_num(-1), right[2].nan_to_num(-1))
    return chosen


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_equals_plain_loops(spelling):
    """Full and ragged warps and tiles, causal, with offsets and a sink."""
    rule = Rule.parse(spelling)
    causal = torch.ones(20, 150, dtype=torch.bool).tril(130)
    chosen = check(tile(2, 20, 150, visible=causal), rule)
    assert chosen.any()
    check(tile(1, 16, 128, seed=1, error=1.0), rule)
    check(tile(2, 5, 70, seed=2, offset=37, sink=torch.tensor([3.0, -2.0]).view(2, 1, 1)), rule)
    check(tile(1, 1, 1, seed=3), rule)


@pytest.mark.parametrize("spelling", SPELLINGS[::3])
def test_windows_and_rows_that_see_nothing(spelling):
    visible = torch.ones(33, 100, dtype=torch.bool).tril(67) & torch.ones(33, 100, dtype=torch.bool).triu(10)
    visible[3:9] = False
    rule = Rule.parse(spelling)
    chosen = check(tile(2, 33, 100, seed=4, visible=visible), rule)
    assert not (chosen & ~visible).any()
    blind = tile(1, 18, 40, seed=5, visible=torch.zeros(18, 40, dtype=torch.bool))
    assert not check(blind, rule).any()
    assert rule.select(tile(2, 0, 5)).shape == (2, 0, 5)
    assert rule.select(tile(2, 5, 0)).shape == (2, 5, 0)


@pytest.mark.parametrize("spelling", SPELLINGS[:4])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(spelling, junk):
    """A sub-block that can't be compared is recomputed, and its rows say NaN where it stays what it is."""
    given = tile(1, 16, 128, seed=6)
    low, high = given.logits.clone(), given.recomputed.clone()
    low[0, 3, 70], high[0, 3, 70] = junk, junk
    changed = given.replace(logits=low, recomputed=high)
    chosen = check(changed, Rule.parse(spelling))
    if junk != -math.inf:
        assert chosen[0, :, 64:80].all()


def test_the_first_tile_fires_and_margins_make_more_fire():
    given = tile(3, 64, 256, seed=7)
    counts = [Rule.parse(f"lamp-attention:{d},1").select(given).sum() for d in (0, 0.004, 0.0625, 0.5)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    # Old maxima are -infinity: the first sub-block that is tested can't stay low.
    assert Rule.parse("lamp-attention:0,1").select(given)[:, :, :64].any(-1).all()


def test_budgets():
    given = tile(3, 64, 256, seed=8)
    rates = [Rule.parse(f"lamp-attention:0.00390625,{t}").select(given).sum() for t in (1, 0.5, 0.1, 0.02, 0)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-2]
    # A budget of 1 never binds: nothing is left to the second stage.
    assert not Rule.parse("lamp-attention:0.00390625,1").stages(given)[1].any()
    # The largest subset leaves at least as many low as the greedy one.
    for t in (0.3, 0.05, 0.01):
        best, greedy = (
            Rule.parse(f"lamp-attention:none,{t}{how}").select(given).sum() for how in ("", "/greedy")
        )
        assert best <= greedy


def test_compact_recomputes_disruptive_tiles_whole():
    given = tile(2, 32, 192, seed=9)
    safe, compact = (
        Rule.parse(f"lamp-attention:0.00390625,0.1{how}")
        .select(given)
        .view(2, 2, 16, 3, 4, 16)
        .any(-1)
        .any(2)
        for how in ("", "/compact")
    )
    assert set(compact.sum(-1).flatten().tolist()) <= {0, 1, 4}
    first = safe[..., 0, :].sum(-1)
    assert torch.equal(compact[..., 0, :].sum(-1), torch.where(first >= 2, 4, first))


def test_spelling():
    for text in (*SPELLINGS, "lamp-attention:none,0.125/greedy", "lamp-attention:4,0.5/norms/compact"):
        rule = Rule.parse(text)
        assert str(rule) == text
        assert Rule.parse(str(rule)) == rule
        assert hash(Rule.parse(text)) == hash(rule)
    assert (
        str(Rule.parse("lamp-attention: 0.0625 , 0.50/compact/norms"))
        == "lamp-attention:0.0625,0.5/norms/compact"
    )
    policy = Policy.parse("lamp8.center+lamp-attention:0.00390625,0.5/compact, mlp_up=ps7")
    assert str(policy) == "scores=lamp8.center+lamp-attention:0.00390625,0.5/compact, mlp_up=ps7+none"
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "bad",
    ["", "0.1", "0.1,2", "-1,0.5", "nan,0.5", "0.1,0.5/fast", "0.1,0.5/greedy/greedy", "0.1,none", "inf,0.5"],
)
def test_parameters_that_are_refused(bad):
    with pytest.raises(ValueError, match="lamp-attention takes a margin D >= 0 or 'none', a budget T in"):
        Rule.parse(f"lamp-attention:{bad}")


def test_policies_that_do_not_fit():
    for policy, words in {
        "e4m3fn-sat+lamp-attention:0.1,0.5": "an online softmax in tiles of keys; write 'lamp8\\+lamp-att",
        "mlp_up=ps4+lamp-attention:0.1,0.5": "can't run at the site mlp_up with 'ps4'",
        "mlp_up=lamp8": "which has no softmax over keys; it fits scores",
        "values=lamp8": "which has no softmax over keys; it fits scores",
        "e4m3fn-sat/online3": "allowed are 4 to 21",
        "ps4/promote8/online11": "strict sums, /unfused or /blockB",
        "ps4/stochastic": "/stochastic is an option of /onlineH",
        "ps4/block4/online11/stochastic": "without /blockB and /unfused",
        "int8+lamp-attention:0.1,0.5": "an online softmax in tiles of keys",
    }.items():
        with pytest.raises(ValueError, match=words):
            Policy.parse(policy)
    with pytest.raises(ValueError, match="goes through an online softmax: give it an OnlineTile"):
        Rule.parse("lamp-attention:0.1,0.5").select(Tile.from_scores(torch.zeros(2, 3)))
    assert OnlineFormats.of(FORMATS.low, 11) == FORMATS
