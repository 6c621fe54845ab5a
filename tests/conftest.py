import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from operands import NATIVE
from tiny import save_tiny_model

# Triton asks when it is imported: on a machine without a GPU its interpreter runs what tests call.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A commit passes or fails by itself, whenever it is tested. `HYPOTHESIS_PROFILE=explore make test` tries new examples.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


#: Files that take longest, in this order: they begin first, so that no process waits for another's at the end.
LONGEST = (
    "test_sweep_ray",
    "test_real_llm",
    "test_gpu_attention",
    "test_pages",
    "test_report",
    "test_sweep_killed",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def copies_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the low-bit copies of tiny models out of the user's cache; a test may set TORCHLAMP_CACHE."""
    from torchlamp.models import kept_copies

    folder, real = tmp_path_factory.mktemp("copies"), kept_copies.copies_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kept_copies, "copies_folder", lambda: real() if "TORCHLAMP_CACHE" in os.environ else folder
        )
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    from torchlamp.models.load import load

    return load(str(tiny_folder))


@pytest.fixture(params=["torch", *NATIVE])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch reference, then every native instruction set that this machine runs."""
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)


@pytest.fixture(params=NATIVE)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every native instruction set that this machine runs, for comparison with the reference."""
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)
