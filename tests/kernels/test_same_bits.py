"""Every instruction set gives the same bits: sums in sixteen lanes whatever the vectors' width, one exponential."""

import pytest
import torch
from test_fused_attention_kernel import OPTIONS, WEIGHTS, case

from operands import NATIVE
from torchlamp.decoding.key_value_store import KeyValueStore, StoreOptions
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.huggingface.prepare import prepare
from torchlamp.kernels.attention import fused_attention
from torchlamp.kernels.specification import Accumulation, Grid

pytestmark = pytest.mark.skipif(len(NATIVE) < 2, reason="one instruction set here")


def on_each(monkeypatch, run, names=NATIVE):
    """What `run` gives on each instruction set."""
    found = []
    for name in names:
        monkeypatch.setenv("TORCHLAMP_KERNELS", name)
        found.append(run())
    return found


def assert_same(found):
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two) or (torch.equal(one.isnan(), two.isnan()) and one.isnan().any())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight", list(WEIGHTS))
@pytest.mark.parametrize("seed", range(6))
def test_attention(monkeypatch, weight, seed):
    options = {name for i, name in enumerate(OPTIONS) if (seed * 37 + i * 11) % 3}
    options -= {"sinks"} if weight == "relaxed" else set()
    keys = (1, 13, 40, 77, 130, 333)[seed]
    q, k, v, arguments = case(
        seed, options, min(keys, 40), keys, weight=weight, threshold=WEIGHTS[weight] / (1 + seed)
    )
    assert_same(
        on_each(
            monkeypatch,
            lambda: fused_attention(q, k, v, Accumulation(Grid(mantissa_bits=4)), **arguments)[:3],
        )
    )


@pytest.mark.parametrize("options", [StoreOptions(8, 8), StoreOptions(4, 8, torch.float32, False, True)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("length", [5, 300, 1300])
def test_a_key_value_store(monkeypatch, options, softcap, length):
    keys, values, q = draw(2, 2, length, 64), draw(2, 2, length, 64, seed=1), draw(2, 6, 1, 64, seed=2)

    def run():
        store = KeyValueStore(options)
        store.append(keys, values)
        attended = store.attend(
            q,
            scaling=0.3,
            scores_threshold=0.001,
            values_threshold=0.003,
            softcap=softcap,
            sinks=draw(6, seed=3),
        )
        return attended.output, torch.tensor([attended.recomputed, attended.full_values])

    assert_same(on_each(monkeypatch, run))


@pytest.mark.parametrize("policy", ["ps4+strict:0.1", "ps4.center.sort+running:0.01", "int8+relaxed:0.1"])
def test_an_evaluation(monkeypatch, tiny, policy):
    windows = torch.randint(3, 300, (2, 100), generator=torch.Generator().manual_seed(0))

    def run():
        result = evaluate(tiny[0], windows, policy)
        return torch.tensor(
            [[r.kl_mean, r.recompute_rate, r.perplexity] for r in (result, *result.comparisons)]
        )

    found = on_each(monkeypatch, run)
    assert_same([[tensor] for tensor in found])
    assert found[0][0, 0] > 0


@pytest.mark.parametrize("prompt", [1, 40])
def test_a_prepared_model(monkeypatch, tiny, prompt):
    """Whole layers, MLPs and the LM head; norms and rotary positions, too.

    Longer prompts are served from low-bit copies on all instruction sets but the portable one, where torch's products
    of many rows are faster (docs/decoding.md).
    """
    names = [name for name in NATIVE if prompt == 1 or name != "portable"]
    ids = torch.randint(3, 300, (2, 60), generator=torch.Generator().manual_seed(0))

    def run():
        with prepare(tiny[0]) as prepared, torch.no_grad():
            cache, parts = prepared.cache(), (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1))
            logits = [tiny[0](part, past_key_values=cache).logits[:, -1] for part in parts]
        return torch.cat(logits), torch.tensor(list(prepared.statistics.rates.values()))

    assert_same(on_each(monkeypatch, run, names))
