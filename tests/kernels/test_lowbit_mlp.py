import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import NATIVE

from torchlamp.kernels.lowbit_mlp import ACTIVATIONS, LowBitMlp, activate

INF = float("inf")


def weights(neurons, columns, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (
        torch.randn(shape, generator=generator) * 0.3
        for shape in ((neurons, columns), (neurons, columns), (outputs, neurons))
    )
    return gate, up, down


def exact(parts, activation, x):
    gate, up, down = (w.double() for w in parts)
    x = x.double()
    a = x @ gate.T
    phi = (
        torch.nn.functional.silu(a)
        if activation == "silu"
        else torch.nn.functional.gelu(a, approximate="tanh")
    )
    return (phi * (x @ up.T)) @ down.T


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
@settings(deadline=None, max_examples=40)
@given(
    neurons=st.integers(1, 70),
    columns=st.integers(1, 70),
    outputs=st.integers(1, 40),
    vectors=st.integers(1, 9),
    activation=st.sampled_from(ACTIVATIONS),
    bits=st.sampled_from([(8, 8), (4, 8), (12, 4), (12, 12)]),
    thresholds=st.sampled_from([(-1.0, -1.0), (INF, INF), (1e-3, 1e-2), (0.05, INF), (INF, 1e-3)]),
    isa=st.sampled_from(NATIVE or ["torch"]),
    seed=st.integers(0, 100),
)
def test_kernel_equals_twin(neurons, columns, outputs, vectors, activation, bits, thresholds, isa, seed):
    parts = weights(neurons, columns, outputs, seed)
    x = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHLAMP_KERNELS", isa)
        mlp = LowBitMlp.pack(*parts, activation, *bits)
        y, recomputed, read = mlp.run(x, *thresholds)
        twin, twin_recomputed, twin_read = mlp.twin(x, *thresholds)
    slack = 1 + 0.01 * vectors * neurons  # entries within rounding of a threshold
    assert abs(recomputed - twin_recomputed) <= slack
    assert abs(read - twin_read) <= slack
    if (recomputed, read) == (twin_recomputed, twin_read):
        torch.testing.assert_close(y, twin, rtol=1e-3, atol=1e-3 * float(twin.abs().max()) + 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_is_full_precision(implementation, activation):
    parts = weights(96, 64, 48)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    y, recomputed, read = LowBitMlp.pack(*parts, activation).run(x, -1.0, -1.0)
    reference = exact(parts, activation, x)
    assert (y - reference).norm() < 1e-3 * reference.norm()  # the float16 copy of the down projection
    assert (recomputed, read) == (3 * 96, 3 * 96)


def test_errors_fall_with_the_thresholds(implementation):
    parts = weights(256, 64, 64)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    mlp, reference = LowBitMlp.pack(*parts, "silu", 4, 4), exact(parts, "silu", x)
    errors = [(mlp.run(x, t, t)[0] - reference).norm() for t in (INF, 3e-3, 3e-4, -1.0)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("strange", [0.0, INF, float("nan"), 1e-42, 1e30])
def test_strange_inputs(implementation, strange):
    parts = weights(40, 40, 20)
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    x[0, 3] = strange
    y, _, _ = LowBitMlp.pack(*parts, "silu").run(x, 1e-3, 1e-3)
    clean = exact(parts, "silu", x)
    assert (y[1] - clean[1]).norm() < 0.05 * clean[1].norm()
    if strange != strange or strange == INF:
        assert not y[0].isfinite().any()


def test_slopes_are_derivatives():
    a = torch.linspace(-6, 6, 200, dtype=torch.float64, requires_grad=True)
    for name in ACTIVATIONS:
        value, slope = activate(name, a)
        (derivative,) = torch.autograd.grad(value.sum(), a)
        torch.testing.assert_close(slope, derivative, rtol=1e-6, atol=1e-7)


def test_copies_and_threads():
    parts = weights(300, 64, 64)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    mlp = LowBitMlp.pack(*parts, "silu")
    expected = mlp.run(x, 1e-3, 1e-3)
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert torch.equal(other.run(x, 1e-3, 1e-3)[0], expected[0])
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: mlp.run(x, 1e-3, 1e-3), range(50)):
            assert torch.equal(found[0], expected[0])


def test_refuses():
    gate, up, down = weights(8, 8, 8)
    with pytest.raises(ValueError, match="'relu'"):
        LowBitMlp.pack(gate, up, down, "relu")
    with pytest.raises(ValueError, match="no gated MLP"):
        LowBitMlp.pack(gate, up[:4], down, "silu")
    with pytest.raises(TypeError, match="float32"):
        LowBitMlp.pack(gate.half(), up.half(), down.half(), "silu")
