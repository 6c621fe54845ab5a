from pathlib import Path
from typing import Any

import pytest

from tiny import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    from torchlamp.study.models import load

    return load(str(tiny_folder))
