import os
import resource
import signal
from pathlib import Path

import pytest

from torchlamp.results.output import check_writable, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "out.json"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
    write_text(path, "one ü")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_keeps_permissions_and_follows_links(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_bad_paths_are_found_before_the_work(tmp_path):
    with pytest.raises(OSError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OSError, match="there is no folder"):
        check_writable(tmp_path / "missing" / "out.json")
    with pytest.raises(OSError, match="can't write '/proc/"):
        check_writable(Path("/proc/out.json"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_device_is_reported_and_not_replaced():
    before = os.stat("/dev/full")
    check_writable(Path("/dev/full"))
    with pytest.raises(OSError, match="can't write '/dev/full': No space left"):
        write_text(Path("/dev/full"), "text")
    assert os.stat("/dev/full").st_rdev == before.st_rdev


def test_full_disk_leaves_the_older_file(tmp_path):
    path = tmp_path / "out.json"
    write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="can't write"):
            write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
