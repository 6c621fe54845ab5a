"""The diagnostic that says when a low pass isn't to be trusted, against the truth."""

import pytest
import torch

import torchlamp
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.transforms import Transform
from torchlamp.rules import Rule
from torchlamp.simulation.attention import attention
from torchlamp.simulation.doubt import ROWS, doubt_warning
from torchlamp.simulation.statistics import Statistics

SIZE, LENGTH = 64, 160


def operands(common: float):
    """Keys with a common part of that length, as a bias makes it, which a softmax doesn't see and narrow sums do."""
    g = torch.Generator().manual_seed(3)
    mean = torch.randn(SIZE, generator=g)
    mean *= common / mean.norm()
    query = torch.randn(2, 4, LENGTH, SIZE, generator=g) * 1.5 + mean / 2
    key = torch.randn(2, 2, LENGTH, SIZE, generator=g) + mean
    return query, key, torch.randn(2, 2, LENGTH, SIZE, generator=g)


def run(common, transforms=(), **others):
    query, key, value = operands(common)
    result = attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse("ps4"),
        rule=Rule.parse("none"),
        scaling=SIZE**-0.5,
        causal=True,
        transforms=tuple(map(Transform.parse, transforms)),
        **others,
    )
    return result.doubt


def truth(common):
    """Share of the last rows in which the low pass misplaces more than half of the probability."""
    query, key, _ = operands(common)
    keys = key.repeat_interleave(2, 1).mT
    low = torchlamp.matmul(query, keys, "ps4") * SIZE**-0.5
    exact = (query.double() @ keys.double()) * SIZE**-0.5
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    z, true = (x.double().masked_fill(hidden, -torch.inf).softmax(-1)[:, :, -ROWS:] for x in (low, exact))
    return float(((z - true).abs().sum(-1) / 2 > 0.5).double().mean())


def test_rows_are_doubtful_where_the_low_pass_is_wrong():
    shares, wrong = [], []
    for common in (0.0, 10.0, 20.0, 40.0):
        rows, doubtful = run(common)
        assert rows == 2 * 4 * ROWS
        shares.append(doubtful / rows)
        wrong.append(truth(common))
    assert shares == sorted(shares)
    assert wrong[0] == 0
    assert shares[0] < 0.15
    assert wrong[-1] > 0.5
    assert shares[-1] > 0.9
    assert all(share >= true for share, true in zip(shares, wrong, strict=True))


def test_center_takes_the_doubt_away():
    rows, doubtful = run(40.0)
    _, centred = run(40.0, ("center",))
    assert doubt_warning(rows, doubtful)
    assert centred < 0.15 * rows
    assert doubt_warning(rows, centred) is None


@pytest.mark.parametrize("others", [{"softcap": 5.0}, {"sinks": torch.full((4,), 60.0)}])
def test_softcap_and_sinks_take_part(others):
    """A softcap's slope shrinks errors; a sink holds part of the probability, and errs by nothing."""
    assert run(20.0, **others)[1] < run(20.0)[1]


def test_scores_that_are_not_finite_are_doubtful():
    query, key, value = operands(40.0)
    how = {"rule": Rule.parse("none"), "scaling": SIZE**-0.5, "causal": True}
    result = attention(100 * query, key, value, accumulator=Accumulator.parse("e4m3fn"), **how)
    assert result.doubt == (2 * 4 * ROWS, 2 * 4 * ROWS)


def test_what_is_not_looked_at():
    """Steps of decoding and float32 accumulators."""
    query, key, value = operands(40.0)
    how = {"rule": Rule.parse("none"), "scaling": SIZE**-0.5}
    assert attention(query[:, :, :4], key, value, accumulator=Accumulator.parse("ps4"), **how).doubt is None
    assert attention(query, key, value, accumulator=Accumulator.parse("fp32"), **how).doubt is None


def test_statistics_say_so():
    statistics = Statistics()
    assert statistics.doubt == 0.0
    assert statistics.warning is None
    statistics.record_doubt(0, 100, 2)
    statistics.record_doubt(2, 100, 80)
    assert statistics.doubt == pytest.approx(0.41)
    assert statistics.doubt_by_layer == [0.02, 0.0, 0.8]
    assert "isn't to be trusted: in 41% of the rows" in str(statistics)
    statistics.reset()
    assert statistics.doubt_by_layer == []
    assert "trusted" not in str(statistics)
