"""The cost model against counting, one operation at a time, in explicit loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.formats import Format
from torchlamp.evaluation.cost import GRANULARITIES, CostModel, Shape, costs, format_bits, touched_rates
from torchlamp.rules import Rule


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("ps4", 13), ("ps23", 32), ("fp32", 32), ("tf32", 19), ("bf16", 16), ("fp16", 16), ("e4m3fn", 8)),
        *(("e5m2", 8), ("e5m2fnuz", 8), ("e2m1fn", 4), ("e3m2fn", 6), ("ue4m3", 7), ("e8m1", 10)),
    ],
)
def test_bits_of_a_format(name, bits):
    assert format_bits(Format.parse(name)) == bits


def counted(chosen, depth, unit, causal, model, narrow, operations, error, distance, norms):
    """Operations of low pass, look-ahead and recomputation, operands fetched, and eligible entries, by counting."""
    rows, columns = chosen.shape
    height, width = unit
    low = look = again = 0.0
    fetched = eligible = units = touched = 0
    for i in range(rows):
        for j in range(columns):
            if causal and j > i:
                continue
            eligible += 1
            for _ in range(depth):
                low += narrow
                look += error
                if chosen[i, j]:
                    look += distance  # a term of the correction of the output
                    look += model.candidates * distance  # terms of products of values and output
            look += operations * model.operation
    if norms:
        for _ in range(rows + columns):
            for _ in range(depth):
                look += 1
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            units += 1
            if not chosen[i : i + height, j : j + width].any():
                continue
            touched += 1
            fetched += height + width
            for _ in range(height * width):
                for _ in range(depth):
                    again += 1
                again += model.apply
    return low, look, again, fetched, eligible, touched / units


@pytest.mark.parametrize("granularity", list(GRANULARITIES))
@pytest.mark.parametrize(
    "spelling", ["running:0.1", "strict:0.1", "running-output:0.1", "bridge-residual:0.1"]
)
def test_costs_equal_counting(granularity, spelling):
    """Full rectangles of whole units, where the formulas are exact."""
    rows, columns, depth = 32, 48, 5
    model = CostModel(low=0.25, error=0.5, distance=0.625, candidates=2.5, operation=0.75, apply=3)
    rule = Rule.parse(spelling)
    chosen = torch.rand(rows, columns, generator=torch.manual_seed(1)) < 0.003
    low, look, again, fetched, eligible, share = counted(
        chosen,
        depth,
        GRANULARITIES[granularity],
        False,
        model,
        0.25,
        rule.operations,
        0.5 * ("squares" in rule.byproducts),
        0.625 * ("distances" in rule.further_work),
        "norms" in rule.further_work,
    )
    full = rows * columns * depth
    rate = float(chosen.float().mean())
    found = costs(
        Shape(rows, columns, depth), "ps4", rule, rate, {granularity: share} if share else None, model
    )[granularity]
    assert eligible == rows * columns
    assert not found.estimated
    assert found.low_pass == pytest.approx(low / full)
    assert found.look_ahead == pytest.approx(look / full)
    assert found.recompute == pytest.approx(again / full)
    assert found.recompute_bytes == pytest.approx(min(fetched, rows + columns) / (rows + columns))
    assert found.total == pytest.approx((low + look + again) / full)


def test_causal_entries_are_counted():
    assert Shape(7, 7, 3, causal=True).entries == sum(1 for i in range(7) for j in range(7) if j <= i)


def test_the_steps_of_blocks_and_promotions():
    """float32 additions counted in one sum of 64 terms."""
    model = CostModel(low=0.25)
    narrow = wide = 0
    for k in range(64):
        narrow += 1
        wide += (k + 1) % 16 == 0
    assert 64 * model.multiply_add(Accumulator.parse("ps4/promote16")) == narrow * 0.25 + wide
    wide, narrow = 64, 64 // 16
    assert 64 * model.multiply_add(Accumulator.parse("ps4/block16")) == wide + narrow * 0.25
    assert CostModel().multiply_add(Accumulator.parse("ps4")) == 13 / 32
    shape, ps4 = Shape(64, 64, 16), Accumulator.parse("ps4")
    wide, narrow = (
        CostModel(error=e).look_ahead(Rule.parse("running:0.1"), shape, ps4, 0.01) for e in (1.0, None)
    )
    assert wide - narrow == pytest.approx(1 - 13 / 32)


def test_independent_entries_touch_as_many_blocks_as_estimated():
    rate = 0.01
    chosen = torch.rand(4096, 4096, generator=torch.manual_seed(0)) < rate
    blocks = chosen.view(4096, 256, 16).any(dim=-1).float().mean()
    tiles = chosen.view(256, 16, 256, 16).any(dim=-1).any(dim=1).float().mean()
    estimate = touched_rates(rate)
    assert estimate["entry"] == (rate, False)
    assert estimate["row_block_16"] == (pytest.approx(float(blocks), rel=0.01), True)
    assert estimate["tile_16x16"] == (pytest.approx(float(tiles), rel=0.01), True)


@given(
    rate=st.floats(0, 1),
    depth=st.integers(1, 4096),
    low=st.floats(0, 2),
    spelling=st.sampled_from(["none", "strict:0.1", "running:0.1", "random:0.1"]),
)
def test_break_even_is_where_the_total_is_one(rate, depth, low, spelling):
    shape, model = Shape(64, 64, depth), CostModel(low=low)
    found = costs(shape, "ps4", spelling, rate, model=model)
    assert (
        0
        <= found["entry"].touched
        <= 1.0001 * found["row_block_16"].touched
        <= 1.001 * found["tile_16x16"].touched
    )
    for cost in found.values():
        assert 0 <= cost.break_even <= 1
        at = costs(shape, "ps4", spelling, cost.break_even, model=model)["entry"]
        if cost.break_even > 0:
            assert at.total == pytest.approx(1) or (cost.break_even == 1 and at.total < 1)
        else:
            assert at.total >= 1 - 1e-9


def test_controls_count_no_look_ahead_and_nothing_is_free():
    shape = Shape(512, 512, 64, causal=True)
    control = costs(shape, "ps4", "random-like:running:0.1", 0.01)["entry"]
    assert control.look_ahead == 0
    assert costs(shape, "ps4", "running:0.1", 0.01)["entry"].look_ahead >= 1
    assert costs(shape, "ps4", "running:0.1", 0.01)["entry"].break_even == 0
    assert control.total == pytest.approx(13 / 32 + 0.01 * (1 + 4 / 64))
    assert costs(shape, "ps4", "all", 1.0)["tile_16x16"].recompute_bytes == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Shape(0, 1, 1), "rows=0"),
        (lambda: Shape(2, 3, 1, causal=True), "2 x 3"),
        (lambda: CostModel(low=-1.0), "low=-1.0"),
        (lambda: CostModel(apply=float("nan")), "apply=nan"),
        (lambda: touched_rates(1.5), "1.5 at granularity 'entry'"),
        (lambda: touched_rates(0.5, {"tile_16x16": -0.1}), "'tile_16x16'"),
    ],
)
def test_bad_input_is_quoted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def operations(names, shape, calibrated=False):
    """What transforms add, in operations."""
    found = costs(shape, "ps4", "strict:0.1", 0.02, transforms=names, calibrated=calibrated)["tile_16x16"]
    plain = costs(shape, "ps4", "strict:0.1", 0.02)["tile_16x16"]
    assert plain.transforms == 0
    assert found.total == pytest.approx(plain.total + found.transforms)
    assert found.break_even == pytest.approx(
        max(plain.break_even - found.transforms / (1 + 4 / 16), 0), abs=1e-9
    )
    return round(found.transforms * shape.entries * shape.depth, 6)


@pytest.mark.parametrize(
    ("names", "fitted", "calibrated"),
    [
        # 100 queries and keys of 16 numbers, 5050 scores.
        ("center", 2 * 1600, 1600),
        ("bicenter", 4 * 1600 + 1600 + 5050, 2 * 1600 + 1600 + 5050),
        ("sort", 2 * 1600, 0),
        ("smooth", 4 * 1600, 2 * 1600),
        ("hadamard", 2 * 1600 * 4, 2 * 1600 * 4),
        ("balance", 3 * 1600 * 16 + 10 * 16**3, 2 * 1600 * 16),
        ("center.sort", 4 * 1600, 1600),
    ],
)
def test_transforms_of_scores_are_counted(names, fitted, calibrated):
    shape = Shape(100, 100, 16, causal=True)
    assert operations(names.split("."), shape) == fitted
    assert operations(names.split("."), shape, calibrated=True) == calibrated


def test_weights_are_changed_once():
    shape = Shape(100, 30, 16)
    assert operations(["center"], shape) == operations(["bicenter"], shape) == 2 * 1600
    assert operations(["sort"], shape, calibrated=True) == 0
    assert operations(["balance"], shape, calibrated=True) == 1600 * 16
