import pytest
from operands import NATIVE


@pytest.fixture(params=["torch", *NATIVE])
def implementation(request, monkeypatch):
    """The torch twins, then every native instruction set that this machine runs."""
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)


@pytest.fixture(params=NATIVE)
def instruction_set(request, monkeypatch):
    """Every native instruction set that this machine runs, for comparison with the twins."""
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)
