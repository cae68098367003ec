"""What lockd writes down for a successor, and how that reads it."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lockfs.lockd import state
from lockfs.lockd.state import (
    AttachedAs,
    Begin,
    HoldIs,
    HoldLeft,
    ImageLost,
    MountIs,
    MountLeft,
    OtherFormat,
    Record,
    State,
)
from lockfs.protocol.messages import HeldBy, Image, Mount, Owner

BEGIN = Begin(state.FORMAT, "1.0", "host-a", "boot")
MOUNT = MountIs("m1", Mount("/srv", "/mnt", "ext4", {"rw": ""}, "nop", {"wait": "3"}), 4711, 99, (7, 2), 1.5)
ATTACHED = AttachedAs("m1", 40, "passthrough")


def hold(owner: str = "x", ino: int = 1, count: int = 1, nodes: tuple[int, ...] = (5,), mount: str = "m1") -> HoldIs:
    by = HeldBy(Owner(owner, 1, "qemu", "vm"), "exclusive", count, list(nodes), 2.5)
    return HoldIs(mount, Image(7, ino, "im\\x00g", f"/mnt/{ino}"), by)


def free(owner: str = "x", ino: int = 1, mount: str = "m1") -> HoldLeft:
    return HoldLeft(mount, 7, ino, owner, "exclusive")


ALL: list[Record] = [
    BEGIN, MOUNT, ATTACHED, hold(), hold("y"), hold("y", 2), ImageLost(7, 2), free(), hold("y", 1, 3, (5, 9)),
]  # fmt: skip


def replay(*records: Record) -> State:
    return state.replay(b"".join(map(state.encode, records)))


def test_what_records_add_up_to() -> None:
    found = replay(*ALL)
    assert not found.damaged
    assert found.begin == BEGIN
    mount = found.mounts["m1"]
    assert (mount.mount, mount.attached) == (MOUNT, ATTACHED)
    assert {identity: list(image.holds) for identity, image in mount.images.items()} == {
        (7, 1): [("y", "exclusive")],
        (7, 2): [("y", "exclusive")],
    }
    assert mount.images[7, 1].nodes == {5, 9}
    assert [mount.images[7, ino].lost for ino in (1, 2)] == [False, True]


def test_a_mount_that_left_and_an_image_that_nobody_holds_are_forgotten() -> None:
    assert replay(*ALL, MountLeft("m1")).mounts == {}
    assert replay(*ALL, free("y"), free("y", 2)).mounts["m1"].images == {}
    assert not replay(*ALL, free("y", 2), hold("y", 2)).mounts["m1"].images[7, 2].lost


def test_records_of_what_is_not_known_mean_nothing() -> None:
    found = replay(BEGIN, ATTACHED, hold(), free(), ImageLost(7, 1), MountLeft("m2"))
    assert found.mounts == {}
    assert not found.damaged


def test_written_anew_it_is_the_same() -> None:
    found = replay(*ALL)
    again = state.replay(state.lines(BEGIN, found.records()))
    assert again == found
    assert state.replay(state.lines(BEGIN, [*found.records(), *found.records()])) == found


@given(st.data())
def test_cut_anywhere_it_is_what_was_written_before(data: st.DataObject) -> None:
    """Death may tear the last record, and only that."""
    records = data.draw(st.lists(st.sampled_from(ALL[1:]), max_size=12))
    lines = [state.encode(each) for each in (BEGIN, *records)]
    cut = data.draw(st.integers(0, len(b"".join(lines))))
    found = state.replay(b"".join(lines)[:cut])
    assert not found.damaged
    whole, size = 0, 0
    while whole < len(lines) and size + len(lines[whole]) - 1 <= cut:  # the end of the line may be missing
        size += len(lines[whole])
        whole += 1
    assert found == state.replay(b"".join(lines[:whole]))


@given(st.integers(0, 8), st.integers(0, 60), st.integers(1, 255))
@example(0, 0, 0x20)  # a checksum in capital letters is not one that we have written
@example(1, 0, 0x20)
@example(2, 0, 0x20)
def test_damage_is_noticed(record: int, at: int, flip: int) -> None:
    lines = [bytearray(state.encode(each)) for each in ALL] + [bytearray(state.encode(free("z")))]
    line = lines[record]
    at %= len(line) - 1
    line[at] ^= flip
    try:
        found = state.replay(b"".join(map(bytes, lines)))
    except OtherFormat:
        pytest.fail("damage is not another format")
    assert found.damaged


def test_another_format_is_refused_and_named() -> None:
    with pytest.raises(OtherFormat, match=r"the state of lockd 9.0 \(format 2\) cannot be read") as caught:
        replay(Begin(2, "9.0", "host-a", "boot"))
    assert "unmount all lockfs mounts" in caught.value.hint


def test_another_format_may_have_another_beginning() -> None:
    text = b'["begin",2,"9.0",{"more":1}]'
    line = b"%08x %s\n" % (zlib.crc32(text), text)
    with pytest.raises(OtherFormat, match=r"lockd 9\.0"):
        state.replay(line)
