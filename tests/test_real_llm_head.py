"""A real language model's LM head from low-bit copies: the winners over real text are those of full precision."""

import pytest
import torch

from torchlamp.data.text import cut_windows, default_text
from torchlamp.decoding.head import LowBitHead
from torchlamp.models.load import load

pytestmark = pytest.mark.llm


@pytest.fixture(scope="module")
def head_and_states():
    """The head's weight, and the hidden states of a few hundred tokens of text."""
    model, tokenizer = load("smollm2-135m")
    windows = cut_windows(tokenizer, [default_text()], 2, 256)
    with torch.no_grad():
        states = model.model(windows).last_hidden_state
    return model.lm_head.weight, states.flatten(0, 1)


@pytest.mark.parametrize(("bits", "most"), [(4, 1.0), (8, 0.002), (12, 0.0001)])
def test_the_largest_logits_of_real_text_are_those_of_full_precision(head_and_states, bits, most):
    weight, states = head_and_states
    head = LowBitHead.pack(weight, bits)
    exact = states.double() @ weight.detach().double().T
    for top in (1, 5):
        recomputed = 0
        for part, want in zip(states.split(64), exact.split(64), strict=True):
            got, count, _ = head.run(part, float("inf"), top)
            recomputed += count
            assert torch.equal(got.topk(top).indices, want.topk(top).indices)
            torch.testing.assert_close(
                got.topk(top).values.double(), want.topk(top).values, rtol=1e-5, atol=1e-4
            )
        print(f"int{bits}, top {top}: {recomputed / len(states):.1f} of {len(weight)} rows a token")
        assert recomputed < top * most * exact.numel()
