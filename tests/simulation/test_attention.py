"""The tile loop against whole matrices: a slow, plain attention under a policy."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchlamp.arithmetic import Accumulator, round_to
from torchlamp.kernels import native
from torchlamp.rules import RULES, Rule, Tile
from torchlamp.simulation.ahead import Ahead
from torchlamp.simulation.attention import attention
from torchlamp.simulation.attention_call import Observation

KERNELS = ["torch", native.instruction_set()] if native.available() else ["torch"]


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request, monkeypatch):
    """The tile loop over the torch references, and whatever runs natively."""
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)


HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 4, 2, 8, 5
SCALING = 0.4

FACTOR = torch.randn(HEADS, VALUE_SIZE, VALUE_SIZE, generator=torch.Generator().manual_seed(11))
AHEAD = Ahead(FACTOR, lambda outputs, sample, rows: torch.arange(rows.start, rows.stop) / 10 + 1.0)


@dataclass
class Plain:
    """Whole matrices of one attention call (batch, heads, queries, keys)."""

    output: torch.Tensor
    visible: torch.Tensor
    selected: torch.Tensor


def plain_scores(query, key, format_name, scaling):
    """Unfused per-step sums, each operation a torch operation; the running sum of squares beside it."""
    acc = torch.zeros(*query.shape[:3], key.shape[2])
    squares = torch.zeros_like(acc, dtype=torch.float64)
    for k in range(query.shape[-1]):
        acc = round_to(acc + query[..., k, None] * key[..., k][:, :, None, :], format_name)
        squares += acc.double() ** 2
    return round_to(acc * torch.tensor(scaling), format_name), squares.float()


def plain_attention(
    query, key, value, format_name, rule, visible, *, bias=0.0, softcap=None, sinks=None, seed=None
):
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    low, squares = plain_scores(query, key, format_name, SCALING)
    visible = visible.expand(low.shape)
    unit = Accumulator.parse(format_name).format.unit_roundoff

    def capped(scores):
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    def softmax(logits):
        masked = logits.masked_fill(~visible, torch.finfo(torch.float32).min)
        if sinks is None:
            return masked.softmax(dim=-1)
        sink = sinks[None, :, None, None].expand(*masked.shape[:3], 1)
        return torch.cat([masked, sink], dim=-1).softmax(dim=-1)[..., :-1]

    logits = capped(low) + bias
    exact = (query.double() @ key.double().transpose(2, 3) * SCALING).float()
    probabilities = softmax(logits).masked_fill(~visible, 0.0)
    error = unit / 2 * squares.sqrt() * SCALING
    lengths = query.norm(dim=-1)[..., None] * key.norm(dim=-1)[:, :, None]
    bridge_error = unit / 2 * SCALING * ((low / SCALING) ** 2 * SIZE / 3 + lengths**2 / 6).sqrt()
    away = value[:, :, None] - (probabilities @ value)[:, :, :, None]
    output_distance = away.norm(dim=-1) / (probabilities @ value).norm(dim=-1, keepdim=True)
    scale = torch.arange(query.shape[2]) / 10 + 1.0
    distance = (away @ FACTOR[None, :, None]).norm(dim=-1) / scale[:, None]
    tile = Tile(
        scores=low,
        logits=logits,
        probabilities=probabilities,
        visible=visible,
        slope=None if softcap is None else 1 - (capped(low) / softcap) ** 2,
        error=error,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        exact=exact,
        distance=distance,
        bridge_error=bridge_error,
        output_distance=output_distance,
    )
    selected = rule.select(tile)
    scores = torch.where(selected, exact, low)
    output = (softmax(capped(scores) + bias) @ value).transpose(1, 2)
    return Plain(output, visible, selected)


def operands(batch=2, queries=20, keys=20, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    shape = {"query": (batch, HEADS, queries, SIZE), "key": (batch, KEY_HEADS, keys, SIZE)}
    query = torch.randn(shape["query"], generator=generator) * spread
    key = torch.randn(shape["key"], generator=generator)
    return query, key, torch.randn(batch, KEY_HEADS, keys, VALUE_SIZE, generator=generator)


def masks(batch, queries, keys):
    """Bool (batch or 1, heads or 1, queries, keys) of the kinds that models make, and some they don't."""
    row, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    causal = column <= row
    left = causal & (column >= torch.arange(batch)[:, None, None] * 7)
    generator = torch.Generator().manual_seed(3)
    ragged = torch.rand(batch, HEADS, queries, keys, generator=generator) < 0.3
    return {
        "causal": causal[None, None],
        "window": (causal & (column > row - 6))[None, None],
        "left padding": left[:, None],
        "none": torch.ones(1, 1, queries, keys, dtype=torch.bool),
        "ragged, per head": ragged,
        "nothing visible": torch.zeros(1, 1, queries, keys, dtype=torch.bool),
    }


