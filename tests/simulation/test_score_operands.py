"""Scores of transformed and quantised operands against the plain product, and what they gain."""

import itertools

import pytest
import torch

from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import quantise
from torchlamp.arithmetic.tender import Ranges
from torchlamp.arithmetic.transforms import TRANSFORMS, Transform
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.rules import Rule
from torchlamp.simulation.attention import attention
from torchlamp.simulation.attention_call import Observation
from torchlamp.simulation.score_operands import score_operands

pytestmark = pytest.mark.usefixtures("implementation")
CHAINS = [
    [Transform.parse(name) for name in names]
    for count in (1, 2)
    for names in itertools.combinations(TRANSFORMS, count)
]


def draw(batch=2, heads=4, key_heads=2, queries=21, keys=21, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, size, generator=g) + torch.linspace(0, 2, size)
    key = torch.randn(batch, key_heads, keys, size, generator=g) + torch.linspace(-4, 8, size)
    return query, key, torch.randn(batch, key_heads, keys, 12, generator=g)


def run(tensors, precision="ps4", rule="none", transforms=(), operand="float32", **others):
    return attention(
        *tensors,
        accumulator=Accumulator.parse(precision),
        rule=Rule.parse(rule),
        scaling=0.25,
        causal=others.pop("mask", None) is None,
        transforms=tuple(map(Transform.parse, transforms)),
        operand=Operand.parse(operand),
        **others,
    )


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: ".".join(map(str, chain)))
def test_every_chain_is_exact(chain):
    query, key, _ = draw()
    changed = score_operands(query, key, operand=Operand(), transforms=chain, scaling=0.25, wants_shift=True)
    own = changed.key.double().repeat_interleave(4 // changed.key.shape[1], 1)
    scores = changed.query.double() @ own.mT * 0.25
    if changed.shift is not None:
        scores += changed.shift[..., None]
    if changed.column_shift is not None:
        scores += changed.column_shift[:, :, None]
    expected = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.25
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: ".".join(map(str, chain)))
@pytest.mark.parametrize("surroundings", ["plain", "softcap", "sinks"])
def test_recomputing_all_is_plain_float32_attention(chain, surroundings):
    tensors = draw()
    others = {"softcap": {"softcap": 5.0}, "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}}.get(
        surroundings, {}
    )
    for operand in ("float32", "int4"):
        found = run(tensors, "ps2", "all", [str(t) for t in chain], operand, **others)
        expected = run(tensors, "fp32", "none", **others)
        torch.testing.assert_close(found.output, expected.output, rtol=2e-4, atol=2e-5)


def test_a_biased_key_is_what_center_and_sort_are_for():
    tensors = draw(queries=64, keys=64, size=64)
    exact = run(tensors, "fp32").output
    error = {names: float((run(tensors, "ps4", "none", names).output - exact).norm()) for names in
             ((), ("center",), ("center", "sort"), ("center", "hadamard"))}  # fmt: skip
    assert error[("center",)] < error[()] / 2
    assert error[("center", "sort")] < error[("center",)]


def test_samples_do_not_depend_on_their_neighbours():
    tensors = draw()
    whole = run(tensors, "ps4", "strict:0.05", ["center", "balance"])
    for sample in range(2):
        alone = run([t[sample : sample + 1] for t in tensors], "ps4", "strict:0.05", ["center", "balance"])
        assert torch.equal(alone.output[0], whole.output[sample])
        assert torch.equal(alone.selected[0], whole.selected[sample])


def test_both_operands_are_quantised_and_recomputation_reads_them_in_full():
    query, key, value = tensors = draw()
    found = run(tensors, "fp32", "none", operand="int4")
    coarse = run((quantise(query, "int4"), quantise(key, "int4"), value), "fp32", "none")
    assert torch.equal(found.output, coarse.output)
    seen: list[Observation] = []
    run(tensors, "fp32", "running:0.01", operand="int4", observe=seen.append)
    assert bool(seen[0].chosen.any())


def test_the_expected_error_of_quantised_operands_is_the_size_of_the_true_one():
    tensors = draw(batch=1, queries=64, keys=64, size=64)
    ratios = []

    def observe(seen: Observation) -> None:
        visible = seen.tile.visible
        true = (seen.tile.scores - seen.exact)[visible]
        ratios.append(float(true.square().mean().sqrt() / seen.tile.error[visible].square().mean().sqrt()))

    run(tensors, "fp32", "running:0.01", ["center"], "int4", observe=observe)
    assert 0.7 < ratios[0] < 1.4


def test_calibrated_statistics_stand_in_for_the_calls_own():
    query, key, value = draw(batch=2)
    own = (Moments.of(query[0].reshape(2, -1, 16), True), Moments.of(key[0], True))
    names = ("center", "balance")
    dynamic = run((query[:1], key[:1], value[:1]), "ps4", "none", names)
    calibrated = run((query, key, value), "ps4", "none", names, moments=own)
    assert torch.equal(calibrated.output[0], dynamic.output[0])
    assert not torch.equal(calibrated.output[1], run((query, key, value), "ps4", "none", names).output[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_where_they_are(bad):
    query, key, value = draw()
    key[0, 0, 5, 3] = bad
    for names in (["center", "sort"], ["smooth"], ["center", "balance"]):
        found = run((query, key, value), "ps4", "none", names)
        assert bool(found.output[1].isfinite().all())
        assert bool(found.output[0, :5].isfinite().all())


def test_a_head_size_that_cannot_be_rotated():
    with pytest.raises(ValueError, match="sums of 12 terms; it needs a power of two"):
        run(draw(size=12), "ps4", "none", ["hadamard"])


def test_headwise_scores_are_those_of_repeated_keys():
    query, key, value = tensors = draw()
    repeated = query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    names = ["headwise", "bicenter", "balance"]
    for rule in ("none", "strict:0.05", "running:0.01"):
        found, expected = run(tensors, "ps3", rule, names), run(repeated, "ps3", rule, names[1:])
        assert torch.equal(found.selected, expected.selected)
        torch.testing.assert_close(found.output, expected.output)
    assert not torch.allclose(found.output, run(tensors, "ps3", "running:0.01", names[1:]).output)


def test_headwise_gains_where_heads_that_share_keys_differ():
    g = torch.Generator().manual_seed(3)
    query, key, value = draw(heads=2, key_heads=1, queries=64, keys=64, size=64)
    query, key = (torch.randn(x.shape, generator=g) for x in (query, key))
    query *= torch.logspace(-2, 0, 64)
    query[:, 0] = query[:, 0].flip(-1)
    exact = run((query, key, value), "fp32").output
    shared, own = (
        float((run((query, key, value), "ps4", "none", names).output - exact).norm())
        for names in (["center", "sort"], ["headwise", "center", "sort"])
    )
    assert own < shared / 1.1


def test_headwise_refuses_ranges_of_shared_keys():
    query, key, _ = draw()
    with pytest.raises(ValueError, match="Tender's calibrated ranges are those of shared keys"):
        score_operands(
            query,
            key,
            operand=Operand.parse("tender4/8"),
            transforms=[Transform.parse("headwise")],
            scaling=0.25,
            wants_shift=False,
            ranges=(Ranges.of(query.flatten(0, 1)), Ranges.of(key.flatten(0, 1))),
        )
