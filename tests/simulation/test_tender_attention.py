"""Tender and integer registers in attention: dense formulas, chunk by chunk; linear layers, samples and counts."""

import pytest
import torch

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import quantise
from torchlamp.arithmetic.tender import CHUNK, Ranges, Tables
from torchlamp.rules.rule import Rule
from torchlamp.simulation.attention import attention
from torchlamp.simulation.linear import linears, relative
from torchlamp.simulation.linear_sums import Weights
from torchlamp.simulation.values import SMALLEST_PROBABILITY, Values

SHIFTED = Accumulator.parse("int32/shift")


def operands(queries, keys, heads=4, key_heads=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(size, generator=generator))
    query = torch.randn(1, heads, queries, size, generator=generator) * sizes + sizes
    key = torch.randn(1, key_heads, keys, size, generator=generator) / sizes - sizes.rsqrt()
    return query, key, torch.randn(1, key_heads, keys, size, generator=generator)


def biased_values(x, operand):
    """(vectors, size): the vectors less their chunk's bias, what they are stored as, and the biases, all by chunk."""
    pieces, stored, biases = [], [], []
    for chunk in x.split(CHUNK):
        tables = Tables.of(Ranges.of(chunk[None]), operand.block)
        left, codes = tables.codes(chunk[None])
        pieces.append(left[0])
        stored.append(codes.values[0])
        biases.append(tables.bias[0].expand(len(chunk), -1))
    return torch.cat(pieces), torch.cat(stored), torch.cat(biases)


def scores_by_definition(query, key, operand):
    """q'.k' + b.k + q'.a of every head, float64."""
    group, found = query.shape[1] // key.shape[1], []
    for head in range(query.shape[1]):
        own = key[0, head // group]
        left, low, bias = biased_values(query[0, head], operand)
        key_bias = torch.cat([(c.amin(0) / 2 + c.amax(0) / 2).expand(len(c), -1) for c in own.split(CHUNK)])
        low_key = quantise(own - key_bias, operand.right)
        found.append(
            low.double() @ low_key.double().T
            + bias.double() @ own.double().T
            + left.double() @ key_bias.double().T
        )
    return torch.stack(found)


@pytest.mark.parametrize("accumulator", ["int32/shift", "int32", "fp32"])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (CHUNK + 20, CHUNK + 20), (3, CHUNK + 9)])
def test_scores_are_tenders(accumulator, queries, keys):
    query, key, value = operands(queries, keys)
    operand, seen = Operand.parse("tender4/4"), []
    attention(
        query, key, value, accumulator=Accumulator.parse(accumulator), rule=Rule.parse("none"), scaling=0.25,
        operand=operand, observe=lambda o: seen.append(o.tile.scores[0].clone()),
    )  # fmt: skip
    expected = scores_by_definition(query, key, operand) * 0.25
    torch.testing.assert_close(torch.cat(seen, 1).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [40, CHUNK + 30])
