import pytest
import torch

from torchlamp.simulation.visibility import Visibility, visibility, window

SHAPE = (2, 4, 3, 5)
LOWEST = torch.finfo(torch.float32).min


def test_no_mask():
    assert visibility(None, shape=SHAPE, causal=True) == Visibility(causal=True)
    assert visibility(None, shape=SHAPE, causal=False) == Visibility(causal=False)
    assert visibility(None, shape=(2, 4, 1, 5), causal=True) == Visibility(causal=False)


@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (1, 1, 3, 5), (2, 4, 3, 5), (2, 1, 1, 5), (1, 1, 1, 1)])
def test_boolean(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = visibility(mask, shape=SHAPE, causal=True)
    assert not seen.causal
    assert seen.bias is None
    assert torch.equal(seen.mask.expand(SHAPE), mask.expand(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", ["lowest", "infinite"])
def test_additive(dtype, hidden):
    low = torch.finfo(dtype).min if hidden == "lowest" else -torch.inf
    keep = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = torch.where(keep, 0.0, torch.tensor(low, dtype=dtype))
    seen = visibility(mask.to(dtype), shape=SHAPE, causal=True)
    assert torch.equal(seen.mask, keep)
    assert seen.bias is None
    biased = torch.where(keep, torch.tensor(-0.5, dtype=dtype), mask.to(dtype))
    seen = visibility(biased, shape=SHAPE, causal=True)
    assert torch.equal(seen.mask, keep)
    assert seen.bias.dtype == torch.float32
    assert torch.equal(seen.bias, torch.where(keep, -0.5, 0.0))


def test_bad_masks():
    with pytest.raises(ValueError, match=r"shape \(3, 5\)"):
        visibility(torch.ones(3, 5, dtype=torch.bool), shape=SHAPE, causal=True)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 5\)"):
        visibility(torch.ones(2, 1, 3, 6, dtype=torch.bool), shape=SHAPE, causal=True)
    with pytest.raises(TypeError, match="int64"):
        visibility(torch.ones(2, 1, 3, 5, dtype=torch.int64), shape=SHAPE, causal=True)
    with pytest.raises(TypeError, match="list"):
        visibility([1], shape=SHAPE, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_window_is_the_tightest_range_and_keeps_the_mask(causal, heads):
    keys, queries = 40, 30
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, heads, queries, keys, generator=generator) < 0.05
    mask[1, :, 8:16] = False
    full = mask & torch.ones(queries, keys, dtype=torch.bool).tril() if causal else mask
    seen = Visibility(mask, causal)
    for sample in range(2):
        for start in range(0, queries, 8):
            rows = range(start, min(start + 8, queries))
            found = window(seen, sample, rows, keys, torch.device("cpu"))
            wanted = full[sample, :, start : rows.stop]
            rebuilt = torch.zeros_like(wanted)
            if found.last > found.first:
                visible = True if found.visible is None else found.visible
                rebuilt[..., found.first : found.last] = visible
            assert torch.equal(rebuilt, wanted)
            if not causal and wanted.any():
                columns = wanted.any(dim=0).any(dim=0).nonzero()
                assert (found.first, found.last) == (int(columns[0]), int(columns[-1]) + 1)


def test_causal_tiles_stop_at_the_diagonal():
    found = window(Visibility(causal=True), 0, range(64, 128), 1000, torch.device("cpu"))
    assert (found.first, found.last) == (0, 128)
    assert found.visible.shape == (1, 64, 128)
    decode = window(Visibility(), 0, range(0, 1), 1000, torch.device("cpu"))
    assert (decode.first, decode.last, decode.visible) == (0, 1000, None)
