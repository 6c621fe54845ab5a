import pytest

from torchlamp.sweep import memory


def test_this_machine_has_some():
    assert 10**6 < memory.free_memory() < 10**15


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "7", 4096), ("3000", "1000", 2000), ("9000", "1000", 4096), ("5", "7", 0)],
)
def test_a_container_allows_less(tmp_path, monkeypatch, limit, used, expected):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    assert memory.free_memory() == expected


def test_a_system_that_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(memory.os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError))
    assert memory.free_memory() == 2 * 10**9
