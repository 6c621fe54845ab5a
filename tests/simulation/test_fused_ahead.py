"""Rules that look to the residual stream, bridges and draws in the native kernel, against the tile loop."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fused_attention import INSTRUCTION_SETS, assert_same, draw, in_one_kernel, instruction_set

from torchlamp.arithmetic import Accumulator
from torchlamp.policy.precision import Precision
from torchlamp.rules import Rule
from torchlamp.simulation.ahead import Ahead, gram_factor
from torchlamp.simulation.attention import _operands, attend, tiled_attention
from torchlamp.simulation.attention_call import AttentionCall
from torchlamp.simulation.visibility import Visibility

RESIDUAL = ("running-residual:0.003", "bridge-residual:0.003")
DRAWN = (
    "random-like:strict:0.05",
    "random-like:all",
    "random-like:none",
    "random-like:running-residual:0.003",
)
RULES = ("bridge:0.002", *RESIDUAL, *DRAWN)

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the native extension is not installed")
assert instruction_set  # a fixture


def ahead_of(value, heads, reads_outputs=True, seed=9, queries=400):
    """An output projection with features of very different sizes, and a scale that may read all heads' outputs."""
    g = torch.Generator().manual_seed(seed)
    size = value.shape[-1]
    weight = torch.randn(3 * size, heads * size, generator=g) * torch.logspace(-2, 1, 3 * size)[:, None]
    stream = torch.rand(len(value), queries, generator=g) + 0.5

    def scale(outputs, sample, rows):
        own = stream[sample, rows.start : rows.stop] * 20
        if not reads_outputs:
            return own
        added = outputs.transpose(0, 1).flatten(1) @ weight.T
        return own * added.square().mean(-1).sqrt()

    return Ahead(gram_factor(weight, heads), scale, reads_outputs)


def call_of(tensors, rule, *, accumulate="ps4", mask=None, causal=True, reads=True, **others):
    return AttentionCall(
        Accumulator.parse(accumulate),
        Rule.parse(rule),
        0.2,
        Visibility(mask, causal),
        generator=torch.Generator().manual_seed(5),
        ahead=ahead_of(tensors[2], tensors[0].shape[1], reads),
        **others,
    )


def both(tensors, rule, **options):
    """The native and the tile form, each with a generator of its own; these must end in one state."""
    calls = call_of(tensors, rule, **options), call_of(tensors, rule, **options)
    operands = _operands(calls[0], *tensors[:2])
    fused = in_one_kernel(calls[0], operands, tensors[2])
    tiled = tiled_attention(calls[1], operands, tensors[2])
    if fused is not None:
        assert torch.equal(*(call.generator.get_state() for call in calls))
    return fused, tiled


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("accumulate", ["ps4", "ps7/block16", "e4m3fn/promote8", "ps3/unfused", "fp32"])
@pytest.mark.parametrize("reads", [False, True])
def test_accumulators(rule, accumulate, reads):
    assert_same(*both(draw(queries=70, keys=70), rule, accumulate=accumulate, reads=reads))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_masks_softcap_and_sinks(rule, softcap, with_sinks):
    mask = torch.rand(1 if with_sinks else 2, 1, 75, 130, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, :, 7] = False  # a query that sees nothing
    mask[0, :, :64, :9] = mask[0, :, :64, 100:] = False  # a window of its own
    mask[0, :, 64:] = False  # and a tile that sees nothing
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    tensors = draw(batch=2, queries=75, keys=130)
    assert_same(*both(tensors, rule, mask=mask, causal=False, softcap=softcap, sinks=sinks))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", ["ps4.center.sort", "ps4.center.balance", "int8@ps7.center"])
@pytest.mark.parametrize("surroundings", ["plain", "softcap", "sinks"])
def test_transformed_and_quantised_operands(rule, precision, surroundings):
    query, key, value = draw(queries=70, keys=70)
    key = key + torch.linspace(-3, 9, 24)
    parsed = Precision.parse(precision)
    others = {"operand": parsed.operand, "transforms": parsed.transforms, "blocks": True}
    others |= {"softcap": 4.0} if surroundings == "softcap" else {}
    others |= {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])} if surroundings == "sinks" else {}
    fused, tiled = both((query, key, value), rule, accumulate=str(parsed.sums), **others)
    if "running" in rule and not parsed.operand.is_float32:
        assert fused is None  # the error of two quantised operands is the tile loop's
    else:
        assert_same(fused, tiled)
        same = (fused.selected == tiled.selected)[..., None]
        assert torch.equal(fused.blocks * same, tiled.blocks * same)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_treated_alike(rule, bad, where):
    """A bad number in a query, in a key, and in a value that all rows from the first on see."""
    tensors = draw()
    tensors[where][1, 0, 11 if where < 2 else 0, 3] = bad
    assert_same(*both(tensors, rule))


