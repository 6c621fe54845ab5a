import pytest
import torch
from rule_tiles import random_tile

from torchlamp.rules import Tile


def test_from_scores_is_a_softmax_over_visible_keys():
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(4, 5, dtype=torch.bool).tril(1)
    tile = Tile.from_scores(scores, visible)
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    assert torch.equal(tile.probabilities, expected)
    assert tile.visible.shape == scores.shape
    assert tile.slope is None
    assert tile.logits is scores


def test_from_scores_of_a_blind_row_has_no_probability():
    tile = Tile.from_scores(
        torch.zeros(1, 1, 2, 3), torch.tensor([[True, False, True], [False, False, False]])
    )
    assert tile.probabilities[0, 0].tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_from_scores_with_a_sink_leaves_mass_to_it():
    tile = Tile.from_scores(torch.zeros(1, 2, 1, 3), sinks=torch.tensor([0.0, -torch.inf]).view(2, 1, 1))
    torch.testing.assert_close(tile.probabilities.sum(-1).flatten(), torch.tensor([0.75, 1.0]))


def test_softcap_slope_is_the_derivative_of_the_logits():
    scores = (torch.randn(1, 1, 3, 4, dtype=torch.float64) * 5).requires_grad_()
    tile = Tile.from_scores(scores, softcap=4.0)
    (gradient,) = torch.autograd.grad(tile.logits.sum(), scores)
    torch.testing.assert_close(tile.slope, gradient)


def test_a_tile_moves_as_a_whole():
    tile = random_tile(1, 2, 3, 4, softcap=2.0)
    moved = tile.to("meta")
    for name in ("scores", "logits", "probabilities", "visible", "slope", "error"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.generator is tile.generator
    assert Tile.from_scores(tile.scores).to("meta").slope is None


@pytest.mark.parametrize("name", ["logits", "probabilities", "visible", "slope", "error"])
def test_shapes_must_agree(name):
    tile = random_tile(1, 2, 3, 4, softcap=2.0)
    tensors = {
        n: getattr(tile, n) for n in ("scores", "logits", "probabilities", "visible", "slope", "error")
    }
    tensors[name] = tensors[name][..., :3]
    with pytest.raises(ValueError, match=rf"{name} has shape \(1, 2, 3, 3\), scores \(1, 2, 3, 4\)"):
        Tile(**tensors)


def test_visible_must_be_boolean():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"visible has dtype torch\.float32"):
        Tile(ones, ones, ones, ones)


def test_a_tile_has_rows_and_keys():
    with pytest.raises(ValueError, match=r"\(rows, keys\)"):
        Tile.from_scores(torch.ones(3))
