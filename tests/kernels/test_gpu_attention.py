"""Attention for GPUs in Triton's interpreter: against the tile loop in torch, and a model under it."""

import math

import pytest
import torch

from torchlamp import lookahead
from torchlamp.arithmetic import Accumulator
from torchlamp.kernels.attention import fused_attention
from torchlamp.rules import Rule
from torchlamp.simulation.attention import attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BATCH, HEADS, SHARED, QUERIES, KEYS, SIZE, VALUE = 1, 2, 1, 7, 67, 6, 5


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton: pip install 'torchlamp[gpu]'")
    monkeypatch.setenv("TORCHLAMP_KERNELS", "triton")


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(batch=BATCH, heads=HEADS, shared=SHARED, queries=QUERIES):
    query, key = draw(batch, heads, queries, SIZE, seed=0), draw(batch, shared, KEYS, SIZE, seed=1)
    return query * 2, key * 2, draw(batch, shared, KEYS, VALUE, seed=2)


def some_mask():
    mask = torch.rand(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[0, 0, 3] = False
    mask[0, 0, 4, 64:] = False
    return mask


SEEN = {
    "causal": {"causal": True},
    "mask": {"mask": some_mask()},
    "softcap": {"causal": True, "softcap": 5.0},
    "sinks": {"mask": some_mask(), "sinks": draw(HEADS, seed=4)},
    "blocks": {"mask": some_mask(), "blocks": True},
}


@pytest.mark.parametrize(
    ("rule", "seen"),
    [
        *((rule, "softcap") for rule in ("strict:0.1", "running:0.005", "relaxed-length:0.005", "topz:0.05")),
        *(("strict:0.1", seen) for seen in ("mask", "sinks", "blocks")),
        ("none", "causal"),
    ],
)
def test_it_equals_the_tile_loop(monkeypatch, rule, seen):
    call = {"accumulator": Accumulator.parse("ps4"), "rule": Rule.parse(rule), "scaling": 0.4, **SEEN[seen]}
    equals_the_tile_loop(monkeypatch, operands(), call, some=rule != "none")


def test_several_tiles_samples_and_groups_of_heads(monkeypatch):
    call = {"accumulator": Accumulator.parse("ps4"), "rule": Rule.parse("running:0.005"), "scaling": 0.4}
    given = operands(batch=2, heads=4, shared=2, queries=18)
    equals_the_tile_loop(monkeypatch, given, {**call, "causal": True, "blocks": True})


def equals_the_tile_loop(monkeypatch, operands, call, some=True):
    got = attention(*operands, **call)
    monkeypatch.setenv("TORCHLAMP_KERNELS", "torch")
    want = attention(*operands, **call)
    torch.testing.assert_close(got.output, want.output, rtol=1e-5, atol=2e-6)
    for name in ("eligible", "selected", "last_key", "blocks"):
        mine, other = getattr(got, name), getattr(want, name)
        assert (mine is None and other is None) or torch.equal(mine, other), name
    assert bool(want.selected.sum() > 0) == some


def test_transformed_and_stored_operands(monkeypatch):
    query, key, value = operands()
    how = {
        "accumulation": Accumulator.parse("ps4").accumulation,
        "weight": "strict",
        "threshold": 0.1,
        "by_length": False,
        "scaling": 0.4,
        "error_scale": 0.0,
        "mask": None,
        "causal": True,
        "softcap": 4.0,
        "sinks": None,
        "exact_query": query + 0.01,
        "exact_key": key - 0.01,
        "shift": draw(BATCH, HEADS, QUERIES, seed=5),
    }
    got = fused_attention(query, key, value, **how)
    monkeypatch.delenv("TORCHLAMP_KERNELS")
    want = fused_attention(query, key, value, **how)
    if want is None:
        pytest.skip("needs the native extension")
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=2e-6)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_whose_scores_are_not_finite_are_recomputed(monkeypatch, bad):
    query, key, value = operands()
    query[0, 0, 2, 0] = query[0, 1, 5, 0] = bad
    call = {"accumulator": Accumulator.parse("ps4"), "rule": Rule.parse("strict:0.1"), "scaling": 0.4}
    got = attention(query, key, value, causal=True, **call)
    monkeypatch.setenv("TORCHLAMP_KERNELS", "torch")
    want = attention(query, key, value, causal=True, **call)
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.output, want.output, rtol=1e-5, atol=2e-6, equal_nan=True)


def test_a_model_under_a_policy(monkeypatch, tiny):
    model, _ = tiny
    tokens = torch.arange(5)[None] + 3
    runs = {}
    for kernels in ("triton", "torch"):
        monkeypatch.setenv("TORCHLAMP_KERNELS", kernels)
        with lookahead(model, "ps4.center.sort+strict:0.05, mlp_up=ps5+running:0.01") as statistics:
            runs[kernels] = model(tokens).logits, statistics.recompute_rate
    torch.testing.assert_close(*(run[0] for run in runs.values()), rtol=1e-4, atol=1e-5)
    assert runs["triton"][1] == runs["torch"][1] > 0
