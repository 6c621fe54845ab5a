"""Attention with an online softmax: against plain loops over its scores, and corner cases."""

import pytest
import torch

from lamp_attention_reference import Warp
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.transforms import Transform
from torchlamp.kernels.products import products
from torchlamp.rules import RULES, Rule
from torchlamp.simulation.attention import attention
from torchlamp.simulation.tile_counts import saturation_warning, tile_rates

SIZE, SCALING = 16, 0.25
LAMP8 = Accumulator.parse("lamp8")
RULE = "lamp-attention:0.00390625,0.05"


def operands(queries=40, keys=40, batch=1, heads=2, seed=0, common=0.0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, SIZE, generator=g) * 2 + common
    key = torch.randn(batch, max(1, heads // 2), keys, SIZE, generator=g) * 2 + common
    return query, key, torch.randn(batch, key.shape[1], keys, 5, generator=g)


def run(query, key, value, rule=RULE, accumulator="lamp8", seed=3, **others):
    return attention(
        query,
        key,
        value,
        accumulator=Accumulator.parse(accumulator),
        rule=Rule.parse(rule),
        scaling=SCALING,
        generator=torch.Generator().manual_seed(seed),
        **others,
    )


def by_loops(query, key, value, visible, rule):
    """Output (queries, heads, value size) and recomputed entries by the reference, warps from the first row on."""
    setting, group = Rule.parse(rule).setting, query.shape[1] // key.shape[1]
    scaled, keys = query[0] * SCALING, key[0].mT
    low, _ = products(scaled, keys, LAMP8.accumulation)
    high, _ = products(scaled, keys, LAMP8.recomputation)
    out, selected = [], torch.zeros(query.shape[1], query.shape[2], dtype=torch.int64)
    for h in range(query.shape[1]):
        weights = []
        for start in range(0, query.shape[2], 16):
            at = slice(start, start + 16)
            parts = [x[h, at].tolist() for x in (low, high)]
            warp = Warp(*parts, visible[at].tolist(), delta=setting.delta, tau=setting.tau).run()
            weights += warp.weights
            for i, _ in warp.chosen:
                selected[h, start + i] += 1
        out.append(torch.tensor(weights) @ value[0, h // group])
    return torch.stack(out, 1), selected


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (40, 40), (67, 150)])
def test_equals_loops(queries, keys):
    query, key, value = operands(queries, keys)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    result = run(query, key, value, mask=visible[None, None])
    output, selected = by_loops(query, key, value, visible, RULE)
    assert torch.equal(result.selected[0], selected)
    torch.testing.assert_close(result.output[0], output, rtol=1e-6, atol=1e-6)


def test_causal_is_the_mask_and_batches_make_no_difference():
    query, key, value = operands(90, 90, batch=3)
    triangle = torch.ones(1, 1, 90, 90, dtype=torch.bool).tril()
    for accumulator in ("lamp8", "lamp8-ps", "ps3/online9/stochastic", "ps3/block4/online9"):
        whole = run(query, key, value, accumulator=accumulator, causal=True)
        masked = run(query, key, value, accumulator=accumulator, mask=triangle)
        assert torch.equal(whole.output, masked.output)
        one = run(query[1:2], key[1:2], value[1:2], accumulator=accumulator, causal=True)
        assert torch.equal(whole.output[1:2], one.output)
        assert torch.equal(whole.selected[1:2], one.selected)


def test_padding_in_front_makes_no_difference():
    query, key, value = operands(50, 50)
    alone = run(query, key, value, causal=True)
    wide = [torch.nn.functional.pad(x, (0, 0, 11, 0), value=7.0) for x in (query, key, value)]
    mask = torch.ones(61, 61, dtype=torch.bool).tril()
    mask[:, :11] = False
    padded = run(*wide, mask=mask[None, None])
    assert torch.equal(padded.output[:, 11:], alone.output)
    assert torch.equal(padded.selected[:, :, 11:], alone.selected)
    assert torch.equal(padded.tiles, alone.tiles)
    # Rows without a key: uniform weights, as everywhere.
    assert torch.allclose(padded.output[0, 0, 0], wide[2][0, 0].mean(0))
    assert not padded.eligible[:, :, :11].any()


def test_sliding_windows():
    query, key, value = operands(100, 100)
    near = torch.ones(100, 100, dtype=torch.bool).tril() & torch.ones(100, 100, dtype=torch.bool).triu(-20)
    result = run(query, key, value, mask=near[None, None])
    output, selected = by_loops(query, key, value, near, RULE)
    assert torch.equal(result.selected[0], selected)
    torch.testing.assert_close(result.output[0], output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        e
        for rule in RULES.values()
        for e in rule.examples[:1]
        if rule.looks_through not in ("elementwise", "blocks")
    ],
)
def test_every_rule_runs(rule):
    """All rules read the tile of an online softmax; `all` is nearer to the truth than `none`."""
    query, key, value = operands(30, 30, heads=4)

    if Rule.parse(rule).reads_residual_stream:
        with pytest.raises(ValueError, match="pass ahead"):
            run(query, key, value, rule, causal=True)
        return
    result = run(query, key, value, rule, causal=True)
    assert result.output.isfinite().all()
    assert (result.selected <= result.eligible).all()


def test_recomputation_helps_and_is_counted():
    query, key, value = operands(128, 128, heads=4)
    key[:, :, 16:] *= 0.25
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double().repeat_interleave(2, 1), value.double().repeat_interleave(2, 1),
        is_causal=True, scale=SCALING,
    ).transpose(1, 2)  # fmt: skip

    def error(rule):
        result = run(query, key, value, rule, causal=True)
        return float((result.output - exact).norm()), tile_rates(result.tiles)

    plain, none = error("none")
    guarded, some = error("lamp-attention:0.00390625,0.5")
    best, whole = error("all")
    assert best < guarded / 3 < plain / 9
    assert [none["sub_block"], whole["sub_block"]] == [0.0, 1.0]
    assert 0 < some["sub_block"] < 0.9
    assert none["0"] == 1.0
    for shares in (none, some, whole):
        assert shares["0"] + shares["1"] + shares["2+"] == pytest.approx(1.0)
    # 8 warps and 2 tiles of keys, of which the first 4 warps see one.
    assert int(run(query, key, value, causal=True).tiles[:5].sum()) == 4 * (8 + 4)


