"""The file of the journal: what is in it at any moment, how it is replaced, and what becomes of one that cannot be written."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import mounts

from lockfs.fs.journal import file, records
from lockfs.fs.journal.file import Journal
from lockfs.fs.journal.records import Begin, Found, Record, decode
from lockfs.fs.journal.state import JournalError, replay

BEGIN = Begin(records.FORMAT, "id", 7, "gated", "ext4", b"init", {})


def found(node: int) -> Found:
    return Found(node, 1, node, 1, b"name", b"handle")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mounts" / "id.journal"


@pytest.fixture
def journal() -> Iterator[Journal]:
    made = Journal()
    yield made
    made.close()


def read(path: Path) -> list[Record]:
    return list(decode(path.read_bytes()))


def test_nothing_is_written_before_it_is_begun(journal: Journal, tmp_path: Path) -> None:
    journal.note(found(2))
    journal.looked(2, 1)
    journal.flush()
    assert not journal.begun
    assert list(tmp_path.iterdir()) == []


def test_what_was_noted_is_written_at_once(journal: Journal, path: Path) -> None:
    journal.begin(str(path), lambda: [BEGIN])
    journal.note(found(2))
    assert read(path) == [BEGIN]
    journal.flush()
    assert read(path) == [BEGIN, found(2)]


def test_lookups_are_added_up(journal: Journal, path: Path) -> None:
    journal.begin(str(path), lambda: [BEGIN])
    for count in (1, 1, 1, -1):
        journal.looked(2, count)
    journal.looked(3, 1)
    journal.looked(3, -1)
    journal.looked(4, 1)
    journal.forgotten(4)
    journal.flush()
    assert read(path) == [BEGIN, records.Forgotten(4), records.Looked(2, 2)]


def test_it_is_replaced_when_it_has_grown(journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "MIN_SIZE", 1000)
    journal.begin(str(path), lambda: [BEGIN, found(99)])
    sizes = []
    for _ in range(500):
        journal.looked(2, 1)
        journal.flush()
        sizes.append(path.stat().st_size)
    assert max(sizes) < 1100
    assert sum(1 for before, after in itertools.pairwise(sizes) if after < before) > 2
    assert read(path)[:2] == [BEGIN, found(99)]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_one_takes_the_place_of_another_as_a_whole(journal: Journal, path: Path) -> None:
    journal.begin(str(path), lambda: [BEGIN, found(2)])

    def breaks() -> Iterator[Record]:
        yield BEGIN
        raise KeyError

    successor = Journal()
    with pytest.raises(KeyError):
        successor.begin(str(path), breaks)
    assert read(path) == [BEGIN, found(2)]
    assert not successor.begun


def test_one_that_cannot_be_written_is_of_no_use(journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", small], check=True)
    try:
        path = small / "id.journal"
        journal.begin(str(path), lambda: [BEGIN])
        for _ in range(40):
            journal.note(records.Listed(1, [bytes(1000)]))
            journal.flush()
        assert not journal.begun
        assert "will have no successor" in caplog.text
        with pytest.raises(JournalError):
            replay(path.read_bytes())
    finally:
        journal.close()
        assert mounts.umount(small) == ""


def test_one_that_cannot_be_begun_leaves_none_that_is_out_of_date(journal: Journal, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", small], check=True)
    try:
        path = small / "id.journal"
        journal.begin(str(path), lambda: [BEGIN])
        with pytest.raises(OSError, match="No space left"):
            Journal().begin(str(path), lambda: [BEGIN, records.Listed(1, [bytes(20_000)])])
        assert path.read_bytes() == b""
    finally:
        journal.close()
        assert mounts.umount(small) == ""


def test_it_is_removed(journal: Journal, path: Path) -> None:
    journal.begin(str(path), lambda: [BEGIN])
    journal.remove()
    assert not path.exists()
    assert not journal.begun
