import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.arithmetic import Accumulator
from torchlamp.rules import Rule
from torchlamp.simulation.attention import attention
from torchlamp.simulation.blocks import count_blocks, mark_blocks


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.integers(0, 99))
def test_marks_and_counts_against_loops(rows, keys, first, seed):
    generator = torch.Generator().manual_seed(seed)
    total = first + keys + seed % 7
    visible = torch.rand(1, rows, keys, generator=generator) < 0.4
    chosen = visible & (torch.rand(2, rows, keys, generator=generator) < 0.3)
    marks = mark_blocks(visible, chosen, first, total)
    eligible, touched, tall_eligible, tall_touched = set(), set(), set(), set()
    for head in range(2):
        for i in range(rows):
            for j in range(keys):
                block = (first + j) // 16
                if visible[0, i, j]:
                    eligible.add((head, i, block))
                    tall_eligible.add((head, i // 16, block))
                if chosen[head, i, j]:
                    touched.add((head, i, block))
                    tall_touched.add((head, i // 16, block))
    counts = count_blocks(marks[None])
    assert counts.tolist() == [[len(eligible), len(touched)], [len(tall_eligible), len(tall_touched)]]


@pytest.mark.parametrize(
    ("queries", "keys", "kind"), [(40, 40, "causal"), (33, 50, "window"), (1, 17, "none")]
)
def test_native_marks_are_those_of_the_tile_loop(queries, keys, kind, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, queries, 8, generator=generator) * 2
    key, value = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    row, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    mask = {"causal": None, "window": (column <= row) & (column > row - 9), "none": None}[kind]
    arguments = {
        "accumulator": Accumulator.parse("ps3"),
        "rule": Rule.parse("strict:0.2"),
        "scaling": 0.4,
        "mask": None if mask is None else mask[None, None],
        "causal": kind == "causal",
        "blocks": True,
    }
    fast = attention(query, key, value, **arguments)
    monkeypatch.setenv("TORCHLAMP_KERNELS", "torch")
    slow = attention(query, key, value, **arguments)
    assert slow.blocks is not None
    assert torch.equal(fast.blocks, slow.blocks)
    assert 0 < int((slow.blocks == 3).sum()) < slow.blocks.numel()
