"""Rules that choose whole blocks: ThriftAttention's, brute force; look-ahead at block level; first layers."""

import pytest
import torch

import torchlamp
from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.rules import BlockView, Rule, Tile
from torchlamp.simulation.attention import attention

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def tensors(queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, HEADS, queries, SIZE, generator=generator) + 0.5,
        torch.randn(1, KEY_HEADS, keys, SIZE, generator=generator) + 0.3,
        torch.randn(1, KEY_HEADS, keys, SIZE, generator=generator),
    )


def chosen(rule, queries, keys, seed=0, accumulator="ps3"):
    """bool (heads, queries, keys): what the rule takes of a causal attention, the last query seeing all keys."""
    query, key, value = tensors(queries, keys, seed)
    seen = []
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    result = attention(
        query, key, value, accumulator=Accumulator.parse(accumulator), rule=Rule.parse(rule), scaling=0.4, mask=mask,
        observe=lambda o: seen.append((o.rows, o.first_key, o.chosen[0].clone(), o.tile.replace())),
    )  # fmt: skip
    whole = torch.zeros(HEADS, queries, keys, dtype=torch.bool)
    for rows, first, own, _ in seen:
        whole[:, rows.start : rows.stop, first : first + own.shape[-1]] = own
    assert torch.equal(whole.sum(-1), result.selected[0])
    return whole, mask[0, 0], (query[0], key[0]), seen


def worth(kind, query, key, head, rows, block):
    """What a block of keys is chosen by: number by number."""
    q = query[head, rows].mean(0)
    k = key[head // (HEADS // KEY_HEADS), block * 64 : block * 64 + 64]
    if kind == "local":
        return block
    if kind == "means":
        return float(q @ k.mean(0))
    return float(sum(c * (k[:, i].max() if c >= 0 else k[:, i].min()) for i, c in enumerate(q)))


@pytest.mark.parametrize("kind", ["means", "quest", "local"])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (70, 200), (1, 400)])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_best_blocks_of_each_query_block(kind, queries, keys, fraction):
    found, visible, (query, key), _ = chosen(f"thrift:{kind},{fraction}", queries, keys)
    blocks = -(-queries // 64)
    seen = [-(-(keys - queries + min(queries, 64 * n + 64)) // 64) for n in range(blocks)]
    budget, counts = round(fraction * sum(seen)), []
    for n in range(blocks):
        rows = slice(64 * n, min(queries, 64 * n + 64))
        for head in range(HEADS):
            order = sorted(range(seen[n]), key=lambda b: -worth(kind, query, key, head, rows, b))
            taken = [b for b in range(-(-keys // 64)) if found[head, rows, 64 * b : 64 * b + 64].any()]
            assert taken == sorted(order[: len(taken)])
            for b in taken:
                part = slice(64 * b, 64 * b + 64)
                assert torch.equal(found[head, rows, part], visible[rows, part])
        counts.append(len(taken))
    assert sum(counts) == budget
    # As many each, but for the last ones, which take one more, and the first, which don't see so many.
    least = max(counts[0], min(counts))
    assert all(count in (least, least + 1) or count == own for count, own in zip(counts, seen, strict=True))
    assert counts == sorted(counts)


def test_every_block_or_none():
    found, visible, _, _ = chosen("thrift:means,1", 130, 130)
    assert torch.equal(found, visible.expand_as(found))
    assert not chosen("thrift:means,0", 130, 130)[0].any()


def test_block_running_is_the_root_of_the_sum_of_squares():
    found, visible, _, seen = chosen("block-running:0.5", 150, 150)
    assert found.any()
    assert not torch.equal(found, visible.expand_as(found))
    for rows, first, own, tile in seen:
        assert first == 0
        weight = (tile.gain * tile.error).square().masked_fill(~tile.visible, 0)[0]
        for head in range(HEADS):
            for start in range(0, own.shape[-1], 64):
                part = slice(start, start + 64)
                beyond = weight[head, :, part].sum().sqrt() > 0.5
                assert torch.equal(own[head, :, part], tile.visible[0, head, :, part] & beyond)
        assert len(rows) <= 64


def test_blocks_that_arent_finite_are_taken():
    scores = torch.zeros(1, 1, 2, 70)
    scores[0, 0, 0, 3] = torch.nan
    view = BlockView(torch.zeros(1, 2, 4), torch.zeros(1, 70, 4), 0, 0, 2, 70)
    tile = Tile.from_scores(scores, error=torch.full((1, 1, 1, 1), 1e-3))
    tile = Tile(
        scores,
        scores,
        tile.probabilities.nan_to_num(),
        tile.visible,
        error=torch.full_like(scores, 1e-9),
        blocks=view,
    )
    found = Rule.parse("block-running:1").select(tile)[0, 0]
    assert found[:, :64].all()
    assert not found[:, 64:].any()


def test_first_layers():
    tile = Tile.from_scores(torch.randn(1, 1, 3, 5))
    rule = Rule.parse("first-layers:2")
    assert rule.select(tile.replace(layer=1)).all()
    assert not rule.select(tile.replace(layer=2)).any()


@pytest.mark.parametrize(
    "spelling", ["thrift", "thrift:means", "thrift:mean,0.1", "thrift:quest,1.5", "thrift:0.1"]
)
def test_what_is_no_thrift(spelling):
    with pytest.raises(ValueError, match="takes one of means, quest, local and a fraction") as caught:
        Rule.parse(spelling)
    assert f"'{spelling}'" in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("mlp_up=ps4+thrift:means,0.05", "it looks through the blocks of an attention"),
        ("lamp8+block-running:0.1", "which chooses within its own tiles"),
        ("scores=int8+thrift:means,0.05", "with the stored operand int8"),
    ],
)
def test_where_block_rules_dont_fit(policy, message):
    with pytest.raises(ValueError, match=message):
        torchlamp.Policy.parse(policy)


def test_a_tile_without_a_place():
    with pytest.raises(ValueError, match="the tile has no `blocks`"):
        Rule.parse("thrift:means,0.5").select(Tile.from_scores(torch.randn(1, 1, 3, 5)))


@pytest.mark.parametrize("precision", ["nvfp4@fp32", "mxfp4@fp32", "int4@fp32", "tender4/8"])
def test_low_formats(precision):
    policy = torchlamp.Policy.parse(f"scores={precision}+thrift:means,0.05")
    assert str(policy.sites["scores"].rule) == "thrift:means,0.05"
