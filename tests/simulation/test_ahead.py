import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.simulation.ahead import Ahead, Distances, gram_factor

ROWS = range(4, 9)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


@pytest.mark.parametrize("features", [3, 12, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gram_factor_keeps_the_norms_of_each_heads_block(features, transposed):
    """||L_h^T x|| = ||W_h x||, with fewer features than a head's numbers (a singular Gram matrix), too."""
    heads, size = 3, 5
    weight = randn(heads * size, features).T if transposed else randn(features, heads * size)
    factor = gram_factor(weight, heads)
    assert factor.shape == (heads, size, size)
    x = randn(50, size, seed=1)
    for h in range(heads):
        block = weight[:, h * size : (h + 1) * size]
        torch.testing.assert_close((x @ factor[h]).norm(dim=-1), (x @ block.T).norm(dim=-1))


def direct(probabilities, value, heads, weight=None, scale=None):
    """||W_h (v_j - o)|| / scale in float64, by forming v_j - o; scale None: ||o||."""
    z, v = probabilities.double(), value.double().repeat_interleave(heads // value.shape[0], dim=0)
    away = v[:, None] - (z @ v)[:, :, None]  # heads, rows, keys, size
    if weight is None:
        return away.norm(dim=-1) / (z @ v).norm(dim=-1)[:, :, None]
    blocks = weight.double().view(weight.shape[0], heads, -1).transpose(0, 1)  # heads, features, size
    return torch.einsum("hfs,hrks->hrkf", blocks, away).norm(dim=-1) / scale.double().view(1, -1, 1)


def measured(probabilities, value, heads, ahead, first=0, last=None):
    last = value.shape[1] if last is None else last
    outputs = probabilities @ value[:, first:last].repeat_interleave(heads // value.shape[0], dim=0)
    return Distances(value, heads, ahead).of(probabilities, outputs, first, last, 2, ROWS)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_distances_are_those_of_their_definition(grouping, keys, seed, far):
    heads, key_heads = grouping
    value = randn(key_heads, keys, 6, seed=seed)
    probabilities = (randn(heads, len(ROWS), keys, seed=seed + 1) * 2).softmax(dim=-1)
    weight, scale = (
        randn(11, heads * 6, seed=seed + 2),
        torch.rand(len(ROWS), generator=generator(seed)) + 0.5,
    )
    seen = []
    ahead = Ahead(gram_factor(weight, heads), lambda outputs, *where: seen.append(where) or scale)
    got = measured(probabilities, value, heads, ahead if far else None)
    expected = direct(probabilities, value, heads, *((weight, scale) if far else ()))
    size = float(direct(torch.zeros_like(probabilities), value, heads, weight, scale).max()) if far else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=2e-3 * size)
    assert seen == ([(2, ROWS)] if far else [])


def test_a_tile_sees_a_part_of_the_keys():
    value = randn(2, 12, 6)
    probabilities = randn(4, len(ROWS), 5, seed=1).softmax(dim=-1)
    got = measured(probabilities, value, 4, None, 3, 8)
    torch.testing.assert_close(got, measured(probabilities, value[:, 3:8], 4, None))


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("far", [False, True])
def test_one_key_with_nearly_all_the_weight(rest, far):
    """There ||v||^2 - 2 v.o + ||o||^2 is all rounding error: no more may come out than 1 - z_j allows."""
    value = randn(1, 6, 16, seed=5) * 30 + 7
    probabilities = torch.full((2, len(ROWS), 6), rest / 5)
    probabilities[..., 2] = 1 - rest
    weight, scale = randn(20, 32, seed=6), torch.ones(len(ROWS))
    ahead = Ahead(gram_factor(weight, 2), lambda *_: scale) if far else None
    got = measured(probabilities, value, 2, ahead).double()
    expected = direct(probabilities, value, 2, *((weight, scale) if far else ()))
    norms = (
        direct(torch.zeros_like(probabilities), value, 2, weight, scale) if far else torch.ones(1).double()
    )
    largest = float(norms.max()) * (1 if far else 2)
    # Exactly formed the distance is at most rest * (||v_j|| + max ||v_k||).
    assert (got[..., 2] <= 2.2 * rest * largest).all()
    # And never off by more than the root of a rounding error of the squares.
    assert ((got - expected).abs() <= 1e-3 * largest).all()


def test_a_row_with_one_key_has_no_distance():
    for far in (None, Ahead(gram_factor(randn(20, 12), 2), lambda *_: torch.ones(len(ROWS)))):
        assert not measured(torch.ones(2, len(ROWS), 1), randn(2, 1, 6) * 1e3, 2, far).any()


def test_nothing_to_be_relative_to_is_no_nan():
    zero = measured(torch.full((2, len(ROWS), 3), 1 / 3), torch.zeros(2, 3, 6), 2, None)
    assert not zero.any()
    silent = Ahead(gram_factor(randn(20, 12), 2), lambda *_: torch.zeros(len(ROWS)))
    assert not measured(torch.ones(2, len(ROWS), 1), randn(2, 1, 6), 2, silent).any()
