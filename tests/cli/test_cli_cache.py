import json
import os
import time

import pytest
from commands import error_line, run

from torchlamp.models import cache

KEY = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two copies, what is left of a third, and what isn't ours."""
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    folder = cache.cache_folder()
    for name, size, days in (("smollm2-135m", 3_000_000, 1.5), ("my-qwen", 2_000_000, 40)):
        entry = folder / f"{name}-{KEY}"
        with cache.locked(entry):
            cache.store(entry, lambda new, size=size: (new / "model.safetensors").write_bytes(b"0" * size))
        used = time.time() - days * 86_400
        os.utime(entry / cache.MANIFEST, (used, used))
    (folder / f".my-gemma-{KEY}.tmp-x").mkdir()
    (folder / f".my-gemma-{KEY}.tmp-x" / "half").write_bytes(b"0" * 1_000_000)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("keep")
    return folder


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_list(folder):
    lines = run("cache", "list").stdout.splitlines()
    assert [" ".join(line.split()) for line in lines[:3]] == [
        f".my-gemma-{KEY}.tmp-x 1 MB last used today, never finished",
        f"smollm2-135m-{KEY} 3 MB last used yesterday",
        f"my-qwen-{KEY} 2 MB last used 40 days ago",
    ]
    assert lines[3] == f"3 copies, 6 MB, in {folder}"
    record = json.loads(run("cache", "list", "--json").stdout)
    assert record["folder"] == str(folder)
    assert [entry["whole"] for entry in record["entries"]] == [False, True, True]
    assert 3_000_000 < record["entries"][1]["bytes"] < 3_010_000
    assert "Converted copies, 3 with 6 MB" in run("models").stdout


def test_clear(folder):
    said = run("cache", "clear", "my-q", "--dry-run").stdout.splitlines()
    assert said == [f"would delete my-qwen-{KEY}, 2 MB", "2 MB would be free"]
    assert len(names(folder)) == 4
    assert "0 MB freed" in run("cache", "clear", "--unused-days", "50").stdout
    assert f"deleted my-qwen-{KEY}, 2 MB" in run("cache", "clear", "--unused-days", "30").stdout
    assert "6 MB" not in run("cache", "list").stdout
    assert "4 MB freed" in run("cache", "clear").stdout
    assert names(folder) == {"notes"}
    assert (folder / "notes" / "mine.txt").read_text() == "keep"
    assert run("cache", "list").stdout == f"0 copies, 0 MB, in {folder}\n"


def test_what_is_not_there(folder, tmp_path, monkeypatch):
    said = error_line(run("cache", "clear", "my-q", "gpt2"))
    assert "no converted copy's name begins with 'gpt2'; there are: " in said
    assert len(names(folder)) == 4
    assert "--unused-days -1" in error_line(run("cache", "clear", "--unused-days", "-1"))
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "nowhere"))
    assert "0 copies" in run("cache", "list").stdout


def test_a_load_is_a_use(folder):
    entry = folder / f"my-qwen-{KEY}"
    cache.note_use(entry)
    assert cache.find_problem(entry) is None
    assert next(e for e in cache.entries() if e.path == entry).used > time.time() - 60
    cache.note_use(folder / "none")