@given(
    rule=st.sampled_from(RULES),
    heads=st.sampled_from([(1, 1), (6, 2), (3, 3)]),
    queries=st.integers(1, 150),
    more=st.integers(0, 60),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(instruction_set, rule, heads, queries, more, sizes, seed):
    shape = {"heads": heads[0], "key_heads": heads[1], "size": sizes[0], "value_size": sizes[1]}
    tensors = draw(**shape, batch=1, queries=queries, keys=queries + more, seed=seed)
    assert_same(*both(tensors, rule, causal=seed % 2 == 0), allowed=max(0.02, 1.5 / queries / heads[0]))


@pytest.mark.parametrize("rule", DRAWN)
@pytest.mark.parametrize("causal", [False, True])
def test_draws_are_those_of_the_tile_loop_to_the_entry(rule, causal):
    """With one-hot values the output shows each row's probabilities."""
    query, key, _ = draw(batch=2, heads=2, key_heads=1, queries=140, keys=140)
    value = torch.eye(140).expand(2, 1, -1, -1).contiguous()
    fused, tiled = both((query, key, value), rule, accumulate="ps2", causal=causal, reads=False)
    rows = (fused.selected == tiled.selected).transpose(1, 2)
    assert rows.float().mean() > 0.99
    assert torch.allclose(fused.output[rows], tiled.output[rows], atol=2e-6)


def test_a_row_whose_values_are_all_alike_needs_nothing():
    """Nor do most of its entries pass the bound that decides which distances are formed."""
    query, key, _ = draw(queries=60, keys=60)
    value = torch.ones(2, 2, 60, 20)
    fused, tiled = both((query, key, value), "running-residual:0.003", reads=False)
    assert int(tiled.selected.sum()) < 0.01 * int(tiled.eligible.sum())
    assert_same(fused, tiled)


@pytest.mark.parametrize("rule", RESIDUAL + DRAWN)
def test_threads_and_batches(rule):
    tensors = draw(batch=3, queries=150, keys=150)

    def run(tensors):
        call = call_of(tensors, rule)
        return in_one_kernel(call, _operands(call, *tensors[:2]), tensors[2])

    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(tensors))
    torch.set_num_threads(before)
    alone = run(tuple(t[:1] for t in tensors))
    for other in results:
        assert torch.equal(results[0].output, other.output)
        assert torch.equal(results[0].selected, other.selected)
        assert torch.equal(alone.output, other.output[:1])


@pytest.mark.parametrize("shape", [{"queries": 0, "keys": 5}, {"keys": 0}, {"batch": 0}])
@pytest.mark.parametrize("rule", ["bridge:0.002", *RESIDUAL, DRAWN[0]])
def test_nothing_to_do(shape, rule):
    query, key, value = draw(**shape)
    call = call_of((query, key, value), rule, causal=False, reads=False)
    result = attend(query, key, value, call)
    assert result.output.shape == (len(query), query.shape[2], 4, 20)
    assert result.selected.shape == result.eligible.shape == (len(query), 4, query.shape[2])
    assert not result.selected.any()
    assert not result.output.any()


def test_a_generator_is_left_alone_where_the_kernel_does_not_serve():
    """A mask for each head is the tile loop's; its draws are the same as without the kernel."""
    tensors, outputs = draw(), []
    mask = torch.rand(1, 4, 37, 37, generator=torch.Generator().manual_seed(3)) < 0.7
    for run in (attend, lambda q, k, v, call: tiled_attention(call, _operands(call, q, k), v)):
        call = AttentionCall(
            Accumulator.parse("ps4"),
            Rule.parse("random-like:strict:0.05"),
            0.2,
            Visibility(mask),
            generator=torch.Generator().manual_seed(1),
        )
        outputs.append(run(*tensors, call).output)
    assert torch.equal(*outputs)
