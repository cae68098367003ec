"""The journal's records and what they amount to."""

from __future__ import annotations

import struct
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.fs.journal import records as r
from lockfs.fs.journal.state import JournalError, replay
from lockfs.protocol.messages import Owner

OWNER = Owner("process:1:2", 1, "qemu", "vm", 0)
HOLD = r.Hold(OWNER, "exclusive")
BEGIN = r.Begin(r.FORMAT, "id", 7, "passthrough", "ext4", b"init", {"source": "/s"})


def opened(serial: int, number: int, node: int = 2, **more: object) -> r.Opened:
    values: dict[str, object] = {
        "serial": serial, "number": number, "node": node, "flags": 2, "writable": True, "uid": 0, "gid": 0, "unique": 100 + serial,
        "counted": True, "mappable": True, "hold": HOLD, "manager": None, **more,
    }  # fmt: skip
    return r.Opened(**values)  # type: ignore[arg-type]


ALL: list[r.Record] = [
    BEGIN, r.Found(2, 1, 5, 1, b"na\xffme", b"handle"), r.Found(3, 1, 6, 1, b"x", None), r.Looked(2, -1), r.Moved(2, 3, b"\0"),
    r.Pinned(2), r.Fenced(2), r.Forgotten(3), opened(1, 1), opened(2, 2, hold=None, manager=OWNER), r.Answered(1), r.Took(2, HOLD), r.Closed(1, True),
    r.Freed(1), r.Backed(2, 9), r.Unbacked(9), r.OpenedDirectory(3, 1, 44), r.Listed(3, [b"a", b"\xff"]), r.ClosedDirectory(3),
    r.Intended(1 << 62, (1, 2), (3, 4), 5), r.Done(1 << 62, 6, 7), r.Undone(8),
]  # fmt: skip


def written(*records: r.Record) -> bytes:
    return b"".join(map(r.encode, records))


def test_what_is_written_is_read() -> None:
    assert list(r.decode(written(*ALL))) == ALL


def test_every_kind_is_tried() -> None:
    assert {type(each) for each in ALL} == set(r.Any.__args__)


def test_a_torn_record_is_the_end() -> None:
    data = written(*ALL)
    ends = [len(written(*ALL[:count])) for count in range(len(ALL) + 1)]
    for size in range(len(data)):
        whole = sum(1 for end in ends[1:] if end <= size)
        assert list(r.decode(data[:size])) == ALL[:whole]


@given(st.integers(0, len(written(*ALL)) - 1), st.integers(1, 255))
def test_a_damaged_record_is_the_end(at: int, change: int) -> None:
    data = bytearray(written(*ALL))
    data[at] ^= change
    found = list(r.decode(bytes(data)))
    assert found == ALL[: len(found)]
    assert len(written(*found)) <= at


def test_another_version_is_refused() -> None:
    with pytest.raises(JournalError, match="format 2"):
        replay(written(msgspec.structs.replace(BEGIN, format=r.FORMAT + 1)))
    body = msgspec.msgpack.encode([99, 1])
    with pytest.raises(JournalError, match="another version"):
        replay(written(BEGIN) + struct.pack("<II", len(body), zlib.crc32(body)) + body)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, written(r.Looked(1, 1), BEGIN)], ids=["empty", "zeroes", "no beginning"])
def test_what_is_no_journal(data: bytes) -> None:
    with pytest.raises(JournalError, match="no beginning"):
        replay(data)


def test_nodes() -> None:
    state = replay(written(BEGIN, r.Found(2, 1, 5, 1, b"a", b"h"), r.Looked(2, 3), r.Looked(2, -1), r.Moved(2, 1, b"b"), r.Pinned(2), r.Fenced(2),
                           r.Found(9, 1, 6, 2, b"c", b"g"), r.Forgotten(9)))  # fmt: skip
    assert list(state.nodes) == [2]
    node = state.nodes[2]
    assert (node.lookups, node.name, node.parent, node.pinned, node.fenced) == (2, b"b", 1, True, True)
    assert state.last_node == 9


def test_open_files() -> None:
    state = replay(written(BEGIN, opened(1, 1), opened(2, 2), opened(3, 7), r.Closed(1, True), r.Closed(2, False)))
    assert list(state.files) == [3]
    assert list(state.lingering) == [1]
    assert (state.last_serial, state.last_number) == (3, 7)
    assert not replay(written(BEGIN, opened(1, 1), r.Closed(1, True), r.Freed(1))).lingering


def test_whether_the_kernel_knows_of_an_open_file() -> None:
    state = replay(written(BEGIN, opened(1, 1), opened(2, 2), r.Answered(1), opened(3, 3, answered=True), r.Took(3, HOLD)))
    assert {serial for serial, each in state.files.items() if each.answered} == {1, 3}


def test_what_lingers_outlives_a_replacement_of_the_file() -> None:
    state = replay(written(BEGIN, opened(1, 0)))
    assert not state.files
    assert list(state.lingering) == [1]


def test_a_managers_handle_takes_its_hold_later() -> None:
    state = replay(written(BEGIN, opened(1, 1, hold=None, manager=OWNER), r.Took(1, HOLD)))
    assert (state.files[1].hold, state.files[1].manager) == (HOLD, None)


def test_backing_ids() -> None:
    in_use = replay(written(BEGIN, r.Backed(2, 5), opened(1, 1)))
    assert (in_use.backed, in_use.abandoned, in_use.last_backing_id) == ({2: 5}, set(), 5)
    # Taken, and the open never came; released, and the daemon died before it was given back.
    for rest in ([], [opened(1, 1), r.Closed(1, False)]):
        left = replay(written(BEGIN, r.Backed(2, 5), *rest))
        assert (left.backed, left.abandoned) == ({}, {5})
    done = replay(written(BEGIN, r.Backed(2, 5), opened(1, 1), r.Closed(1, False), r.Unbacked(5)))
    assert (done.backed, done.abandoned, done.last_backing_id) == ({}, set(), 5)
    again = replay(written(BEGIN, r.Backed(2, 5), r.Backed(2, 6), r.Unbacked(5), opened(1, 1)))
    assert (again.backed, again.abandoned) == ({2: 6}, set())


def test_requests() -> None:
    state = replay(written(BEGIN, r.Intended(10), r.Intended(12), r.Done(12, 3), r.Intended(14), r.Undone(14)))
    assert list(state.intended) == [10]
    assert state.done == {12: r.Done(12, 3)}


def test_numbers_go_on_where_they_were() -> None:
    begin = msgspec.structs.replace(BEGIN, last_node=50, last_serial=60, last_number=70, last_backing_id=80)
    state = replay(written(begin, r.Found(2, 1, 5, 1, b"a", b"h"), opened(1, 1)))
    assert (state.last_node, state.last_serial, state.last_number, state.last_backing_id) == (50, 60, 70, 80)
