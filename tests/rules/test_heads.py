import pytest
import torch
from rule_tiles import causal, random_tile

from torchlamp.rules import Heads, Rule


def test_all_visible_entries_of_the_chosen_heads():
    visible = causal(5, 9)
    visible[2, 3] = False
    for layer, chosen in ((0, [1]), (3, [0, 2]), (1, [])):
        tile = random_tile(2, 3, 5, 9, visible=visible).replace(layer=layer)
        selected = Rule.parse("heads:0.1/3.0/3.2/7.7").select(tile)
        for head in range(3):
            expected = visible if head in chosen else torch.zeros_like(visible)
            assert torch.equal(selected[:, head], expected.expand(2, 5, 9))


def test_a_tile_without_heads_is_head_0():
    tile = random_tile(4, 7)
    assert torch.equal(Rule.parse("heads:0.0").select(tile), tile.visible)
    assert not Rule.parse("heads:0.1").select(tile).any()


def test_values_make_no_difference():
    tile = random_tile(1, 2, 5, 9)
    tile.scores[..., 3] = torch.nan
    assert torch.equal(Rule.parse("heads:0.1").select(tile)[:, 1], tile.visible[:, 1])


def test_spelling_is_sorted_and_says_each_head_once():
    rule = Heads(frozenset({(10, 2), (2, 11), (2, 3)}))
    assert str(rule) == "heads:2.3/2.11/10.2"
    assert Rule.parse("heads:10.2/2.3/2.11/2.3") == rule == Heads([(2, 3), (2, 11), (10, 2)])


@pytest.mark.parametrize(
    "spelling", ["heads", "heads:", "heads:1", "heads:1.2/", "heads:1.2,1.3", "heads:-1.0", "heads:a.b"]
)
def test_bad_spellings_get_one_clear_line(spelling):
    with pytest.raises(ValueError, match=rf"rule '{spelling}': heads takes layer\.head.*'heads:0\.1/3\.0'"):
        Rule.parse(spelling)


@pytest.mark.parametrize("heads", [[], [(-1, 0)], [(0, 10**6)], [(0, 1.5)]])
def test_what_could_not_be_read_back_is_refused(heads):
    with pytest.raises(ValueError, match=r"at least one \(layer, head\), both from 0 to 999999"):
        Heads(frozenset(heads))
