"""What must hold for every rule. `CHECKS` is run on every example of every registered rule."""

import pickle
from collections.abc import Callable
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from rule_tiles import causal, generator, random_tile
from torch import Tensor

from torchlamp.rules import REFERENCE_LENGTH, Rule, ThresholdForm, Tile

ANSWERS = ("error", "bridge_error", "exact", "distance", "output_distance")
TENSORS = ("scores", "logits", "probabilities", "visible", "slope", *ANSWERS)


def typical_tiles() -> list[Tile]:
    """Causal, windowed with blind rows, softcap, sink, one row, and without leading dimensions."""
    blind = causal(6, 11)
    blind[2] = False
    blind[4, :9] = False
    return [
        random_tile(2, 3, 5, 9, seed=1),
        random_tile(2, 2, 6, 11, seed=2, visible=blind, spread=6.0),
        random_tile(1, 2, 4, 8, seed=3, softcap=3.0, spread=5.0),
        random_tile(2, 2, 4, 8, seed=4, sinks=torch.tensor([0.5, -1.0]).view(2, 1, 1)),
        random_tile(1, 1, 1, 40, seed=5),
        random_tile(4, 7, seed=6),
    ]


def over(tile: Tile, change: Callable[[Tensor], Tensor], **others: object) -> Tile:
    """The tile with every tensor changed and a fresh generator."""
    changed = {name: change(t) for name, t in tensors(tile).items()}
    return tile.replace(**{"generator": generator(9), **changed, **others})


def tensors(tile: Tile) -> dict[str, Tensor]:
    """All that the tile has."""
    known = [name for name in TENSORS if name not in ANSWERS or tile.knows(name)]
    return {name: t for name in known if (t := getattr(tile, name)) is not None}


def fresh(tile: Tile) -> Tile:
    return tile.replace(generator=generator(9))


def check_selects_visible_entries_only(rule: Rule) -> None:
    for tile in typical_tiles():
        selected = rule.select(tile)
        assert selected.dtype == torch.bool
        assert selected.shape == tile.scores.shape
        assert not (selected & ~tile.visible).any()


def check_leaves_the_tile_alone(rule: Rule) -> None:
    for tile in typical_tiles():
        before = over(tile, Tensor.clone)
        selected = rule.select(tile)
        selected.logical_not_()
        for name, tensor in tensors(tile).items():
            assert torch.equal(tensor, getattr(before, name)), name


def check_blind_rows_get_nothing(rule: Rule) -> None:
    tile = random_tile(2, 2, 3, 5, visible=torch.zeros(3, 5, dtype=torch.bool))
    assert not rule.select(tile).any()


def check_empty_tiles(rule: Rule) -> None:
    for shape in ((2, 3, 4, 0), (2, 3, 0, 5), (0, 3, 4, 5), (2, 0, 4, 5), (0, 0)):
        tile = random_tile(*shape, visible=torch.ones(shape, dtype=torch.bool))
        assert rule.select(tile).shape == shape


def check_single_keys(rule: Rule) -> None:
    tile = random_tile(3, 2, 4, 1, visible=torch.tensor([[True], [False], [True], [True]]))
    selected = rule.select(tile)
    assert selected.shape == (3, 2, 4, 1)
    assert not selected[:, :, 1].any()


def check_batch_makes_no_difference(rule: Rule) -> None:
    for tile in typical_tiles():
        if tile.scores.dim() < 3:
            continue
        together = rule.select(fresh(tile))
        for sample in range(tile.scores.shape[0]):
            alone = rule.select(over(tile, lambda t, s=sample: t[s : s + 1]))
            assert torch.equal(together[sample : sample + 1], alone)


def check_same_seed_same_selection(rule: Rule) -> None:
    for tile in typical_tiles():
        assert torch.equal(rule.select(fresh(tile)), rule.select(fresh(tile)))


def check_rows_are_independent(rule: Rule) -> None:
    if rule.needs_generator:
        return
    for tile in typical_tiles():
        together = rule.select(tile)
        for i in range(tile.scores.shape[-2]):
            assert torch.equal(
                together[..., i, :], rule.select(over(tile, lambda t, i=i: t[..., i : i + 1, :]))[..., 0, :]
            )


def check_hidden_values_make_no_difference(rule: Rule) -> None:
    for tile in typical_tiles():
        expected = rule.select(fresh(tile))
        for junk in (torch.nan, torch.inf, -torch.inf, 1e30):
            hidden = {
                name: t.masked_fill(~tile.visible, junk)
                for name, t in tensors(tile).items()
                if name not in ("probabilities", "visible")
            }
            assert torch.equal(rule.select(fresh(tile).replace(**hidden)), expected)


def check_hidden_keys_make_no_difference(rule: Rule) -> None:
    if rule.needs_generator:
        return
    for tile in typical_tiles():
        padded = over(tile, lambda t: torch.nn.functional.pad(t, (0, 3)))
        assert torch.equal(rule.select(padded)[..., :-3], rule.select(tile))


def check_strides_make_no_difference(rule: Rule) -> None:
    for tile in typical_tiles():
        turned = over(tile, lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2))
        assert torch.equal(rule.select(turned), rule.select(fresh(tile)))


def check_float64(rule: Rule) -> None:
    tile = random_tile(2, 2, 5, 9, dtype=torch.float64)
    assert rule.select(tile).shape == (2, 2, 5, 9)