def check(result, expected):
    torch.testing.assert_close(result.output, expected.output, rtol=0, atol=2e-5)
    assert torch.equal(result.selected, expected.selected.sum(-1))
    assert torch.equal(result.eligible, expected.visible.sum(-1))


SPELLINGS = [
    e
    for rule in RULES.values()
    if rule.looks_through not in ("elementwise", "online", "blocks")
    for e in rule.examples
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", masks(1, 1, 1))
def test_every_rule_under_every_mask(kind, spelling):
    query, key, value = operands()
    rule = Rule.parse(spelling)
    mask = masks(2, 20, 20)[kind]
    if rule.needs_generator and kind not in ("causal", "none"):
        # Draws follow the tile's own key range, which whole matrices don't have.
        mask = masks(2, 20, 20)["none"]
    result = attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse("ps4/unfused"),
        rule=rule,
        scaling=SCALING,
        ahead=AHEAD,
        mask=mask,
        generator=torch.Generator().manual_seed(5),
    )
    if rule.needs_generator:
        expected = [
            plain_attention(*(t[b : b + 1] for t in (query, key, value)), "ps4", rule, mask, seed=5)
            for b in range(2)
        ]
        for b, one in enumerate(expected):
            torch.testing.assert_close(result.output[b : b + 1], one.output, rtol=0, atol=2e-5)
            assert torch.equal(result.selected[b : b + 1], one.selected.sum(-1))
    else:
        check(result, plain_attention(query, key, value, "ps4", rule, mask))


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if not Rule.parse(s).needs_generator])
@pytest.mark.parametrize("queries", [150, 3])
def test_many_tiles_and_chunks(spelling, queries):
    query, key, value = operands(queries=queries, keys=150)
    mask = masks(2, queries, 150)["left padding"]
    result = attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse("ps3/unfused"),
        rule=Rule.parse(spelling),
        scaling=SCALING,
        ahead=AHEAD,
        mask=mask,
    )
    check(result, plain_attention(query, key, value, "ps3", Rule.parse(spelling), mask))


@pytest.mark.parametrize(
    "spelling", ["none", "all", "strict:0.05", "running:0.01", "relaxed:0.1", "mass:0.7"]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_softcap_sinks_and_bias(spelling, softcap, with_sinks, with_bias):
    query, key, value = operands(spread=3.0)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0]) if with_sinks else None
    bias = torch.randn(2, HEADS, 20, 20, generator=torch.Generator().manual_seed(1)) if with_bias else None
    mask = masks(2, 20, 20)["left padding"]
    rule = Rule.parse(spelling)
    result = attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse("ps4/unfused"),
        rule=rule,
        scaling=SCALING,
        ahead=AHEAD,
        mask=mask,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
    )
    expected = plain_attention(
        query, key, value, "ps4", rule, mask, bias=0.0 if bias is None else bias, softcap=softcap, sinks=sinks
    )
    check(result, expected)


def test_strict_selects_what_its_formula_says():
    query, key, value = operands(batch=1, queries=100, keys=100)
    low, _ = plain_scores(query, key.repeat_interleave(2, dim=1), "ps4", SCALING)
    visible = torch.ones(100, 100, dtype=torch.bool).tril()
    z = low.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    counts = (2 * z * (1 - z) * low.abs() > 0.1).sum(dim=-1)
    rule = Rule.parse("strict:0.1")
    accumulator = Accumulator.parse("ps4/unfused")
    result = attention(query, key, value, accumulator=accumulator, rule=rule, scaling=SCALING, causal=True)
    assert torch.equal(result.selected, counts)
    assert 0 < int(counts.sum()) < int(visible.sum()) * HEADS


@pytest.mark.parametrize("spelling", ["none", "strict:0.05", "running:0.01", "random:0.2"])
@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (66, 66), (2, 2), (10, 16), (1, 7)])
def test_causal_flag_equals_a_mask_aligned_at_the_first_key(spelling, queries, keys):
    query, key, value = operands(queries=queries, keys=keys)
    settings_ = {
        "accumulator": Accumulator.parse("ps4"),
        "rule": Rule.parse(spelling),
        "scaling": SCALING,
        "ahead": AHEAD,
    }
    mask = torch.ones(queries, keys, dtype=torch.bool).tril()[None, None]
    flagged = attention(
        query, key, value, causal=True, generator=torch.Generator().manual_seed(0), **settings_
    )
    masked = attention(query, key, value, mask=mask, generator=torch.Generator().manual_seed(0), **settings_)
    assert torch.equal(flagged.output, masked.output)
    assert torch.equal(flagged.selected, masked.selected)
    assert torch.equal(flagged.last_key, torch.arange(queries).clamp_max(keys - 1).expand(2, -1))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["causal", "left padding", "window"])
