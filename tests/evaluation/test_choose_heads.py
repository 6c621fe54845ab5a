import pytest
import torch

from torchlamp import evaluate
from torchlamp.evaluation.heads import choose_heads
from torchlamp.rules import Heads, Rule


def windows(seed):
    return torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(seed))


def test_the_choice_fits_the_rate_and_beats_the_heads_left_over(tiny):
    model, _ = tiny
    rule = choose_heads(model, windows(0), "ps3", 0.4)
    assert 1 <= len(rule.heads) <= 0.4 * 8
    others = Heads(frozenset((layer, head) for layer in range(2) for head in range(4)) - rule.heads)
    left = Heads(frozenset(sorted(others.heads)[: len(rule.heads)]))
    chosen = evaluate(model, windows(1), f"ps3+{rule}", baselines=False)
    worse = evaluate(model, windows(1), f"ps3+{left}", baselines=False)
    assert chosen.recompute_rate == pytest.approx(len(rule.heads) / 8)
    assert chosen.kl_mean < worse.kl_mean


def test_at_least_one_head_and_a_spelling_that_reads_back(tiny):
    rule = choose_heads(tiny[0], windows(0), "ps4", 0.001)
    assert len(rule.heads) == 1
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_a_rate_out_of_range(tiny, rate):
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_heads(tiny[0], windows(0), "ps4", rate)