def check_needs_are_stated(rule: Rule) -> None:
    tile = typical_tiles()[0]
    if rule.needs_generator:
        with pytest.raises(ValueError, match=r"torch\.Generator"):
            rule.select(tile.replace(generator=None))
    asked = []

    def told(name: str) -> Callable[[], Tensor]:
        return lambda: (asked.append(name), getattr(tile, name))[1]

    state = tile.generator.get_state()
    rule.select(tile.replace(**{name: told(name) for name in ANSWERS}))
    assert rule.needs_generator or torch.equal(tile.generator.get_state(), state)
    assert len(asked) == len(set(asked))
    assert ("error" in asked) == ("squares" in rule.byproducts)
    assert ("distance" in asked) == rule.reads_residual_stream
    for name in asked:
        with pytest.raises(ValueError, match=f"the tile has no `{name}`"):
            rule.select(tile.replace(**{name: None}))


def check_spelling_and_value_semantics(rule: Rule) -> None:
    assert Rule.parse(str(rule)) == rule
    assert Rule.parse(rule) is rule
    assert hash(Rule.parse(str(rule))) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert is_dataclass(rule)
    assert len(fields(rule)) <= 1
    for field in fields(rule):
        with pytest.raises(AttributeError):
            setattr(rule, field.name, getattr(rule, field.name))


def check_threshold_form_says_the_same(rule: Rule) -> None:
    form = rule.threshold_form()
    if form is None:
        return
    tiles = typical_tiles() + [
        spoilt(random_tile(2, 2, 5, 9, seed=s, softcap=c)) for s, c in ((7, None), (8, 3.0))
    ]
    for tile in tiles:
        selected = rule.select(over(tile, Tensor.clone))
        counted = read_form(form, tile)
        assert torch.equal(selected, lowest_draws(counted, tile) if form.drawn else counted)


def lowest_draws(counted: Tensor, tile: Tile) -> Tensor:
    """As many visible entries of each row as `counted` has, those with the lowest draws; row by row."""
    shape = tile.scores.shape
    draws = torch.rand((1, *shape[1:]) if len(shape) > 2 else shape, generator=generator(9)).expand(shape)
    chosen = torch.zeros_like(counted)
    for where in np.ndindex(shape[:-1]):
        keys = tile.visible[where].nonzero()[:, 0]
        order = draws[where][keys].sort(stable=True).indices
        chosen[where][keys[order[: counted[where].sum()]]] = True
    return chosen


def spoilt(tile: Tile) -> Tile:
    """With a NaN, an infinity and a negative infinity among the scores of the first sample's last row."""
    scores = tile.scores.clone()
    scores[0, 0, -1, 2], scores[0, 1, -1, 3], scores[1, 0, -1, 4] = torch.nan, torch.inf, -torch.inf
    capped = None if tile.slope is None else 3.0
    spoilt = Tile.from_scores(scores, tile.visible, softcap=capped, error=tile.error, generator=generator(1))
    return spoilt.replace(distance=tile.distance, bridge_error=tile.bridge_error)


def read_form(form: ThresholdForm, tile: Tile) -> Tensor:
    """`ThresholdForm`'s definition, entry by entry in numpy float32."""
    error = tile.bridge_error if form.weight.startswith("bridge") else tile.error
    names = [tile.probabilities, tile.scores, tile.logits, error, tile.slope, tile.visible]
    z, y, logits, r, s, visible = (
        None if t is None else t.numpy().reshape(-1, tile.scores.shape[-1]) for t in names
    )
    one, chosen = np.float32(1), np.zeros(visible.shape, dtype=bool)
    for i, seen in enumerate(visible):
        keys = np.flatnonzero(seen)
        if form.threshold == np.inf or len(keys) == 0:
            continue
        with np.errstate(invalid="ignore"):
            if form.weight == "topz":
                w = z[i, keys]
            elif form.weight == "relaxed":
                e = torch.from_numpy(logits[i, keys] - logits[i, keys].max()).exp().numpy()
                w = e * np.abs(y[i, keys])
            else:
                w = (one - z[i, keys]) * z[i, keys] * np.float32(2)
            if s is not None and form.weight != "topz":
                w = w * s[i, keys]
            if "residual" in form.weight:
                distance = tile.distance.numpy().reshape(z.shape)[i, keys]
                w = mean_response(z[i, keys], r[i, keys] * (one if s is None else s[i, keys])) * distance
            elif form.weight in ("strict", "running", "bridge"):
                w = w * (np.abs(y[i, keys]) if form.weight == "strict" else r[i, keys])
            limit = np.float32(form.threshold)
            if form.weight == "relaxed":
                share = form.threshold
                if form.by_length:
                    share = min(1.0, share * (REFERENCE_LENGTH / len(keys)) ** 0.5)
                limit = np.float32(share) * w.max()
            chosen[i, keys] = ~(w <= limit) | ~np.isfinite(y[i, keys])
    return torch.from_numpy(chosen).view(tile.scores.shape)


def mean_response(z: np.ndarray, change: np.ndarray) -> np.ndarray:
    """m of `RunningResidual` in closed form and float64: z sinh d / (1 + 4 z (1 - z) sinh^2(d / 2))."""
    z, change = z.astype(np.float64), change.astype(np.float64)
    return z * np.sinh(change) / (1 + 4 * z * (1 - z) * np.sinh(change / 2) ** 2)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
