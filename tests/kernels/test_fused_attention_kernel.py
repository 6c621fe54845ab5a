"""The fused kernel against its definition, above all with the operands of transforms and of low-bit copies."""

import pytest
import torch
from attention_oracle import attend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchlamp.kernels.attention import BridgeNorms, ResidualPath, fused_attention
from torchlamp.kernels.specification import Accumulation, Grid

WEIGHTS = {
    "strict": 0.2,
    "relaxed": 0.3,
    "running": 0.02,
    "topz": 0.1,
    "bridge": 0.02,
    "running-residual": 0.02,
    "bridge-residual": 0.02,
}


def case(seed, options, queries, keys, size=24, heads=4, kv_heads=2, batch=2, **given):
    """Tensors of a call, with the optional ones that `options` names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q, k = draw(batch, heads, queries, size), draw(batch, kv_heads, keys, size)
    tensors = {
        "exact_query": q + draw(*q.shape) / 8,
        "exact_key": k + draw(*k.shape) / 8,
        "shift": draw(batch, heads, queries),
        "row_error": draw(batch, heads, queries).abs() / 4,
        "key_error": draw(batch, kv_heads, keys).abs() / 4,
        "sinks": draw(heads),
        "mask": draw(batch, 1, queries, keys) > -0.7,
    }
    if "row_error" in options:
        options = {*options, "key_error"}
    arguments = {"mask": None, "sinks": None, "causal": "causal" in options and "mask" not in options}
    arguments |= {name: tensor for name, tensor in tensors.items() if name in options}
    arguments["softcap"] = 2.0 if "softcap" in options else None
    arguments |= {"scaling": size**-0.5, "error_scale": 2.0**-6, "by_length": "by_length" in options}
    value = draw(batch, kv_heads, keys, 20)
    weight = given.get("weight", "")
    if "bridge" in weight:
        arguments["bridge"] = BridgeNorms(q.square().sum(-1), k.square().sum(-1), 2.0, 0.5)
    if "residual" in weight:
        factor = draw(heads, 20, 20)
        mapped = value.repeat_interleave(heads // kv_heads, 1) @ factor
        scale = draw(batch, queries).abs() + 5
        arguments["residual"] = ResidualPath(factor, mapped, mapped.square().sum(-1), scale)
    if "draws" in options:
        # Few different numbers, so that the order of the keys decides among equal ones.
        arguments["draws"] = torch.randint(0, 20, (heads, queries, keys), generator=generator) / 20
    return q, k, value, arguments | given


def check(q, k, v, how, arguments):
    found = fused_attention(q, k, v, how, **arguments)
    assert found is not None
    output, selected, _, _ = found
    want = attend(q, k, v, how, **arguments)
    # Rows in which no weight lies within rounding of its threshold must agree.
    near = (want.weight - want.threshold).abs() <= 1e-5 * want.threshold.abs() + 1e-9 + want.slack
    # No rounding decides a hidden entry, whose weight is 0, or a row's largest weight against once itself.
    near = (near & (want.weight > 0) & (want.weight != want.threshold)).any(-1)
    near &= torch.tensor(0 < arguments["threshold"] < float("inf"))
    assert near.float().mean() < 0.1
    assert torch.equal(selected[~near], want.chosen.sum(-1).int()[~near])
    rows = ~near.transpose(1, 2)
    torch.testing.assert_close(output[rows].double(), want.output[rows], rtol=0, atol=3e-6)
    return want


OPTIONS = [
    "exact_query",
    "exact_key",
    "shift",
    "row_error",
    "softcap",
    "sinks",
    "mask",
    "causal",
    "by_length",
    "draws",
]


@given(
    weight=st.sampled_from(list(WEIGHTS)),
    options=st.sets(st.sampled_from(OPTIONS)),
    bits=st.sampled_from([2, 4, 23]),
    queries=st.integers(1, 40),
    more=st.integers(0, 90),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_options_together(instruction_set, weight, options, bits, queries, more, seed):
    if weight == "relaxed":
        options -= {"sinks"}  # the tile loop's
    q, k, v, arguments = case(
        seed, options, queries, queries + more, weight=weight, threshold=WEIGHTS[weight]
    )
    check(q, k, v, Accumulation(Grid(mantissa_bits=bits)), arguments)


@pytest.mark.parametrize("threshold", [-1.0, 0.2])
def test_recomputed_scores_are_those_of_the_exact_operands(instruction_set, threshold):
    """All entries (one product for the whole row) and few (one sum each)."""
    options = {"exact_query", "exact_key", "shift", "sinks"}
    q, k, v, arguments = case(1, options, 30, 100, weight="topz", threshold=threshold)
    want = check(q, k, v, Accumulation(Grid(mantissa_bits=3)), arguments)
    assert want.chosen.all() if threshold < 0 else 0 < want.chosen.float().mean() < 0.1


def test_quantised_operands_alone_decide_under_float32_sums(instruction_set):
    q, k, v, arguments = case(2, {"row_error"}, 20, 60, weight="running", threshold=0.002)
    how = Accumulation(Grid())
    want = check(q, k, v, how, arguments)
    assert 0 < want.chosen.float().mean() < 1
    arguments["key_error"] = torch.zeros_like(arguments["key_error"])
    assert not check(q, k, v, how, arguments).chosen.any()


def test_an_error_that_is_not_a_number_is_recomputed(instruction_set):
    q, k, v, arguments = case(3, {"row_error"}, 8, 40, weight="running", threshold=1e9)
    arguments["key_error"][:, :, 7] = torch.nan
    _, selected, _, _ = fused_attention(q, k, v, Accumulation(Grid(mantissa_bits=4)), **arguments)
    assert (selected == 1).all()


def test_operands_of_any_strides(instruction_set):
    options = {"exact_query", "exact_key", "shift", "row_error"}
    q, k, v, arguments = case(4, options, 17, 33, weight="running", threshold=0.01)
    how = Accumulation(Grid(mantissa_bits=4))
    want = fused_attention(q, k, v, how, **arguments)
    turned = {name: x.mT.contiguous().mT for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    found = fused_attention(*(x.mT.contiguous().mT for x in (q, k, v)), how, **{**arguments, **turned})
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("exact_query", (2, 4, 8, 23), "exact operands must have the shapes of q and k"),
        ("exact_key", (2, 2, 39, 24), "exact operands must have the shapes of q and k"),
        ("shift", (2, 4, 9), "shift must be contiguous, of shape"),
        ("row_error", (2, 4, 7), "row_error must be contiguous, of shape"),
        ("key_error", (2, 4, 40), "key_error must be contiguous, of shape"),
        ("draws", (4, 8, 39), "draws must be contiguous, of shape"),
    ],
)
def test_shapes_that_do_not_fit(instruction_set, name, shape, said):
    q, k, v, arguments = case(5, {"row_error"}, 8, 40, weight="running", threshold=0.1)
    with pytest.raises(ValueError, match=said):
        fused_attention(q, k, v, Accumulation(Grid()), **{**arguments, name: torch.ones(shape)})


def test_errors_come_in_pairs(instruction_set):
    q, k, v, arguments = case(6, {"row_error"}, 8, 40, weight="running", threshold=0.1)
    with pytest.raises(ValueError, match="row_error and key_error come together"):
        fused_attention(q, k, v, Accumulation(Grid()), **{**arguments, "key_error": None})


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        ("bridge", "bridge"),
        ("running-residual", "residual"),
        ("bridge-residual", "bridge"),
        ("bridge-residual", "residual"),
    ],
)
def test_what_a_weight_needs_must_be_there(instruction_set, weight, name):
    """And what another one needs must not."""
    q, k, v, arguments = case(8, set(), 8, 40, weight=weight, threshold=0.1)
    said = {"bridge": "a weight with a bridge needs", "residual": "looks to the residual stream needs"}[name]
    lacking = {key: given for key, given in arguments.items() if key != name}
    strict = {
        key: None if key in ("bridge", "residual") and key != name else x for key, x in arguments.items()
    }
    for wrong in (lacking, strict | {"weight": "strict"}):
        with pytest.raises(ValueError, match=said):
            fused_attention(q, k, v, Accumulation(Grid()), **wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"factor": torch.ones(4, 20, 19)}, "factor must be contiguous, of shape"),
        ({"mapped": torch.ones(2, 2, 40, 20)}, "mapped values must have the shape"),
        ({"squares": torch.ones(2, 4, 39)}, "mapped squares must be contiguous, of shape"),
        ({"scale": torch.ones(2, 9)}, "scale must be contiguous, of shape"),
    ],
)
def test_a_way_to_the_stream_that_does_not_fit(instruction_set, change, said):
    q, k, v, arguments = case(9, set(), 8, 40, weight="running-residual", threshold=0.1)
    arguments["residual"] = arguments["residual"]._replace(**change)
    with pytest.raises(ValueError, match=said):
        fused_attention(q, k, v, Accumulation(Grid()), **arguments)


def test_other_dtypes_are_not_served(instruction_set):
    q, k, v, arguments = case(7, {"shift"}, 8, 40, weight="strict", threshold=0.1)
    arguments["shift"] = arguments["shift"].double()
    assert fused_attention(q, k, v, Accumulation(Grid()), **arguments) is None


def test_draws_of_any_numbers_choose_as_many(instruction_set):
    """Those that are no numbers in [0, 1) come in some order, but none twice and none that is hidden."""
    q, k, v, arguments = case(10, {"draws", "mask"}, 30, 90, weight="topz", threshold=0.01)
    how = Accumulation(Grid(mantissa_bits=4))
    want = fused_attention(q, k, v, how, **arguments)[1]
    for odd in (torch.nan, torch.inf, 5.0):
        draws = torch.full_like(arguments["draws"], odd)
        _, selected, visible, _ = fused_attention(q, k, v, how, **{**arguments, "draws": draws})
        assert torch.equal(selected, want)
        assert (selected <= visible[:, None, :, 0]).all()
