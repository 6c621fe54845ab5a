import pytest
import torch
from scalar_oracle import products as oracle

from operands import KINDS, draw, same_bits
from torchlamp.kernels import recompute as module
from torchlamp.kernels import reference
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.specification import Accumulation, Grid

FLOAT32 = Accumulation(Grid())


def with_scaling(products, scaling):
    return products if scaling is None else products * torch.tensor(scaling, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", [None, 0.0721687836])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_marked_entries_equal_the_scalar_oracle_and_the_others_stay(implementation, kind, scaling, rate):
    a, b = draw(kind, 4, 6, 13), draw(kind, 2, 13, 21, seed=1)
    scores = draw("special", 4, 6, 21, seed=2)
    mask = torch.rand(4, 6, 21, generator=torch.Generator().manual_seed(3)) < rate
    want = torch.where(mask, with_scaling(oracle(a, b, FLOAT32)[0], scaling), scores)
    recompute(scores, a, b, mask, scaling)
    assert same_bits(scores, want)


@pytest.mark.parametrize("depth", [0, 1, 3, 64])
def test_depths(implementation, depth):
    a, b = draw("wide", 2, 3, depth), draw("wide", 1, depth, 19, seed=1)
    scores = torch.full((2, 3, 19), 7.0)
    recompute(scores, a, b, torch.ones(2, 3, 19, dtype=torch.bool))
    assert same_bits(scores, oracle(a, b, FLOAT32)[0])


def test_strides_of_operands_scores_and_mask(implementation):
    a, b = draw("wide", 4, 5, 7), draw("wide", 2, 7, 9, seed=1)
    want = oracle(a, b, FLOAT32)[0]
    row_mask = torch.tensor([True, False, True, True, False, False, True, False, True])
    mask = row_mask.expand(4, 5, 9)
    want = torch.where(mask, want, 0.0)
    column_major = b.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.zeros(4, 5, 14)[..., ::2].copy_(a)
    wide_scores = torch.zeros(4, 5, 12)
    for x, y, scores in [
        (a, column_major, torch.zeros(4, 5, 9)),
        (spread, b, torch.zeros(5, 4, 9).transpose(0, 1)),
        (spread, column_major, wide_scores[..., 1:10]),
        (a, b, torch.zeros(4, 9, 5).transpose(1, 2)),
    ]:
        recompute(scores, x, y, mask)
        assert same_bits(scores.contiguous(), want)
    assert (wide_scores[..., [0, 10, 11]] == 0).all()
    mask_by_column = mask.transpose(1, 2).contiguous().transpose(1, 2)
    scores = torch.zeros(4, 5, 9)
    recompute(scores, a, b, mask_by_column)
    assert same_bits(scores, want)


def test_results_depend_neither_on_threads_nor_on_batch_nor_on_slabs(implementation, monkeypatch):
    a, b = draw("wide", 6, 17, 19), draw("wide", 2, 19, 43, seed=1)
    mask = torch.rand(6, 17, 43, generator=torch.Generator().manual_seed(3)) < 0.2
    want = torch.zeros(6, 17, 43)
    recompute(want, a, b, mask, 0.3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            scores = torch.zeros(6, 17, 43)
            recompute(scores, a, b, mask, 0.3)
            assert same_bits(scores, want)
    finally:
        torch.set_num_threads(before)
    for g in range(6):
        scores = torch.zeros(1, 17, 43)
        recompute(scores, a[g : g + 1], b[g // 3 : g // 3 + 1], mask[g : g + 1], 0.3)
        assert same_bits(scores[0], want[g])
    monkeypatch.setattr(reference, "_SLAB_ENTRIES_CPU", 1)
    scores = torch.zeros(6, 17, 43)
    recompute(scores, a, b, mask, 0.3)
    assert same_bits(scores, want)


def test_nothing_to_do(implementation):
    for groups, rows, columns in [(0, 2, 3), (2, 0, 3), (2, 2, 0)]:
        scores = torch.zeros(groups, rows, columns)
        a, b = torch.ones(groups, rows, 4), torch.ones(min(groups, 1), 4, columns)
        recompute(scores, a, b, torch.ones(groups, rows, columns, dtype=torch.bool))
        assert scores.shape == (groups, rows, columns)


def test_lazily_negated_operands_and_scores(implementation):
    negated = torch.complex(torch.zeros(1, 3, 4), torch.randn(1, 3, 4)).conj().imag
    plain, b = negated.resolve_neg(), draw("wide", 1, 4, 5)
    mask = torch.rand(1, 3, 5) < 0.5
    want = torch.ones(1, 3, 5)
    recompute(want, plain, b, mask)
    scores = torch.complex(torch.zeros(1, 3, 5), -torch.ones(1, 3, 5)).conj().imag
    assert negated.is_neg()
    assert scores.is_neg()
    recompute(scores, negated, b, mask)
    assert torch.equal(scores, want)


def test_misfits_are_refused():
    scores, a, b = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(1, 4, 5)
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*don't fit"):
        recompute(scores, a, b, mask[:, :2])
    with pytest.raises(TypeError, match=r"bool mask, got .*torch\.float32$"):
        recompute(scores, a, b, mask.float())
    with pytest.raises(TypeError, match=r"torch\.float64"):
        recompute(scores, a.double(), b, mask)


def test_a_device_without_float64_is_served_by_the_cpu(monkeypatch):
    a, b = draw("wide", 2, 3, 5), draw("wide", 1, 5, 7, seed=1)
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    want, scores = torch.zeros(2, 3, 7), torch.zeros(2, 3, 7)
    recompute(want, a, b, mask)
    seen = []

    class Once(frozenset):
        """Holds every device when first asked, none afterwards, as if the copies were on the CPU."""

        def __contains__(self, device):
            seen.append(device)
            return len(seen) == 1

    monkeypatch.setattr(module, "WITHOUT_FLOAT64", Once())
    recompute(scores, a, b, mask)
    assert same_bits(scores, want)
    assert len(seen) == 2