def test_a_sample_does_not_depend_on_its_batch(spelling, kind):
    query, key, value = operands(batch=3, queries=70, keys=70)
    mask = masks(3, 70, 70)[kind]
    settings_ = {
        "accumulator": Accumulator.parse("ps4"),
        "rule": Rule.parse(spelling),
        "scaling": SCALING,
        "ahead": AHEAD,
    }
    together = attention(
        query, key, value, mask=mask, generator=torch.Generator().manual_seed(2), **settings_
    )
    for b in range(3):
        own = mask if mask.shape[0] == 1 else mask[b : b + 1]
        one = (t[b : b + 1] for t in (query, key, value))
        alone = attention(*one, mask=own, generator=torch.Generator().manual_seed(2), **settings_)
        assert torch.equal(together.output[b : b + 1], alone.output)
        assert torch.equal(together.selected[b : b + 1], alone.selected)


def test_rows_that_see_nothing():
    query, key, value = operands(queries=3, keys=9)
    mask = torch.ones(2, 1, 3, 9, dtype=torch.bool)
    mask[0, 0, 1] = False
    settings_ = {
        "accumulator": Accumulator.parse("ps4"),
        "rule": Rule.parse("all"),
        "scaling": SCALING,
        "ahead": AHEAD,
    }
    result = attention(query, key, value, mask=mask, **settings_)
    uniform = value[0].mean(dim=1).repeat_interleave(2, dim=0)
    torch.testing.assert_close(result.output[0, 1], uniform)
    assert result.eligible[0, :, 1].tolist() == [0] * HEADS
    assert result.selected[0, :, 1].tolist() == [0] * HEADS
    assert result.last_key[0].tolist() == [8, -1, 8]
    sunk = attention(query, key, value, mask=mask, sinks=torch.zeros(HEADS), **settings_)
    assert not sunk.output[0, 1].any()


def test_a_large_sink_takes_all_the_weight_without_overflow():
    query, key, value = operands()
    sinks = torch.tensor([500.0, -500.0, 0.0, 1.0])
    rule = Rule.parse("strict:0.1")
    mask = masks(2, 20, 20)["window"]
    result = attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse("ps4/unfused"),
        rule=rule,
        scaling=SCALING,
        ahead=AHEAD,
        mask=mask,
        sinks=sinks,
    )
    check(result, plain_attention(query, key, value, "ps4", rule, mask, sinks=sinks))
    assert not result.output[:, :, 0].any()


def test_causal_flag_and_mask_together():
    query, key, value = operands(queries=150, keys=150)
    row, column = torch.arange(150)[:, None], torch.arange(150)
    near = (column > row - 20)[None, None]
    settings_ = {
        "accumulator": Accumulator.parse("ps4"),
        "rule": Rule.parse("strict:0.05"),
        "scaling": SCALING,
    }
    both = attention(query, key, value, mask=near, causal=True, **settings_)
    mask = near & (column <= row)
    expected = attention(query, key, value, mask=mask, **settings_)
    torch.testing.assert_close(both.output, expected.output)
    assert torch.equal(both.selected, expected.selected)
    assert torch.equal(both.last_key, torch.arange(150).expand(2, -1))


@dataclass(frozen=True)
class Watching(Rule):
    """Selects nothing, and checks what it is shown."""

    name = "watching"
    examples = ("watching",)
    byproducts = frozenset({"squares"})

    def select(self, tile):
        assert torch.isfinite(tile.probabilities).all()
        assert not tile.probabilities[~tile.visible].any()
        sums = tile.probabilities.sum(dim=-1)
        torch.testing.assert_close(sums, tile.visible.any(dim=-1).float())
        assert tile.scores.shape == tile.error.shape == tile.visible.shape
        assert (tile.error[tile.visible] > 0).all()
        return torch.zeros_like(tile.visible)


@pytest.mark.parametrize("kind", masks(1, 1, 1))
def test_what_a_rule_is_shown(kind):
    query, key, value = operands(queries=70, keys=70)
    mask = masks(2, 70, 70)[kind].clone()
    mask[..., 9, :] = False
    attention(
        query, key, value, accumulator=Accumulator.parse("ps4"), rule=Watching(), scaling=SCALING, mask=mask
    )