@pytest.mark.parametrize("accumulator", ["int32/shift", "int32", "fp32"])
def test_values_are_tenders(rows, accumulator):
    """Unsigned probabilities grouped by key among the rows of a chunk, and one scale a channel of the values."""
    query, key, value = operands(rows, rows)
    operand, low = Operand.parse("tender4/8"), Accumulator.parse(accumulator)
    found = attention(
        query, key, value, accumulator=Accumulator.parse("fp32"), rule=Rule.parse("none"), scaling=0.25, causal=True,
        values=Values(low, Rule.parse("none"), operand=operand),
    )  # fmt: skip
    scores = query[0] @ key[0].repeat_interleave(2, 0).mT * 0.25
    hidden = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    z = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    z = z.masked_fill(z < SMALLEST_PROBABILITY, 0)
    stored = quantise(value[0], Operand.parse("int4/row"), dim=1)
    expected = torch.zeros(rows, 4, 16, dtype=torch.float64)
    for head in range(4):
        for first in range(0, rows, CHUNK):
            chunk = z[head, first : first + CHUNK]
            reach, top = chunk.amax(0), chunk.max()
            group = sum((reach > top * 2.0**-i).long() for i in range(1, 8))
            scale = top / 15 * 2.0**-7 * 2.0**group
            codes = (chunk / scale).round().clamp(0, 15)
            expected[first : first + CHUNK, head] = (codes * scale).double() @ stored[head // 2].double()
    # A probability on the edge of two codes may fall to either side.
    error = (found.output[0].double() - expected).norm() / expected.norm()
    assert error < 2e-3


def test_chunked_rows_dont_depend_on_the_batch_and_rules_recompute():
    first, second = operands(50, 50), operands(50, 50, seed=7)
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    how = {
        "accumulator": SHIFTED, "rule": Rule.parse("strict:0.1"), "scaling": 0.25, "causal": True,
        "operand": Operand.parse("tender4/8"),
        "values": Values(SHIFTED, Rule.parse("none"), operand=Operand.parse("tender8/8")),
    }  # fmt: skip
    whole, alone = attention(*both, **how), attention(*second, **how)
    assert torch.equal(whole.output[1], alone.output[0])
    assert 0 < int(alone.selected.sum()) < int(alone.eligible.sum())
    none, every = Rule.parse("none"), Rule.parse("all")
    exact = attention(*second, accumulator=Accumulator.parse("fp32"), rule=none, scaling=0.25, causal=True)
    plain = attention(*second, **how | {"rule": none})
    full = attention(*second, **how | {"rule": every, "values": None})
    assert (alone.output - exact.output).norm() < 0.7 * (plain.output - exact.output).norm()
    torch.testing.assert_close(full.output, exact.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["running:0.05", "running-output:0.05", "bridge:0.05", "oracle:0.05"])
def test_rules_that_ask_for_errors_run(rule):
    query, key, value = operands(30, 30)
    found = attention(
        query, key, value, accumulator=SHIFTED, rule=Rule.parse(rule), scaling=0.25, causal=True,
        operand=Operand.parse("tender4/4"),
    )  # fmt: skip
    assert found.output.isfinite().all()


def test_overflowed_scores_are_counted_where_they_are_seen():
    query, key, value = torch.ones(1, 1, 5, 64), torch.ones(1, 1, 5, 64), torch.ones(1, 1, 5, 4)
    found = attention(
        query, key, value, accumulator=Accumulator.parse("int32"), rule=Rule.parse("none"), scaling=1.0, causal=True,
        operand=Operand.parse("int16/row"),
    )  # fmt: skip
    assert found.overflowed == 15


def test_overflowed_values_are_counted():
    value = torch.ones(1, 1, 8, 3)
    found = attention(
        torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4), value, accumulator=Accumulator.parse("fp32"),
        rule=Rule.parse("none"), scaling=1.0, causal=True,
        values=Values(Accumulator.parse("int32"), Rule.parse("none"), operand=Operand.parse("int16/row")),
    )  # fmt: skip
    # Uniform probabilities have the largest code: from three terms on 2^30 each don't fit.
    assert found.values_overflowed == 3 * 6


def test_linear_samples_have_their_own_chunks_and_counts():
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 300, 12, generator=generator), torch.randn(5, 12, generator=generator)
    x[1] *= 50

    def run(some, operand="tender4/6", accumulator="int32/shift", rule="none"):
        return linears(
            some, [Weights(weight.T)], accumulator=Accumulator.parse(accumulator), rule=Rule.parse(rule),
            next_function=relative, operand=Operand.parse(operand),
        )  # fmt: skip

    whole = run(x)
    assert torch.equal(whole.output[1], run(x[1:]).output[0])
    assert whole.overflowed == 0
    low = run(x, rule="running:0.2")
    assert 0 < int(low.selected.sum()) < low.selected.numel() * 5
    exact = x @ weight.T
    assert (low.output - exact).norm() < (whole.output - exact).norm()
    ones = linears(
        torch.ones(3, 12), [Weights(torch.ones(12, 5))], accumulator=Accumulator.parse("int32"),
        rule=Rule.parse("none"), next_function=relative, operand=Operand.parse("int16/row"),
    )  # fmt: skip
    assert ones.overflowed == 15
