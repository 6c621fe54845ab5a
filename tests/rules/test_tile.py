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


def test_an_answer_is_computed_when_first_asked_and_once():
    calls = []

    def error():
        calls.append("error")
        return torch.ones(2, 3)

    tile = Tile.from_scores(torch.zeros(2, 3)).replace(error=error)
    assert tile.knows("error")
    assert calls == []
    assert torch.equal(tile.error, torch.ones(2, 3))
    assert tile.error is tile.error
    assert calls == ["error"]


def test_an_answer_moves_without_being_computed():
    calls = []
    tile = Tile.from_scores(torch.zeros(2, 3)).replace(exact=lambda: calls.append(1) or torch.ones(2, 3))
    moved = tile.to("meta")
    assert calls == []
    assert moved.exact.device.type == "meta"


def test_a_computed_answer_has_the_shape_of_the_scores():
    tile = Tile.from_scores(torch.zeros(2, 3)).replace(exact=lambda: torch.ones(3))
    with pytest.raises(ValueError, match=r"exact has shape \(3,\), scores \(2, 3\)"):
        _ = tile.exact


def test_an_unknown_answer_and_an_unknown_name_are_refused():
    tile = Tile.from_scores(torch.zeros(2, 3))
    assert not tile.knows("condition")
    with pytest.raises(ValueError, match="the tile has no `condition`"):
        _ = tile.condition
    with pytest.raises(TypeError, match="a tile has no 'erorr': it has"):
        tile.replace(erorr=tile.scores)