def test_operands_of_any_strides_and_unused_cache_slots():
    query, key, value = operands(batch=2, queries=5, keys=12)
    settings_ = {
        "accumulator": Accumulator.parse("ps4"),
        "rule": Rule.parse("strict:0.1"),
        "scaling": SCALING,
    }
    mask = masks(2, 5, 12)["causal"]
    expected = attention(query, key, value, mask=mask, **settings_)

    def restrided(t):
        return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    actual = attention(restrided(query), restrided(key), restrided(value), mask=mask, **settings_)
    assert torch.equal(actual.output, expected.output)
    pad = torch.full((2, KEY_HEADS, 4, SIZE), torch.nan)
    longer = attention(
        query,
        torch.cat([key, pad], dim=2),
        torch.cat([value, pad[..., :5]], dim=2),
        mask=torch.cat([mask, torch.zeros(1, 1, 5, 4, dtype=torch.bool)], dim=-1),
        **settings_,
    )
    assert torch.equal(longer.output, expected.output)
    assert torch.equal(longer.eligible, expected.eligible)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_all_equals_float32_attention(batch, queries, keys, seed, density):
    query, key, value = operands(batch, queries, keys, seed)
    mask = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) < density
    result = attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse("ps2"),
        rule=Rule.parse("all"),
        scaling=SCALING,
        ahead=AHEAD,
        mask=mask,
    )
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=additive, scale=SCALING, enable_gqa=True
    )
    torch.testing.assert_close(result.output.transpose(1, 2), expected, rtol=0, atol=1e-5)
    assert torch.equal(result.selected, result.eligible)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(1, 4, 2, 8, dtype=torch.float16)}, TypeError, "query is torch.float16"),
        ({"key": torch.zeros(1, 2, 8)}, ValueError, "key of shape"),
        ({"key": torch.zeros(1, 3, 2, 8), "value": torch.zeros(1, 3, 2, 8)}, ValueError, "don't fit"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks of shape \(3,\)"),
        ({"sinks": torch.zeros(4).double()}, TypeError, "sinks is torch.float64"),
        ({"mask": torch.ones(1, 1, 2, 2)}, TypeError, "mask is torch.float32: it must be torch.bool"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"mask of shape \(2, 2\)"),
        ({"mask": torch.ones(1, 1, 2, 3, dtype=torch.bool)}, ValueError, r"of \(1, 4, 2, 2\)"),
        ({"bias": torch.zeros(3, 1, 2, 2)}, ValueError, r"bias of shape \(3, 1, 2, 2\)"),
        ({"rule": Rule.parse("random:0.5")}, ValueError, "pass a generator"),
    ],
)
def test_errors(change, error, words):
    arguments = {
        "query": torch.zeros(1, 4, 2, 8),
        "key": torch.zeros(1, 2, 2, 8),
        "value": torch.zeros(1, 2, 2, 8),
        "accumulator": Accumulator.parse("ps4"),
        "rule": Rule.parse("none"),
        "scaling": 1.0,
    }
    with pytest.raises(error, match=words):
        attention(**{**arguments, **change})


@pytest.mark.parametrize("spelling", ["strict:0.1", "random:0.2"])
def test_an_observer_sees_what_is_selected_and_changes_nothing(spelling):
    query, key, value = (torch.randn(1, h, 70, 8, generator=torch.manual_seed(h)) for h in (4, 2, 2))
    seen: list[Observation] = []
    common = {
        "accumulator": Accumulator.parse("ps3"),
        "rule": Rule.parse(spelling),
        "scaling": 0.4,
        "causal": True,
    }
    observed = attention(query, key, value, generator=torch.manual_seed(0), observe=seen.append, **common)
    plain = attention(query, key, value, generator=torch.manual_seed(0), **common)
    torch.testing.assert_close(observed.output, plain.output)
    assert [o.rows for o in seen] == [range(64), range(64, 70)]
    chosen = torch.cat([o.chosen[0].sum(dim=-1) for o in seen], dim=-1)
    assert torch.equal(chosen, observed.selected[0])
    exact = 0.4 * query[0] @ key[0].repeat_interleave(2, dim=0).transpose(1, 2)
    for o in seen:
        there = o.tile.visible[0]
        torch.testing.assert_close(
            o.exact[0][there], exact[:, o.rows.start : o.rows.stop, : there.shape[-1]][there]
        )
