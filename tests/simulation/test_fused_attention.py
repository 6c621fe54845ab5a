"""The native attention kernel against the tile loop that it repeats, on every instruction set this machine has."""

import itertools

import pytest
import torch

from torchlamp.arithmetic import Accumulator
from torchlamp.kernels import native
from torchlamp.policy.precision import Precision
from torchlamp.rules import Rule
from torchlamp.simulation.attention import _operands, attention, tiled_attention
from torchlamp.simulation.attention_call import AttentionCall
from torchlamp.simulation.attention_fused import fused as in_one_kernel
from torchlamp.simulation.visibility import Visibility

INSTRUCTION_SETS = [name for name, state in native.features().items() if state in ("in use", "available")]
RULES = ("none", "all", "strict:0.05", "relaxed:0.1", "relaxed-length:0.02", "running:0.002", "topz:0.1")

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the native extension is not installed")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)
    return request.param


def draw(batch=2, heads=4, key_heads=2, queries=37, keys=37, size=24, value_size=20, spread=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, size, generator=g) * spread
    key = torch.randn(batch, key_heads, keys, size, generator=g)
    return query, key, torch.randn(batch, key_heads, keys, value_size, generator=g)


def fused_form(call, query, key, value):
    return in_one_kernel(call, _operands(call, query, key), value)


def both(tensors, rule, accumulate="ps4", mask=None, causal=True, softcap=None, sinks=None, **others):
    accumulator, seen = Accumulator.parse(accumulate), Visibility(mask, causal)
    call = AttentionCall(accumulator, Rule.parse(rule), 0.2, seen, softcap, sinks, **others)
    operands = _operands(call, *tensors[:2])
    return in_one_kernel(call, operands, tensors[2]), tiled_attention(call, operands, tensors[2])


def assert_same(fused, tiled, allowed=0.01):
    """Equal but for rows in which a weight lies within float32 rounding of the threshold."""
    assert fused is not None
    assert torch.equal(fused.eligible, tiled.eligible)
    assert torch.equal(fused.last_key, tiled.last_key)
    same = fused.selected == tiled.selected
    assert (~same).float().mean() <= allowed
    rows = same.transpose(1, 2)
    assert torch.allclose(fused.output[rows], tiled.output[rows], rtol=1e-5, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "accumulate", ["ps4", "ps7/block16", "e5m2", "e4m3fn/promote8", "ps3/unfused", "fp32"]
)
def test_every_rule_and_accumulator(instruction_set, rule, accumulate):
    assert_same(*both(draw(), rule, accumulate))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_masks_softcap_and_sinks(instruction_set, rule, softcap, with_sinks):
    tensors = draw(queries=45, keys=130)
    mask = torch.rand(2, 1, 45, 130, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, :, 7] = False  # a query that sees nothing
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    fused, tiled = both(tensors, rule, mask=mask, causal=False, softcap=softcap, sinks=sinks)
    if with_sinks and rule.startswith("relaxed"):
        assert fused is None  # left to the tile loop
    else:
        assert_same(fused, tiled)


@pytest.mark.parametrize("rule", ["none", "all", "strict:0.05", "running:0.002"])
@pytest.mark.parametrize(
    "precision", ["ps4.center.sort", "ps4.center.balance", "int8@ps7.center", "mxfp8@fp32"]
)
@pytest.mark.parametrize("surroundings", ["plain", "softcap", "sinks"])
def test_transformed_and_quantised_operands(instruction_set, rule, precision, surroundings):
    query, key, value = draw(queries=45, keys=45)
    key = key + torch.linspace(-3, 9, 24)
    parsed = Precision.parse(precision)
    others = {"operand": parsed.operand, "transforms": parsed.transforms}
    if surroundings == "softcap":
        others["softcap"] = 4.0
    elif surroundings == "sinks":
        others["sinks"] = torch.tensor([0.5, -1.0, 3.0, 0.0])
    fused, tiled = both((query, key, value), rule, str(parsed.sums), **others)
    if rule.startswith("running") and not parsed.operand.is_float32:
        assert fused is None  # the error of two quantised operands is the tile loop's
    else:
        assert_same(fused, tiled)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 77), (5, 200), (64, 64), (200, 200), (33, 3)])
@pytest.mark.parametrize("rule", ["strict:0.05", "running:0.002"])
def test_lengths(instruction_set, queries, keys, rule):
    causal = queries == keys
    assert_same(*both(draw(queries=queries, keys=keys), rule, causal=causal))


@pytest.mark.parametrize("size", [1, 7, 64, 80])
@pytest.mark.parametrize("value_size", [1, 15, 16, 33, 64])
def test_sizes(instruction_set, size, value_size):
    assert_same(*both(draw(size=size, value_size=value_size), "strict:0.05"))


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 1), (6, 2), (3, 3)])
def test_groups(instruction_set, heads, key_heads):
    assert_same(*both(draw(heads=heads, key_heads=key_heads), "strict:0.05"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_what_is_not_finite_is_treated_alike(instruction_set, rule, bad):
    query, key, value = draw()
    key[1, 0, 11, 3] = bad
    assert_same(*both((query, key, value), rule))


def test_a_selection_is_the_same_to_the_entry(instruction_set):
    """Counts could agree by accident; with one-hot values the output shows each row's probabilities."""
    query, key, _ = draw(batch=1, heads=2, key_heads=1, queries=40, keys=40)
    value = torch.eye(40)[None, None]
    for rule in RULES:
        fused, tiled = both((query, key, value), rule, accumulate="ps2")
        rows = (fused.selected == tiled.selected).transpose(1, 2)
        assert rows.float().mean() > 0.98
        assert torch.allclose(fused.output[rows], tiled.output[rows], atol=2e-6)


def test_results_do_not_depend_on_threads_or_batch(instruction_set):
    query, key, value = draw(batch=3, queries=150, keys=150)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        call = AttentionCall(
            Accumulator.parse("ps4"),
            Rule.parse("running:0.002"),
            0.2,
            Visibility(causal=True),
            None,
            None,
            None,
        )
        results.append(fused_form(call, query, key, value))
    torch.set_num_threads(before)
    for one, other in itertools.pairwise(results):
        assert torch.equal(one.output, other.output)
        assert torch.equal(one.selected, other.selected)
    for sample in range(3):
        piece = slice(sample, sample + 1)
        alone = fused_form(call, query[piece], key[piece], value[piece])
        assert torch.equal(alone.output, results[0].output[piece])


def test_a_mask_for_each_head_and_a_bias_are_left_to_the_tile_loop(instruction_set):
    tensors = draw()
    mask = torch.ones(1, 4, 37, 37, dtype=torch.bool)
    call = AttentionCall(Accumulator.parse("ps4"), Rule.parse("all"), 0.2, Visibility(mask), None, None, None)
    assert fused_form(call, *tensors) is None
    bias = torch.zeros(1, 1, 37, 37)
    call = AttentionCall(
        Accumulator.parse("ps4"), Rule.parse("all"), 0.2, Visibility(None, True, bias), None, None, None
    )
    assert fused_form(call, *tensors) is None
    assert attention(
        *tensors, accumulator=call.accumulator, rule=call.rule, scaling=0.2, bias=bias
    ).output.shape
