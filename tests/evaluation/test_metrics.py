import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.evaluation import metrics
from torchlamp.evaluation.metrics import Comparer


def brute_force(reference: torch.Tensor, tested: torch.Tensor, tokens: torch.Tensor):
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (reference, tested))
    kl = [
        sum(math.exp(a) * (a - b) for a, b in zip(p[i].tolist(), q[i].tolist(), strict=True))
        for i in range(len(p))
    ]
    entropy = [[-float(x[i, tokens[i + 1]]) for i in range(len(tokens) - 1)] for x in (p, q)]
    flips = [int(a.argmax()) != int(b.argmax()) for a, b in zip(reference, tested, strict=True)]
    return kl, flips, *entropy


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 9),
    vocabulary=st.integers(2, 60),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    noise=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    chunk=st.sampled_from([1, 7, 100, 1 << 17]),
    seed=st.integers(0, 1000),
)
def test_equals_brute_force_whatever_the_chunks(length, vocabulary, scale, noise, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(length, vocabulary, generator=generator) * scale - 3
    tested = reference + noise * torch.randn(length, vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (length,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK_CPU", chunk)
        comparer = Comparer()
        found = comparer.compare(comparer.reference(reference, tokens), tested)
    kl, flips, entropy, tested_entropy = brute_force(reference, tested, tokens)
    torch.testing.assert_close(found.kl, torch.tensor(kl, dtype=torch.float64), rtol=1e-11, atol=1e-13)
    assert found.flips.tolist() == flips
    for values, expected in ((found.reference_cross_entropy, entropy), (found.cross_entropy, tested_entropy)):
        torch.testing.assert_close(
            values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
    delta = [math.exp(-b) - math.exp(-a) for a, b in zip(entropy, tested_entropy, strict=True)]
    torch.testing.assert_close(found.delta_p, torch.tensor(delta, dtype=torch.float64), rtol=1e-9, atol=1e-13)
    assert float(found.kl.min()) >= -1e-12


def test_tiny_differences_survive_a_large_vocabulary():
    """The second-order value of a KL of about 1e-12, far below what float32 sums could resolve."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 50_000, generator=generator) * 4
    tested = reference.clone()
    tested[:, ::7] += 2.0**-19
    tokens = torch.tensor([1, 2, 3])
    comparer = Comparer()
    found = comparer.compare(comparer.reference(reference, tokens), tested)
    difference = tested.double() - reference.double()
    p = torch.softmax(reference.double(), dim=-1)
    variance = (p * difference**2).sum(-1) - (p * difference).sum(-1) ** 2
    assert float(variance.min()) > 1e-13
    torch.testing.assert_close(found.kl, variance / 2, rtol=1e-2, atol=2e-14)


def test_equal_logits_give_zero():
    logits = torch.randn(4, 33)
    comparer = Comparer()
    found = comparer.compare(comparer.reference(logits, torch.tensor([0, 1, 2, 3])), logits.clone())
    assert float(found.kl.abs().max()) < 1e-14
    assert not found.flips.any()
    assert float(found.delta_p.abs().max()) == 0


def test_tokens_that_the_reference_rules_out_add_nothing():
    reference = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 2.0, 1.0]])
    tested = torch.tensor([[0.5, -math.inf, 1.0], [0.0, 2.5, 1.0]])
    comparer = Comparer()
    found = comparer.compare(comparer.reference(reference, torch.tensor([0, 2])), tested)
    without = (
        torch.log_softmax(reference[0, [0, 2]].double(), -1),
        torch.log_softmax(tested[0, [0, 2]].double(), -1),
    )
    expected = float((without[0].exp() * (without[0] - without[1])).sum())
    assert float(found.kl[0]) == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(float(found.kl[1]))


def test_a_token_ruled_out_by_the_tested_run_alone_is_infinitely_far():
    comparer = Comparer()
    reference = comparer.reference(torch.zeros(2, 3), torch.tensor([0, 1]))
    found = comparer.compare(reference, torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]]))
    assert float(found.kl[0]) == math.inf
    assert float(found.kl[1]) == 0


def test_overflowed_logits_give_nan_and_spoil_no_other_row():
    logits = torch.randn(3, 20)
    broken = logits.clone()
    broken[1] = math.nan
    comparer = Comparer()
    found = comparer.compare(comparer.reference(logits, torch.tensor([0, 1, 2])), broken)
    assert math.isnan(float(found.kl[1]))
    assert float(found.kl[[0, 2]].abs().max()) < 1e-14
