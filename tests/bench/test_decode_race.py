"""The race of decoders: its KL is evaluation's, against the first contestant's logits of the same steps."""

import torch

from torchlamp.bench.decode import REFERENCE, STEPS, race

CONTEXT, VOCABULARY = 3, 11


class Recorded:
    """A contestant that hands out logits which were drawn before."""

    def __init__(self, logits):
        self.logits, self.read = logits, []

    def prefill(self, tokens):
        assert len(tokens) == CONTEXT

    def step(self, token):
        self.read.append(token)
        return self.logits[len(self.read) - 1]

    def close(self):
        pass


def test_kl_of_every_step():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (CONTEXT + STEPS,), generator=generator)
    reference = 3 * torch.randn(STEPS, VOCABULARY, generator=generator)
    other = reference + 0.1 * torch.randn(STEPS, VOCABULARY, generator=generator)
    first, second = Recorded(reference), Recorded(other)
    steps = race({REFERENCE: lambda: first, "other": lambda: second}, tokens, CONTEXT)
    assert first.read == second.read == tokens[CONTEXT:].tolist()
    p, q = (x.double().log_softmax(-1) for x in (reference, other))
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(
        torch.tensor(steps["other"].kl, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12
    )
    assert max(map(abs, steps[REFERENCE].kl)) < 1e-12
    assert expected.min() > 1e-5
