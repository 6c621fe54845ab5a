from pathlib import Path

import pytest

from torchlamp.models import conversion
from torchlamp.models import load as models


@pytest.fixture
def converted(monkeypatch, tmp_path, tiny_folder):
    """A stand-in .gguf file, converted to the tiny model; counts the conversions."""
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    calls: list[Path] = []

    def convert(gguf: Path):
        calls.append(gguf)
        return models._pretrained(str(tiny_folder), "tiny")

    monkeypatch.setattr(conversion, "convert", convert)
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF stand-in")
    return source, calls
