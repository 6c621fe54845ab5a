import threading
from pathlib import Path

import pytest

from torchlamp.models import cache


@pytest.fixture
def entry(tmp_path) -> Path:
    entry = tmp_path / "store" / "model-1"
    with cache.locked(entry):
        cache.store(entry, fill)
    return entry


def fill(folder: Path) -> None:
    (folder / "small.json").write_text("{}")
    with (folder / "big.bin").open("wb") as file:
        file.write(bytes(range(256)) * (1 << 17))  # two pieces


def test_what_was_stored_is_whole(entry):
    assert cache.find_problem(entry) is None
    assert {p.name for p in entry.iterdir()} == {"small.json", "big.bin", cache.MANIFEST}
    assert cache.entry_size(entry) > 1 << 25


@pytest.mark.parametrize("place", [0, 12_345_678, (1 << 25) - 1])
def test_a_flipped_bit_is_found(entry, place):
    with (entry / "big.bin").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    assert cache.find_problem(entry) == "big.bin has changed content"


def test_a_cut_or_missing_file_is_found(entry):
    with (entry / "big.bin").open("r+b") as file:
        file.truncate((1 << 25) - 1)
    assert "has 33554431 bytes instead of 33554432" in str(cache.find_problem(entry))
    (entry / "big.bin").unlink()
    assert "big.bin can't be read" in str(cache.find_problem(entry))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"files": {}, "digest": "0"}', '{"files": 3, "digest": 4}']
)
def test_a_damaged_manifest_is_found(entry, content):
    (entry / cache.MANIFEST).write_text(content)
    assert cache.find_problem(entry) is not None


def test_a_manifest_that_hides_a_change_is_found(entry):
    manifest = entry / cache.MANIFEST
    manifest.write_text(manifest.read_text().replace('"size": 2', '"size": 3'))
    assert cache.find_problem(entry) == f"{cache.MANIFEST} was changed"


def test_a_new_entry_takes_the_place_of_the_old_and_leftovers_go(entry):
    killed = entry.parent / f".{entry.name}.tmp-killed"
    killed.mkdir()
    (killed / "half").write_text("half")
    with cache.locked(entry):
        cache.store(entry, lambda folder: (folder / "new").write_text("new") and None)
    assert {p.name for p in entry.iterdir()} == {"new", cache.MANIFEST}
    assert {p.name for p in entry.parent.iterdir()} == {entry.name, f".{entry.name}.lock"}


def test_a_file_in_the_place_of_an_entry_is_found_and_replaced(tmp_path):
    entry = tmp_path / "model"
    entry.write_text("in the way")
    assert cache.find_problem(entry) is not None
    with cache.locked(entry):
        cache.store(entry, fill)
    assert cache.find_problem(entry) is None
    assert {p.name for p in tmp_path.iterdir()} == {entry.name, f".{entry.name}.lock"}


def test_a_failed_write_leaves_the_old_entry(entry):
    def fail(folder: Path) -> None:
        (folder / "part").write_text("part")
        raise OSError(28, "No space left on device")

    with cache.locked(entry), pytest.raises(OSError, match="No space"):
        cache.store(entry, fail)
    assert cache.find_problem(entry) is None
    assert {p.name for p in entry.parent.iterdir()} == {entry.name, f".{entry.name}.lock"}


def test_one_writer_at_a_time(tmp_path):
    entry, inside, most = tmp_path / "model", [], []

    def write() -> None:
        with cache.locked(entry):
            inside.append(1)
            most.append(len(inside))
            cache.store(entry, fill)
            inside.pop()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert cache.find_problem(entry) is None


def test_unwritable_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), cache.locked(tmp_path / "file" / "model"):
        pass


def test_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TORCHLAMP_CACHE")
    assert cache.cache_folder() == tmp_path / "xdg" / "torchlamp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "torchlamp"
