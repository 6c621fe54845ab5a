"""The kernels for GPUs in Triton's interpreter, through the dispatch, against the references in torch."""

import pytest
import torch

from operands import KINDS, draw, same_bits
from torchlamp.arithmetic import Accumulator
from torchlamp.kernels.dispatch import gpu_for
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.reference import products_reference, recompute_reference

# The interpreter computes in numpy, which warns of infinities; the kernels are meant to meet them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FORMS = [
    "ps4",
    "ps22",
    "fp32",
    "ps4/unfused",
    "ps7/block4",
    "ps13/promote5",
    "e4m3fn",
    "e4m3fn-flush",
    "e4m3fnuz",
    "ue5m3/block3",
    "ps4-sat",
    "volta",
    "hopper-fp8",
    "hopper-fp8/promote8",
    "fuse4/10/nearest",
]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton: pip install 'torchlamp[gpu]'")
    monkeypatch.setenv("TORCHLAMP_KERNELS", "triton")


@pytest.mark.parametrize("spelling", FORMS)
def test_products_and_squares_equal_the_reference(spelling):
    accumulation = Accumulator.parse(spelling).accumulation
    for kind, causal in zip(KINDS, (None, 2, None, -1, 0, None), strict=False):
        a, b = draw(kind, 2, 4, 11), draw(kind, 1, 11, 7, seed=1)
        assert gpu_for(a, b)
        scaling = 0.0721687836 if causal is None else None
        got = products(a, b, accumulation, scaling=scaling, causal=causal, squares=True)
        want = products_reference(a, b, accumulation, scaling=scaling, causal=causal, squares=True)
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])


def test_more_than_a_tile_and_any_strides():
    a, b = draw("wide", 2, 17, 3), draw("wide", 2, 66, 3, seed=1).transpose(1, 2)
    accumulation = Accumulator.parse("ps4").accumulation
    for causal in (None, 40):
        got, _ = products(a[:, ::2], b, accumulation, causal=causal)
        assert same_bits(got, products_reference(a[:, ::2], b, accumulation, causal=causal)[0])


@pytest.mark.parametrize(("rows", "depth", "columns"), [(0, 3, 2), (2, 0, 3), (1, 1, 1)])
def test_empty_and_single(rows, depth, columns):
    a, b = draw("wide", 1, rows, depth), draw("wide", 1, depth, columns)
    accumulation = Accumulator.parse("ps4").accumulation
    assert same_bits(products(a, b, accumulation)[0], products_reference(a, b, accumulation)[0])


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_recomputed_entries_equal_the_reference(share):
    for kind in KINDS:
        a, b = draw(kind, 4, 3, 7), draw(kind, 2, 7, 9, seed=1)
        mask = torch.rand(4, 3, 9, generator=torch.Generator().manual_seed(0)) < share
        got, want = torch.ones(4, 3, 9), torch.ones(4, 3, 9)
        recompute(got, a, b, mask, 0.3)
        recompute_reference(want, a, b, mask, 0.3)
        assert same_bits(got, want)


def test_they_serve_the_cpu_only_where_it_is_asked_for(monkeypatch):
    x = torch.zeros(1)
    assert gpu_for(x, None)
    assert not gpu_for(x, torch.zeros(1, dtype=torch.float64))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not gpu_for(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("TORCHLAMP_KERNELS")
    assert not gpu_for(x)
