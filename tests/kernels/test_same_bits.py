"""Every instruction set and the reference of attention give the same bits: sums in sixteen lanes, one exponential."""

import math

import pytest
import torch
from test_fused_attention_kernel import OPTIONS, WEIGHTS, case

from operands import NATIVE
from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import Transform
from torchlamp.decoding.key_value_store import KeyValueStore, StoreOptions
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.huggingface.prepare import prepare
from torchlamp.kernels.attention import fused_attention
from torchlamp.kernels.reference_softmax import exponential, lane_sum, tangent
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.rule import Rule
from torchlamp.simulation.attention import attention

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


RULES = (
    "none",
    "all",
    "strict:0.1",
    "running:0.01",
    "relaxed:0.1",
    "relaxed-length:0.1",
    "topz:0.02",
    "bridge:0.05",
)


@pytest.mark.parametrize("rule", [*RULES, "random-like:strict:0.1"])
@pytest.mark.parametrize("seed", range(3))
def test_the_reference_has_the_same_bits(monkeypatch, rule, seed):
    """The tile loop in torch, where a kernel would serve: softcap, sinks, masks, shifts, rows that see nothing."""
    options = {
        name for i, name in enumerate(("sinks", "softcap", "mask", "operand")) if (seed * 5 + i * 3) % 4 < 2
    }
    options -= {"sinks"} if rule.startswith("relaxed") else set()
    queries, keys = ((40, 40), (70, 90), (3, 150))[seed]
    q, k, v = draw(2, 4, queries, 24), draw(2, 2, keys, 24, seed=1), draw(2, 2, keys, 20, seed=2)
    mask = draw(2, 1, queries, keys, seed=3) > -0.7
    mask[1, :, 1] = False
    quantised = "operand" in options and not rule.startswith("running")

    def run():
        found = attention(
            q,
            k,
            v,
            accumulator=Accumulator.parse("ps4"),
            rule=Rule.parse(rule),
            scaling=0.3,
            mask=mask if "mask" in options else None,
            causal="mask" not in options,
            softcap=3.0 if "softcap" in options else None,
            sinks=draw(4, seed=4) if "sinks" in options else None,
            operand=Operand.parse("int8") if quantised else Operand(),
            transforms=(Transform.parse("center"),),
            blocks=True,
            generator=torch.Generator().manual_seed(seed),
        )
        return found.output, found.selected, found.eligible, found.last_key, found.blocks

    assert_same(on_each(monkeypatch, run, (NATIVE[0], "torch")))


def test_exponentials_and_sums_of_the_reference():
    x = torch.cat(
        [-88.0 * torch.rand(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -87.33])]
    )
    true = x.double().exp()
    assert float(((exponential(x) - true).abs() / true)[x > -87.33].max()) < 2**-23
    assert exponential(torch.tensor([-87.34, -math.inf])).tolist() == [0, 0]
    assert bool(exponential(torch.tensor([math.nan])).isnan())
    y = torch.cat([draw(10_000) * 2, torch.tensor([0.625, -0.625, 20.0])])
    assert float(((tangent(y) - y.double().tanh()) / y.double().tanh()).abs().max()) < 2**-22
    assert tangent(torch.tensor([math.inf, -math.inf, 0.0])).tolist() == [1, -1, 0]
    # Lane by lane, in plain Python.
    numbers, first = draw(1, 50), 5
    lanes = [0.0] * 16
    for place, number in enumerate(numbers[0].tolist(), start=first):
        lanes[place % 16] = float(torch.tensor(lanes[place % 16]) + torch.tensor(number))
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [float(torch.tensor(lanes[i]) + torch.tensor(lanes[i + half])) for i in range(half)]
    assert lane_sum(numbers, first).item() == lanes[0]


@pytest.mark.parametrize("policy", ["ps4+strict:0.1", "ps4.center.sort+running:0.01", "int8+relaxed:0.1"])
def test_an_evaluation(monkeypatch, tiny, policy):
    windows = torch.randint(3, 300, (2, 100), generator=torch.Generator().manual_seed(0))

    def run():
        result = evaluate(tiny[0], windows, policy)
        return torch.tensor(
            [[r.kl_mean, r.recompute_rate, r.perplexity] for r in (result, *result.comparisons)]
        )

    found = on_each(monkeypatch, run, [*NATIVE, "torch"])
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
