"""A real language model with one site narrow: look-ahead restores what as many recomputations at random don't."""

import pytest

from torchlamp.data.text import cut_windows, default_text
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.models.load import load

pytestmark = pytest.mark.llm


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = load("smollm2-135m")
    return model, cut_windows(tokenizer, [default_text()], 1, 128)


@pytest.mark.parametrize(
    ("policy", "gain"),
    [
        ("values=ps4+running:0.01", 4),
        ("qkv=ps5+strict:0.3", 1.25),
        ("attention_out=ps4+running:0.008", 1.6),
        ("mlp_up=ps5+running:0.009", 3),
        ("mlp_down=ps5+running:0.005", 1.6),
        ("norm=ps3+strict:0.075", 2.5),
        ("lm_head=ps7+running:0.0002", 6),
    ],
)
def test_a_few_recomputed_entries_of_each_site(smollm2, policy, gain):
    """At a rate of at most 5 %: the KL falls by the factor `gain`, and by clearly less with random entries."""
    model, windows = smollm2
    result = evaluate(model, windows, policy)
    by_role = {c.role: c for c in result.comparisons}
    plain, control = by_role["plain"], by_role["random-like"]
    site = policy.partition("=")[0]
    assert list(result.recompute_rate_by_site) == [site]
    assert 0.001 < result.recompute_rate < 0.06
    assert control.recompute_rate == pytest.approx(result.recompute_rate, rel=0.25)
    assert plain.kl_mean / result.kl_mean > gain
    assert plain.kl_mean / control.kl_mean < 0.5 * (1 + gain)


def test_every_site_at_once(smollm2):
    model, windows = smollm2
    rules = {
        "scores": "ps5+running:0.02",
        "values": "ps5+running:0.005",
        "qkv": "ps7+strict:0.3",
        "attention_out": "ps6+running:0.002",
        "mlp_up": "ps7+running:0.002",
        "mlp_down": "ps7+running:0.001",
        "norm": "ps5+strict:0.05",
        "lm_head": "ps9+running:0.001",
    }
    result = evaluate(model, windows, ", ".join(f"{site}={policy}" for site, policy in rules.items()))
    by_role = {c.role: c for c in result.comparisons}
    assert list(result.recompute_rate_by_site) == list(rules)
    assert result.recompute_rate < 0.1
    assert result.kl_mean < by_role["plain"].kl_mean / 1.5
    assert result.kl_mean < by_role["random-like"].kl_mean / 1.4
