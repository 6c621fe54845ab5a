import zlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.policy.sites import SITES
from torchlamp.simulation.statistics import Statistics

LAYERS, HEADS = 3, 2


def calls(seed, count):
    """Random attention calls: (layer, eligible, selected, positions)."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    for _ in range(count):
        batch, queries = int(integers(1, 4, 1)), int(integers(1, 6, 1))
        eligible = integers(0, 4, batch, 1, queries).expand(-1, HEADS, -1)
        selected = (integers(0, 4, batch, HEADS, queries)).minimum(eligible)
        positions = integers(-2, 40, batch, queries)
        yield int(integers(0, LAYERS, 1)), eligible, selected, positions


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_sums_against_counting_one_by_one(seed, count):
    stats = Statistics()
    eligible_at = {}
    selected_at = {}
    rows_at = {}
    touched_at = {}
    last_layer = -1
    for layer, eligible, selected, positions in calls(seed, count):
        stats.record("scores", layer, selected, eligible, positions)
        last_layer = max(last_layer, layer)
        for b in range(eligible.shape[0]):
            for h in range(HEADS):
                for i in range(eligible.shape[2]):
                    key = (layer, h, max(0, int(positions[b, i])))
                    seen = int(eligible[b, h, i])
                    if seen:
                        eligible_at[key] = eligible_at.get(key, 0) + seen
                        selected_at[key] = selected_at.get(key, 0) + int(selected[b, h, i])
                        rows_at[key] = rows_at.get(key, 0) + 1
                        touched_at[key] = touched_at.get(key, 0) + int(selected[b, h, i] > 0)

    def total(table, layer=None, head=None, position=None):
        wanted = (layer, head, position)
        return sum(v for k, v in table.items() if all(w in (None, p) for w, p in zip(wanted, k, strict=True)))

    def rate(part, whole, **where):
        return total(part, **where) / total(whole, **where) if total(whole, **where) else 0.0

    assert stats.eligible == total(eligible_at)
    assert stats.selected == total(selected_at)
    assert stats.rows == total(rows_at)
    assert stats.recompute_rate == rate(selected_at, eligible_at)
    assert stats.rows_touched == rate(touched_at, rows_at)
    assert stats.by_layer == [rate(selected_at, eligible_at, layer=n) for n in range(last_layer + 1)]
    for n, by_head in enumerate(stats.by_head):
        assert by_head == [rate(selected_at, eligible_at, layer=n, head=h) for h in range(len(by_head))]
        assert stats.head_counts(n).touched.tolist() == [total(touched_at, n, h) for h in range(HEADS)]
    positions = max((k[2] for k in rows_at), default=-1) + 1
    assert stats.by_position == [rate(selected_at, eligible_at, position=p) for p in range(positions)]
    for n in range(last_layer + 1):
        counts = stats.position_counts(n)
        assert counts.rows.tolist() == [total(rows_at, n, None, p) for p in range(len(counts.rows))]
        assert int(counts.selected.sum()) == total(selected_at, n)


def test_nothing_ran():
    stats = Statistics()
    assert (stats.recompute_rate, stats.rows_touched, stats.by_layer, stats.by_head) == (0.0, 0.0, [], [])
    assert stats.by_position == []
    assert "0 of 0 scores" in str(stats)


def test_memory_does_not_grow_with_calls():
    stats = Statistics()
    one = torch.ones(1, HEADS, 1, dtype=torch.int64)
    for step in range(1000):
        stats.record("scores", 0, one, one, torch.tensor([[step % 10]]))
    assert stats.eligible == 2000
    assert stats.position_counts().rows.tolist() == [200] * 10
    assert stats._positions["scores", 0].rows.numel() < 64


def test_reset_and_reading_is_not_writing():
    stats = Statistics(seed=3)
    one = torch.ones(1, HEADS, 1, dtype=torch.int64)
    stats.record("scores", 1, one, one, torch.tensor([[4]]))
    stats.head_counts(1).selected.zero_()
    stats.position_counts(1).selected.zero_()
    assert stats.by_layer == [0.0, 1.0]
    assert stats.by_position == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert "100.000% (2 of 2 scores), rows touched 100.00%, 2 layers" in str(stats)
    assert str(stats) in repr(stats)
    assert repr(stats).splitlines()[-1].split() == ["scores", "100.000%", "2", "2", "100.00%"]
    assert "<td" in stats._repr_html_()
    stats.reset()
    assert (stats.eligible, stats.by_layer, stats.seed) == (0, [], 3)


def test_generators_differ_by_seed_layer_and_step_and_repeat():
    def draw(seed, layer, step):
        return torch.rand(3, generator=Statistics(seed=seed).generator(layer, step)).tolist()

    places = [(seed, layer, step) for seed in (0, 1, -5) for layer in (0, 1) for step in (0, 1, 8192)]
    drawn = {tuple(draw(*place)) for place in places}
    assert len(drawn) == len(places)
    assert draw(0, 1, 2) == draw(0, 1, 2)


def test_sites_are_counted_apart_and_together():
    stats = Statistics()
    one = torch.ones(1, 2, 3, dtype=torch.int64)
    stats.record("scores", 0, one, 4 * one, torch.arange(3)[None])
    stats.record("mlp_up", 1, 5 * one[:, :1], 10 * one[:, :1], torch.arange(3)[None])
    stats.record("lm_head", -1, 0 * one[:, :1], 100 * one[:, :1], torch.arange(3)[None])
    assert stats.sites == ["scores", "mlp_up", "lm_head"]
    assert stats.rates == stats.by_site == stats.recompute_rates
    assert stats.rates == {"scores": 0.25, "mlp_up": 0.5, "lm_head": 0.0}
    assert stats.site_counts("mlp_up").table.tolist() == [[30], [15], [3], [3]]
    assert stats.site_counts("qkv").table.tolist() == [[0]] * 4
    # The LM head belongs to no layer, but to the whole.
    assert (stats.layers, stats.by_layer) == (2, [0.25, 0.5])
    assert (stats.eligible, stats.selected, stats.rows) == (24 + 30 + 300, 6 + 15, 6 + 3 + 3)
    assert stats.recompute_rate == 21 / 354
    assert stats.rows_touched == 9 / 12
    assert stats.by_head == [[0.25, 0.25], [0.0, 0.0]]
    assert stats.position_counts(site="mlp_up").eligible.tolist() == [10, 10, 10]
    assert stats.position_counts().eligible.tolist() == [118, 118, 118]
    assert stats.layer_counts(-1).eligible.tolist() == [300]
    stats.reset()
    assert (stats.rates, stats.by_layer, stats.recompute_rate) == ({}, [], 0.0)


def test_generators_of_sites_differ_and_repeat():
    draws = {site: torch.rand(1, generator=Statistics(seed=3).generator(1, 5, site)).item() for site in SITES}
    assert len(set(draws.values())) == len(SITES)
    assert draws["scores"] == torch.rand(1, generator=Statistics(seed=3).generator(1, 5)).item()


def test_a_generator_depends_on_the_name_of_its_site_and_not_on_its_place():
    """The seed is a formula of the name, so that a new site leaves the draws of the others alone."""
    mixed = 3 * 0x9E3779B97F4A7C15 + 0xBF58476D1CE4E5B9 + 5 * 0x94D049BB133111EB
    mixed += zlib.crc32(b"mlp_up") * 0xD6E8FEB86659FD93
    expected = torch.Generator().manual_seed(mixed % 2**63)
    assert Statistics(seed=3).generator(1, 5, "mlp_up").initial_seed() == expected.initial_seed()


def test_plain_sums_add_up_by_site_and_layer():
    stats = Statistics()
    stats.record("mlp_up", 0, 3, 100)
    stats.record("lm_head", -1, 1, 1000)
    stats.record("mlp_up", 1, 1, 300)
    assert stats.rates == {"mlp_up": 0.01, "lm_head": 0.001}
    stats.record("mlp_up", 1, 4, 100)
    assert stats.by_layer == [0.03, 0.0125]
    assert (stats.selected, stats.eligible, stats.rows, stats.by_position) == (9, 1500, 0, [])
    assert stats.site_counts("mlp_up").table.tolist() == [[500], [8], [0], [0]]
    assert str(stats) == "mlp_up 1.60%, lm_head 0.10%"
    stats.reset()
    assert stats.rates == {}
    stats.record("scores", 0, 0, 0)
    assert stats.rates == {"scores": 0.0}


def test_plain_sums_join_the_counts_of_heads():
    stats = Statistics()
    one = torch.ones(1, HEADS, 1, dtype=torch.int64)
    stats.record("scores", 0, one, 4 * one, torch.tensor([[0]]))
    stats.record("scores", 0, 1, 2)
    assert stats.rates == {"scores": 0.3}
    assert stats.rows == HEADS
    stats.record("values", 0, one, one)
    assert stats.position_counts(site="values").rows.tolist() == []
    assert stats.head_counts(0, "values").rows.tolist() == [1, 1]


def test_draws_do_not_depend_on_the_order_of_the_sites(monkeypatch):
    def draws():
        return {site: torch.rand(3, generator=Statistics().generator(0, 0, site)).tolist() for site in SITES}

    before = draws()
    assert len({tuple(drawn) for drawn in before.values()}) == len(SITES)
    monkeypatch.setattr("torchlamp.simulation.statistics.SITES", ("a new one", *reversed(SITES)))
    assert draws() == before
