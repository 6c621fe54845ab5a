"""`blocks=True`: rates of touched blocks against counts of what an observer sees."""

import pytest
import torch

from torchlamp.huggingface.lookahead import attach, detach, lookahead


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Blocks:
    """Blocks that hold a visible, or a chosen, score: sets of their numbers, 1 x 16 and 16 x 16."""

    def __init__(self):
        self.eligible, self.touched = [set(), set()], [set(), set()]
        self.entries = [0, 0]
        self.call = 0

    def observe(self, layer, seen):
        for which, (mask, found) in enumerate(
            ((seen.tile.visible, self.eligible), (seen.chosen, self.touched))
        ):
            self.entries[which] += int(mask.sum())
            for _, head, row, key in mask.nonzero().tolist():
                query, block = seen.rows.start + row, (seen.first_key + key) // 16
                at = (self.call, layer, seen.sample, head)
                found[0].add((*at, query, block))
                found[1].add((*at, query // 16, block))

    @property
    def counts(self):
        return [[len(e), len(t)] for e, t in zip(self.eligible, self.touched, strict=True)]

    @property
    def rates(self):
        entry = self.entries[1] / self.entries[0]
        rows, tiles = (touched / eligible for eligible, touched in self.counts)
        return {"entry": entry, "row_block_16": rows, "tile_16x16": tiles}


@pytest.mark.parametrize("rule", ["strict:0.4", "running-residual:0.02", "random:0.01"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_block_rates_are_those_that_an_observer_counts(build, name, rule, tokens):
    """Two calls, longer than a tile, with padding in the second; Gemma's sliding windows."""
    model = build(name)
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1, :9] = 0
    calls = [{"input_ids": tokens(1, 90)}, {"input_ids": tokens(2, 37, 1), "attention_mask": mask}]
    with lookahead(model, f"ps3+{rule}", seed=1, blocks=True) as statistics:
        for call in calls:
            model(**call)
    blocks = Blocks()
    with lookahead(model, f"ps3+{rule}", seed=1, blocks=True, observe=blocks.observe) as observed:
        for blocks.call, call in enumerate(calls):
            model(**call)
    assert blocks.entries == [observed.eligible, observed.selected]
    assert observed.block_counts.tolist() == blocks.counts
    assert observed.block_rates == pytest.approx(blocks.rates)
    assert 0 < observed.block_rates["entry"] < observed.block_rates["row_block_16"]
    assert observed.block_rates["row_block_16"] < observed.block_rates["tile_16x16"] <= 1
    # Without an observer the native kernel counts; an entry at the threshold may be decided otherwise.
    assert statistics.block_counts[:, 0].tolist() == observed.block_counts[:, 0].tolist()
    assert statistics.block_rates == pytest.approx(blocks.rates, rel=0.02)


@pytest.mark.parametrize(("rule", "rate"), [("none", 0.0), ("all", 1.0)])
def test_ends(build, rule, rate, tokens):
    with lookahead(model := build("llama"), f"ps4+{rule}", blocks=True) as statistics:
        model(tokens(2, 21))
    assert statistics.block_rates == {"entry": rate, "row_block_16": rate, "tile_16x16": rate}
    # 2 layers x 2 samples x 4 heads; 16 rows with one block of keys and 5 with two; three tiles under the diagonal.
    assert statistics.block_counts[:, 0].tolist() == [16 * (16 + 2 * 5), 16 * 3]


def test_other_sites_count_no_blocks(build, tokens):
    model = build("llama")
    with lookahead(model, "values=ps4+all, mlp_up=ps4+all", blocks=True) as statistics:
        model(tokens(1, 20))
    assert statistics.block_rates == {}
    policy = "scores=ps3+strict:0.3, values=ps23+all, mlp_up=ps23+all"
    with lookahead(model, policy, blocks=True, layers=[1]) as statistics:
        model(tokens(1, 20))
    assert statistics.block_rates["entry"] == statistics.by_site["scores"] < statistics.recompute_rate
    assert int(statistics.block_counts[0, 0]) == 4 * (16 + 2 * 4)


def test_empty_without_being_asked_for_and_after_a_reset(build, tokens):
    model = build("llama")
    with lookahead(model, "ps4+strict:0.1") as statistics:
        model(tokens(1, 20))
    assert statistics.block_rates == {}
    statistics = attach(model, "ps4+strict:0.1", blocks=True)
    model.set_attn_implementation("lamp")
    assert statistics.block_rates == {}
    model(tokens(1, 20))
    once = statistics.block_counts
    assert statistics.block_rates
    statistics.reset()
    assert statistics.block_rates == {}
    for _ in range(2):
        model(tokens(1, 20))
    assert torch.equal(statistics.block_counts, 2 * once)
    detach(model)
