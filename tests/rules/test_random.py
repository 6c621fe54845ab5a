import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_tiles import generator, random_tile, row

from torchlamp.rules import Random, RandomLike, Rule, Tile
from torchlamp.rules.random import _lowest


@pytest.mark.parametrize("rate", [0.002, 0.1, 0.5, 0.97])
def test_random_hits_its_rate_among_visible_entries(rate):
    tile = random_tile(1, 3, 300, 300)
    visible = int(tile.visible.sum())
    selected = int(Random(rate).select(tile).sum())
    assert abs(selected - rate * visible) < 5 * math.sqrt(visible * rate * (1 - rate))


def test_random_ends():
    tile = random_tile(1, 3, 30, 30)
    assert not Random(0).select(tile).any()
    assert torch.equal(Random(1).select(tile), tile.visible)


def test_random_is_random_in_every_direction():
    """No head, row or key is preferred: each sum is within 5 standard deviations."""
    tile = random_tile(1, 8, 128, 128, visible=torch.ones(128, 128, dtype=torch.bool))
    selected = Random(0.25).select(tile)[0].double()
    for kept in (0, 1, 2):
        sums = selected.sum(dim=[d for d in (0, 1, 2) if d != kept])
        number = selected.numel() / len(sums)
        assert (sums - 0.25 * number).abs().max() < 5 * math.sqrt(number * 0.25 * 0.75)


@given(st.floats(0, 1), st.floats(0, 1))
def test_random_is_monotone_for_one_seed(a, b):
    tile = random_tile(1, 2, 5, 9)
    less = Random(min(a, b)).select(tile.replace(generator=generator(3)))
    more = Random(max(a, b)).select(tile.replace(generator=generator(3)))
    assert not (less & ~more).any()


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(
        ["strict:0.01", "strict:0.5", "mass:0.9", "topz:0.05", "relaxed:0.3", "all", "none", "random:0.3"]
    ),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_random_like_has_the_exact_counts(spelling, seed, holes):
    visible = torch.rand(21, 33, generator=generator(seed)) < 0.6 if holes else None
    tile = random_tile(2, 3, 21, 33, seed=seed, visible=visible, spread=3.0)
    imitated = Rule.parse(spelling).select(tile.replace(generator=generator(seed)))
    selected = RandomLike(Rule.parse(spelling)).select(tile.replace(generator=generator(seed)))
    assert torch.equal(selected.sum(dim=-1), imitated.sum(dim=-1))
    assert not (selected & ~tile.visible).any()


def test_random_like_prefers_no_entry():
    """Every visible entry of a row is taken equally often, and so is every pair of entries."""
    repeats, keys, taken = 20000, 9, 3
    scores = torch.zeros(repeats, keys)
    scores[:, :taken] = 5.0
    visible = torch.ones(keys, dtype=torch.bool)
    visible[7] = False
    tile = Tile.from_scores(scores, visible, generator=generator(4))
    selected = RandomLike(Rule.parse("topz:0.2")).select(tile)
    assert (selected.sum(dim=-1) == taken).all()
    share = taken / 8
    often = selected.sum(dim=0)[visible]
    assert (often - share * repeats).abs().max() < 5 * math.sqrt(repeats * share * (1 - share))
    pairs = (selected.double().T @ selected.double())[visible][:, visible]
    pair_share = share * (taken - 1) / 7
    apart = pairs[~torch.eye(8, dtype=torch.bool)]
    assert (apart - pair_share * repeats).abs().max() < 5 * math.sqrt(repeats * pair_share * (1 - pair_share))


@st.composite
def draws(draw):
    """Draws with many ties or all far up, so that the first guess of the candidates fails; and counts."""
    rows, keys = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    source = generator(draw(st.integers(0, 10**6)))
    visible = torch.rand(rows, keys, generator=source) < draw(st.sampled_from([0.3, 0.9, 1.1]))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    low = draw(st.sampled_from([0.0, 0.75, 0.999]))
    steps = torch.randint(levels, (rows, keys), generator=source)
    values = (low + steps / levels * (1 - low)).clamp(max=1 - 2**-24).float()
    counts = (
        (torch.rand(rows, generator=source) * (visible.sum(dim=-1) + 1)).long().minimum(visible.sum(dim=-1))
    )
    return values, visible, counts


@settings(deadline=None, max_examples=200)
@given(draws())
def test_the_lowest_draws_are_found_exactly(case):
    values, visible, counts = case
    expected = torch.zeros_like(visible)
    for i in range(len(counts)):
        keys = sorted(visible[i].nonzero().flatten().tolist(), key=lambda j: (float(values[i, j]), j))
        expected[i, keys[: counts[i]]] = True
    assert torch.equal(_lowest(values, visible, counts), expected)


def test_sequences_of_a_batch_share_the_draws():
    one = random_tile(1, 3, 16, 16)
    two = Tile.from_scores(one.scores.expand(2, -1, -1, -1), one.visible[0], generator=generator(5))
    for rule in ("random:0.3", "random-like:strict:0.1"):
        first, second = Rule.parse(rule).select(two)
        assert torch.equal(first, second)


def test_the_generator_moves_on():
    tile = random_tile(1, 3, 16, 16)
    assert not torch.equal(Random(0.5).select(tile), Random(0.5).select(tile))


@pytest.mark.parametrize("spelling", ["random:0.5", "random-like:strict:0.1"])
def test_missing_generator_says_what_to_do(spelling):
    with pytest.raises(
        ValueError, match=f"rule '{spelling}' needs random numbers: give the tile a torch.Generator"
    ):
        Rule.parse(spelling).select(row([1.0, 2.0]))
