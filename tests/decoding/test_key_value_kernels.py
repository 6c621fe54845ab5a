"""A store's kernels against their reference and float64: what lies where, and many windows of keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlamp.decoding.key_value_store import TENSORS, KeyValueStore, StoreOptions
from torchlamp.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels")
INF = float("inf")


def both(make):
    """What `make` gives with the native kernels, and with the references."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for kernels in ("", "torch"):
            patch.setenv("TORCHLAMP_KERNELS", kernels)
            found.append(make())
    return found


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.integers(1, 2),
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    size=st.sampled_from([1, 16, 33, 64]),
    value_size=st.sampled_from([1, 31, 40]),
    bits=st.sampled_from([4, 8]),
    hadamard=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_copies_are_the_references_byte_for_byte(kv_heads, cuts, size, value_size, bits, hadamard, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (
            torch.randn(1, kv_heads, count, size, generator=generator),
            torch.randn(1, kv_heads, count, value_size, generator=generator),
        )
        for count in cuts
    ]
    options = StoreOptions(bits, bits, hadamard=hadamard and size & (size - 1) == 0, center=False)

    def make():
        store = KeyValueStore(options)
        for keys, values in parts:
            store.append(keys, values)
        return store.state()

    kernel, reference = both(make)
    assert kernel.keys() == reference.keys()
    # A rotation's sums may round otherwise in the reference, and an error is a bound.
    exact = {"value_codes", "value_scales", "full_keys", "full_values"}
    for name in TENSORS if kernel else ():
        one, other = (
            t[name].view(torch.int16) if t[name].dtype == torch.uint16 else t[name]
            for t in (kernel, reference)
        )
        if name in exact or (name != "key_errors" and not options.hadamard):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("group", [1, 3, 4, 5])
@pytest.mark.parametrize(("keys", "size"), [(129, 64), (700, 128), (2500, 64), (5000, 32)])
@pytest.mark.parametrize("bits", [4, 8])
def test_many_windows_and_splits(implementation, keys, size, group, bits):
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(1, 2 * group, 1, size, generator=generator) * 4
    k, v = torch.randn(2, 1, 2, keys, size, generator=generator)
    store = KeyValueStore(StoreOptions(bits, bits, full=torch.float32, hadamard=True))
    store.append(k, v)
    by_head = (x.double().repeat_interleave(group, 1) for x in (k, v))
    k64, v64 = by_head
    want = ((q.double() @ k64.mT * size**-0.5).softmax(-1) @ v64)[:, :, 0]
    largest = float(want.norm())

    def error(scores, values):
        attended = store.attend(q, scaling=size**-0.5, scores_threshold=scores, values_threshold=values)
        return float((attended.output[:, 0].double() - want).norm()) / largest, attended

    every, attended = error(-1.0, -1.0)
    # Values with less than 2^-8 of an even share are left out.
    assert every <= 2.0**-8
    assert attended.recomputed == attended.eligible
    blind, _ = error(INF, INF)
    looking, attended = error(1e-4, 1e-3)
    assert looking <= 0.7 * blind <= {4: 0.5, 8: 0.03}[bits]
    assert 0 < attended.recomputed < attended.eligible
