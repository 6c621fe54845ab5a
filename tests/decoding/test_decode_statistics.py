from torchlamp.decoding.statistics import DecodeStatistics


def test_calls_add_up_by_site():
    statistics = DecodeStatistics()
    statistics.record("mlp_up", 3, 100)
    statistics.record("lm_head", 1, 1000)
    statistics.record("mlp_up", 1, 300)
    assert statistics.selected == {"mlp_up": 4, "lm_head": 1}
    assert statistics.eligible == {"mlp_up": 400, "lm_head": 1000}
    assert statistics.recompute_rates == {"mlp_up": 0.01, "lm_head": 0.001}
    assert str(statistics) == "mlp_up 1.00%, lm_head 0.10%"


def test_nothing_counted_and_nothing_eligible():
    statistics = DecodeStatistics()
    assert str(statistics) == "nothing counted"
    assert statistics.recompute_rates == {}
    statistics.record("scores", 0, 0)
    assert statistics.recompute_rates == {"scores": 0.0}
    statistics.clear()
    assert statistics == DecodeStatistics()
