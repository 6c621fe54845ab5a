import errno

import pytest

from torchlamp.models import cache, conversion
from torchlamp.models.load import cache_entry, load
from torchlamp.models.memory import is_out_of_memory

#: As Python, safetensors, torch and the system said it under a limit on the address space.
FULL = [
    MemoryError("Cannot allocate memory (os error 12)"),
    RuntimeError(
        "unable to mmap 396387624 bytes from file </x/model.safetensors>: Cannot allocate memory (12)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_full_memory_is_no_damage(converted, caplog, monkeypatch, error):
    source, calls = converted
    load(str(source))

    def read(folder):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "read", read)
        with pytest.raises(
            MemoryError, match=r"doesn't fit into the memory that is free \(.*\): close other"
        ):
            load(str(source))
        patch.setattr(cache, "_pieces", read)
        with pytest.raises(MemoryError, match="doesn't fit"):
            load(str(source))
    assert len(calls) == 1
    assert "damaged" not in caplog.text
    assert cache.find_problem(cache_entry(str(source))) is None
    load(str(source))
    assert len(calls) == 1


def test_other_errors_are_not_full_memory():
    for error in (
        ValueError("no"),
        OSError(errno.EACCES, "Permission denied"),
        RuntimeError("shape mismatch"),
    ):
        assert not is_out_of_memory(error)
    wrapped = ValueError("model 'x' can't be loaded")
    wrapped.__cause__ = FULL[1]
    assert is_out_of_memory(wrapped)
