import math

import torch
from rule_tiles import random_tile, row

from torchlamp.rules import Everything, Nothing, ThresholdForm


def test_nothing_and_everything():
    tile = random_tile(2, 3, 4, 6)
    assert not Nothing().select(tile).any()
    assert torch.equal(Everything().select(tile), tile.visible)


def test_plain_low_precision_stays_plain_when_it_breaks_down():
    tile = row([1.0, math.nan, math.inf])
    assert not Nothing().select(tile).any()
    assert Everything().select(tile).all()


def test_both_have_a_threshold_form():
    assert Nothing().threshold_form() == ThresholdForm("topz", math.inf)
    assert Everything().threshold_form() == ThresholdForm("topz", -1.0)


def test_everything_owns_its_answer():
    visible = torch.ones(1, 1, 1, 5, dtype=torch.bool).expand(1, 2, 3, 5)
    selected = Everything().select(random_tile(1, 2, 3, 5, visible=visible))
    selected[0, 0, 0, 0] = False
    assert int(selected.sum()) == 29
