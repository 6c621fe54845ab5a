import sys

import pytest
import torch

from torchlamp.kernels import native
from torchlamp.kernels.dispatch import NativeKernels, NativeObject, as_native, native_for


def test_native_kernels_take_float32_and_bool_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TORCHLAMP_KERNELS", "portable")
    found = native_for(torch.ones(2), None, torch.ones(2, dtype=torch.bool))
    assert found == ("portable", native.extension())
    assert native_for() == found
    assert native_for(torch.ones(2), torch.ones(2, dtype=torch.float64)) is None
    assert native_for(torch.ones(2, device="meta")) is None
    monkeypatch.setenv("TORCHLAMP_KERNELS", "torch")
    assert native_for(torch.ones(2)) is None


@pytest.mark.parametrize(("contiguous", "strides"), [("any", (1, 4)), ("last", (3, 1)), ("all", (3, 1))])
def test_a_transposed_tensor(contiguous, strides):
    x = torch.arange(12.0, requires_grad=True).view(3, 4).T
    y = as_native(x, contiguous)
    assert y.stride() == strides
    assert not y.requires_grad
    assert torch.equal(x, y)


def test_nothing_is_copied_without_need():
    rows = torch.arange(24.0).view(4, 6)[:, :3]
    assert as_native(rows).data_ptr() == rows.data_ptr()
    assert as_native(rows, "all").is_contiguous()
    column = torch.arange(8.0).view(4, 2)[:, :1]
    assert as_native(column).data_ptr() == column.data_ptr()


def test_lazy_negation_is_carried_out_and_masks_become_bytes():
    imaginary = torch.view_as_complex(torch.ones(2, 2)).conj().imag
    assert imaginary.is_neg()
    assert as_native(imaginary).tolist() == [-1.0, -1.0]
    assert not as_native(imaginary).is_neg()
    assert as_native(torch.tensor([True, False])).tolist() == [1, 0]
    assert as_native(torch.tensor([True, False])).dtype == torch.uint8


def test_a_native_object_is_made_once_for_an_instruction_set():
    made = []

    def make(kernels):
        made.append(kernels.instruction_set)
        return object()

    handle = NativeObject()
    one, other = NativeKernels("portable", None), NativeKernels("avx2", None)
    first = handle.get(one, make)
    assert handle.get(one, make) is first
    assert handle.get(other, make) is not first
    assert made == ["portable", "avx2"]
    handle.forget()
    handle.get(other, make)
    assert made == ["portable", "avx2", "avx2"]


def test_slow_references_are_said_once_with_what_to_install(monkeypatch, caplog):
    """As where no compiler was: the extension can't be imported."""
    monkeypatch.delenv("TORCHLAMP_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, "torchlamp._native", None)
    monkeypatch.delattr("torchlamp._native", raising=False)
    caches = (native._load, native._choose, native._warn)
    try:
        for cache in caches:
            cache.cache_clear()
        for _ in range(2):
            native.warn_if_absent("decoding")
    finally:
        for cache in caches:
            cache.cache_clear()
    (said,) = caplog.messages
    assert said.startswith("decoding runs in torch, many times slower than by native kernels: the native")
    assert "install a C++20 compiler" in said
    assert "run pip install" in said


def test_native_kernels_say_nothing(monkeypatch, caplog):
    monkeypatch.setattr(native, "why_not", lambda: None)
    native.warn_if_absent("decoding")
    assert caplog.messages == []
