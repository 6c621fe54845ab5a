import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_tiles import generator, random_tile

from torchlamp.rules import Rule, SinkRecent


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 99))
def test_the_first_and_the_last_visible_keys(first, last, seed):
    """With holes, by a loop over the visible keys of each row."""
    visible = torch.rand(5, 9, generator=generator(seed)) < 0.7
    tile = random_tile(2, 2, 5, 9, visible=visible)
    expected = torch.zeros(5, 9, dtype=torch.bool)
    for i in range(5):
        seen = visible[i].nonzero().flatten().tolist()
        expected[i, seen[:first] + seen[len(seen) - min(last, len(seen)) :]] = True
    assert torch.equal(SinkRecent((first, last)).select(tile), expected.expand(2, 2, 5, 9))


def test_causal_rows_end_at_the_diagonal():
    tile = random_tile(1, 1, 5, 5)
    assert SinkRecent((1, 2)).select(tile)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_values_make_no_difference():
    expected = SinkRecent((1, 1)).select(random_tile(1, 2, 5, 9))
    spoilt = random_tile(1, 2, 5, 9)
    spoilt.scores[..., 3] = torch.nan
    assert torch.equal(SinkRecent((1, 1)).select(spoilt), expected)


def test_spelling():
    assert Rule.parse("sink-recent: 4 , 16") == SinkRecent((4, 16))
    assert str(SinkRecent((4, 16))) == "sink-recent:4,16"
    largest = SinkRecent((999999999, 0))
    assert Rule.parse(str(largest)) == largest


@pytest.mark.parametrize(
    "spelling",
    [
        "sink-recent",
        "sink-recent:",
        "sink-recent:1",
        "sink-recent:1,2,3",
        "sink-recent:-1,2",
        "sink-recent:1,x",
    ],
)
def test_bad_spellings_get_one_clear_line(spelling):
    words = rf"rule '{spelling}': sink-recent takes two whole numbers.*'sink-recent:1,2'"
    with pytest.raises(ValueError, match=words):
        Rule.parse(spelling)


@pytest.mark.parametrize("keys", [(1,), (-1, 2), (1.0, 2), (True, 2), (10**9, 1)])
def test_bad_numbers(keys):
    with pytest.raises(ValueError, match="two whole numbers from 0 to 999999999"):
        SinkRecent(keys)
