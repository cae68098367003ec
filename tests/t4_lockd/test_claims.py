"""What the last lockd had granted keeps others out until it is known what has become of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from lockfs.backend import Mode
from lockfs.errors import LockUnavailable
from lockfs.lockd import state, statefile
from lockfs.lockd.claims import PATIENCE, Claims
from lockfs.lockd.state import Begin, HoldIs, MountIs, MountLeft, State
from lockfs.lockd.statefile import StateFile
from lockfs.protocol.errors import HeldError
from lockfs.protocol.messages import HeldBy, Image, ModeName, Mount, Owner

EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED
IMAGE, OTHER = (7, 1), (7, 2)


def mount_is(name: str = "m1") -> MountIs:
    return MountIs(name, Mount("/srv", f"/mnt/{name}", "ext4", {}, "nop"), 4711, 1, (7, 99), 1.0)


def hold(mount: str = "m1", ino: int = 1, mode: ModeName = "exclusive", owner: str = "x") -> HoldIs:
    by = HeldBy(Owner(owner, 42, "qemu"), mode, nodes=[ino], since=2.0)
    return HoldIs(mount, Image(7, ino, f"img{ino}", f"/mnt/img{ino}"), by)


def claims(*records: state.Record, damaged: bool = False) -> Claims:
    found = State(damaged=damaged)
    for record in records:
        found.apply(record)
    return Claims(found, "here")


async def test_who_asks_waits_for_the_mount_to_come_back(autojump_clock: MockClock) -> None:
    made = claims(mount_is(), hold())
    claim = made.all()[0]

    async def come_back() -> None:
        await trio.sleep(3)
        made.settle(claim)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        await made.clear(OTHER, EXCLUSIVE, 0)
        assert trio.current_time() < 1
        await made.clear(IMAGE, EXCLUSIVE, 0)
        assert trio.current_time() >= 3
    assert len(made) == 0


async def test_an_image_is_free_as_soon_as_it_is_settled_itself(autojump_clock: MockClock) -> None:
    made = claims(mount_is(), mount_is("m2"), hold(), hold("m2"))
    one, two = made.all()
    made.settle_image(one, IMAGE)
    assert made.strongest(IMAGE) is EXCLUSIVE
    made.settle_image(two, IMAGE)
    assert made.strongest(IMAGE) is None
    await made.clear(IMAGE, EXCLUSIVE, 0)
    assert len(made) == 2


async def test_a_mount_that_stays_away_makes_it_unavailable(autojump_clock: MockClock) -> None:
    made = claims(mount_is(), hold())
    begin = trio.current_time()
    with pytest.raises(LockUnavailable, match=r"has not heard yet what is held by way of /mnt/m1 \(process 4711\)"):
        await made.clear(IMAGE, EXCLUSIVE, 1)
    assert trio.current_time() - begin == pytest.approx(PATIENCE)


async def test_who_writes_on_without_daemons_is_named(autojump_clock: MockClock) -> None:
    made = claims(mount_is(), hold(), hold(ino=2, mode="shared"))
    made.orphan(made.all()[0])
    begin = trio.current_time()
    with pytest.raises(HeldError) as caught:
        await made.clear(IMAGE, SHARED, 0.3)
    assert trio.current_time() - begin == pytest.approx(0.3)
    holder = caught.value.holder
    assert (holder.host, holder.pid, holder.command, holder.since, holder.path) == ("here", 42, "qemu", 2.0, "/mnt/img1")
    assert caught.value.here
    assert made.holders(IMAGE) == [holder]
    await made.clear(OTHER, SHARED, 0)
    with pytest.raises(HeldError):
        await made.clear(OTHER, EXCLUSIVE, 0)


async def test_a_state_that_cannot_be_read_makes_all_wait(autojump_clock: MockClock) -> None:
    made = claims(mount_is(), damaged=True)
    begin = trio.current_time()
    await made.clear(OTHER, EXCLUSIVE, 0)
    assert trio.current_time() - begin == pytest.approx(PATIENCE)
    again = claims(mount_is(), damaged=True)
    again.settle(again.all()[0])
    await again.clear(OTHER, EXCLUSIVE, 0)
    assert trio.current_time() - begin == pytest.approx(PATIENCE)


# The file ----------------------------------------------------------------------------------------


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    file = StateFile(str(tmp_path), "here", State())
    file.write(mount_is(), hold())
    found = statefile.read(str(tmp_path))
    assert found.mounts == file.state.mounts
    again = StateFile(str(tmp_path), "here", found)
    file.close()
    again.note(MountLeft("m1"))
    again.close()
    assert not (tmp_path / statefile.NAME).exists()


def test_a_file_of_another_boot_says_nothing(tmp_path: Path) -> None:
    (tmp_path / statefile.NAME).write_bytes(state.lines(Begin(state.FORMAT, "1.0", "here", "earlier"), [mount_is(), hold()]))
    assert statefile.read(str(tmp_path)).mounts == {}


def test_a_file_of_rubbish_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / statefile.NAME).write_bytes(b"\0" * 4096)
    assert statefile.read(str(tmp_path)).damaged
    assert "cannot be read" in caplog.text


def test_it_does_not_grow_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "SLACK", 2000)
    file = StateFile(str(tmp_path), "here", State())
    file.write(mount_is())
    for _ in range(500):
        file.write(hold())
        assert (tmp_path / statefile.NAME).stat().st_size < 6000
    assert statefile.read(str(tmp_path)).mounts == file.state.mounts
    file.close()


def test_a_full_filesystem_grants_nothing_and_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(str(tmp_path), "here", State())
    file.write(mount_is())
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
        with pytest.raises(LockUnavailable, match="No space left"):
            file.write(hold())
    before = statefile.read(str(tmp_path))
    assert before.mounts["m1"].images == {}
    file.write(hold(ino=2))
    found = statefile.read(str(tmp_path))
    assert not found.damaged
    assert list(found.mounts["m1"].images) == [OTHER]

    def fails(fd: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        file.note(MountLeft("m1"))  # what ends, ends
    assert file.state.mounts == {}
    file.close()