def test_scores_that_saturate_are_counted_and_centred_keys_do_not():
    query, key, value = operands(64, 64, common=14.0)
    saturated = run(query, key, value, "none", causal=True)
    assert tile_rates(saturated.tiles)["saturated"] > 0.9
    assert "end of their format's range: name the transform 'center'" in saturation_warning(saturated.tiles)
    centred = run(query, key, value, "none", causal=True, transforms=(Transform.parse("center"),))
    assert tile_rates(centred.tiles)["saturated"] == 0.0
    assert saturation_warning(centred.tiles) is None


@pytest.mark.parametrize(
    "others", [{"softcap": 4.0}, {"sinks": torch.tensor([1.0, 30.0])}, {"bias": torch.randn(1, 1, 40, 40)}]
)
def test_softcap_sinks_and_bias(others):
    """In wide formats they give what the ordinary simulation gives; in narrow ones logits are rounded again."""
    query, key, value = operands()
    wide = run(query, key, value, "all", accumulator="ps20/online21", causal=True, **others)
    plain = run(query, key, value, "all", accumulator="ps20", causal=True, **others)
    torch.testing.assert_close(wide.output, plain.output, rtol=1e-3, atol=1e-4)
    seen = []
    run(query, key, value, causal=True, observe=seen.append, **others)
    logits = seen[0].tile.logits[seen[0].tile.visible]
    assert torch.equal(logits, logits.to(torch.float8_e4m3fn).float())


def test_numbers_that_are_not_finite():
    query, key, value = operands()
    query[0, 1, 20] = torch.nan
    result = run(query, key, value, causal=True)
    assert result.output[0, 20, 1].isnan().all()
    result.output[0, 20, 1] = 0.0
    assert result.output.isfinite().all()


def test_random_rounding():
    query, key, value = operands(64, 64)
    first, again, other = (
        run(query, key, value, "none", "e4m3fn-sat/online11/stochastic", seed=s, causal=True).output
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    how = {"accumulator": Accumulator.parse("ps3/online9/stochastic"), "rule": Rule.parse("none")}
    with pytest.raises(ValueError, match="draws random numbers: pass a generator"):
        attention(query, key, value, scaling=SCALING, **how)


def test_random_sums_are_right_on_average():
    """Swamped by nearest rounding, small terms count in expectation."""
    query, key = torch.ones(1, 1, 16, 64), torch.full((1, 1, 64, 64), 0.03125)
    key[..., 0] = 2.0
    seen = []
    for accumulator in ("ps3/online11", "ps3/online11/stochastic"):
        attention(
            query, key, torch.ones(1, 1, 64, 1),
            accumulator=Accumulator.parse(accumulator), rule=Rule.parse("none"), scaling=1.0,
            generator=torch.Generator().manual_seed(0), observe=lambda o: seen.append(o.tile.scores),
        )  # fmt: skip
    truth = 2 + 63 * 0.03125
    assert torch.equal(seen[0], torch.full_like(seen[0], 2.0))
    assert abs(float(seen[1].mean()) - truth) < 0.05


def test_what_attention_refuses():
    query, key, value = operands()
    with pytest.raises(ValueError, match="needs an accumulator with an online softmax, not 'ps4'"):
        run(query, key, value, accumulator="ps4")
