"""Settings for the tests of this room."""

from collections.abc import Iterator

import pytest
import torch

from torchlamp.kernels import native


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    params=["torch", *(name for name in native.INSTRUCTION_SETS if native.features()[name][0] in "ia")]
)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch twins, then every native instruction set that this machine runs."""
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)
