import json
import math
import os
import resource

import pytest

from torchlamp.results.journal import Journal

RECORDS = [{"n": 1, "text": "ä\u2028\r\n"}, {"n": 2}, {"n": 3, "x": [0.5, None]}]


@pytest.fixture
def journal(tmp_path) -> Journal:
    found = Journal(tmp_path / "a.jsonl", "test/1")
    for record in RECORDS:
        found.append(record)
    return found


def whole(records) -> list[dict]:
    return [{"schema": "test/1"} | r for r in records]


def test_what_is_added_is_read(journal):
    assert journal.read() == journal.recover() == whole(RECORDS)
    assert len(journal.path.read_text().split("\n")) == 4


def test_a_missing_file_is_empty(tmp_path):
    assert Journal(tmp_path / "none.jsonl", "test/1").recover() == []


def test_figures_that_are_not_finite_become_null(journal):
    journal.append({"kl": math.inf, "all": [math.nan, 1.0]})
    assert journal.read()[-1] == {"schema": "test/1", "kl": None, "all": [None, 1.0]}


@pytest.mark.parametrize("cut", [1, 2, 5, 20])
def test_a_torn_last_line_is_set_aside(journal, cut, caplog):
    data = journal.path.read_bytes()
    journal.path.write_bytes(data[:-cut])
    assert journal.read() == whole(RECORDS[:-1])
    assert journal.path.read_bytes() == data[:-cut]
    assert journal.recover() == whole(RECORDS[:-1])
    assert "is torn" in caplog.text
    assert "a.torn-1" in caplog.text
    good = data[: data.rindex(b"\n", 0, -1) + 1]
    assert journal.path.read_bytes() == good
    assert good + (journal.path.parent / "a.torn-1").read_bytes() == data[:-cut]
    journal.append(RECORDS[-1])
    assert journal.path.read_bytes() == data


def test_each_torn_line_has_a_file_of_its_own(journal):
    for number in (1, 2):
        with journal.path.open("ab") as file:
            file.write(b"\x00\x00\xff{" * number)
        assert journal.recover() == whole(RECORDS)
        assert (journal.path.parent / f"a.torn-{number}").read_bytes() == b"\x00\x00\xff{" * number


def test_a_broken_last_line_with_an_end_is_torn_too(journal):
    with journal.path.open("ab") as file:
        file.write(b'{"n": 4\n')
    assert journal.recover() == whole(RECORDS)


@pytest.mark.parametrize("line", ['{"n": 4', "[1]", "\x00"])
def test_a_broken_line_in_the_middle_is_an_error_and_changes_nothing(journal, line):
    text = journal.path.read_text()
    first, rest = text.split("\n", 1)
    journal.path.write_text(f"{first}\n{line}\n{rest}")
    before = journal.path.read_bytes()
    with pytest.raises(ValueError, match=r"a\.jsonl', line 2: .*; repair or remove that line"):
        journal.recover()
    assert journal.path.read_bytes() == before


def test_another_version_is_an_error_and_changes_nothing(journal):
    with journal.path.open("a") as file:
        file.write(json.dumps({"schema": "test/2", "n": 4}) + '\n{"torn')
    before = journal.path.read_bytes()
    with pytest.raises(ValueError, match=r"line 4: schema 'test/2' was written by another version.*--fresh"):
        journal.recover()
    assert journal.path.read_bytes() == before
    assert os.listdir(journal.path.parent) == ["a.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="limits of Unix")
def test_a_full_disk_leaves_no_half_line(journal):
    """The system lets half of the line through and refuses the rest, as a full disk does."""
    before = journal.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(len(before) + 1000, 1 << 16), hard))
    try:
        with pytest.raises(OSError, match=r"can't write '.*a\.jsonl': .*same command continues"):
            journal.append({"long": "x" * (1 << 17)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert journal.path.read_bytes() == before
    journal.append({"n": 4})
    assert len(journal.read()) == 4


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_not_synced_is_taken_back(journal, monkeypatch, stop):
    before = journal.path.read_bytes()

    def fsync(descriptor):
        raise stop

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(type(stop)):
        journal.append({"n": 4})
    assert journal.path.read_bytes() == before


def test_a_folder_that_can_not_be_written(tmp_path):
    with pytest.raises(OSError, match=r"can't write .*: No such file or directory"):
        Journal(tmp_path / "missing" / "a.jsonl", "test/1").append({})
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(OSError, match=r"can't read .*: Is a directory"):
        Journal(tmp_path / "b.jsonl", "test/1").read()


def test_lines_that_were_read_are_not_parsed_again(journal, monkeypatch):
    data = journal.path.read_bytes()
    journal.path.write_bytes(data + b"{")
    lines = journal.lines()
    monkeypatch.setattr("torchlamp.results.journal.read_lines", lambda *_: pytest.fail("parsed again"))
    assert journal.recover(lines) == whole(RECORDS)
    assert journal.path.read_bytes() == data


def test_lines_that_are_nested_without_end(journal):
    good = journal.path.read_bytes()
    deep = b"[" * 200_000 + b"]" * 200_000 + b"\n"
    journal.path.write_bytes(deep + good)
    with pytest.raises(ValueError, match="line 1: nested too deeply; repair or remove that line"):
        journal.read()
    journal.path.write_bytes(good + deep)
    assert journal.read() == whole(RECORDS)
