"""What is fcntl-lockd's own: which byte, which file, what it refuses to be mounted on, and its cards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from harness import mounts
from lockfs_fcntl_lockd import lockspace as lockspaces
from lockfs_fcntl_lockd import preflight
from t3_backends.stations import station

from lockfs.backend import UNKNOWN_HOST, Busy, Holder, Mode
from lockfs.errors import LockUnavailable, MountError
from lockfs.linux import mount as mount_calls
from lockfs.linux import ofd

EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED
HERE = ("host-a", "host-b")


def direct(share: Path, host: str = "host-a", **options: str) -> Any:
    return station(host, share, "fcntl-lockd", options)


def card_of(share: Path, name: str = "img") -> Path:
    return share / ".lockfs" / "holders" / f"{(share / name).stat().st_ino:x}.json"


# The lock ----------------------------------------------------------------------------------------


async def test_it_is_byte_0_and_nothing_else(storage: Path) -> None:
    async with direct(storage) as a:
        grant = await a.acquire()
        with (storage / "img").open("r+b") as file:
            assert ofd.test(file.fileno(), exclusive=True, start=0, length=1) is not None
            assert ofd.test(file.fileno(), exclusive=True, start=1, length=0) is None
        await a.release(grant)


async def test_a_posix_lock_is_respected_and_its_process_named(storage: Path) -> None:
    """As virtlockd takes it, on this very host."""
    async with direct(storage) as a:
        image = a.image()
        code = (
            "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 0);"
            "print('locked', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, storage / "img"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            process.stdout.readline()
            command = Path(f"/proc/{process.pid}/comm").read_text().strip()
            with pytest.raises(Busy) as caught:
                await a.backend.acquire(image, EXCLUSIVE, a.holder(EXCLUSIVE))
            assert caught.value.holder == Holder("host-a", EXCLUSIVE, process.pid, command)
            process.communicate()
        await a.release(await a.acquire())


async def test_a_posix_lock_is_refused(storage: Path) -> None:
    async with direct(storage) as a:
        grant = await a.acquire()
        with (storage / "img").open("r+b") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        await a.release(grant)


async def test_what_cannot_be_locked_is_not_granted(storage: Path) -> None:
    (storage / "img").touch()
    async with direct(storage) as a:
        read_only = a.image(flags=os.O_RDONLY)
        with pytest.raises(LockUnavailable, match=r"cannot lock /mnt/images/img: the file could not be opened"):
            await a.backend.acquire(read_only, EXCLUSIVE, a.holder(EXCLUSIVE))
        assert not card_of(storage).exists()


# Lock files --------------------------------------------------------------------------------------


async def test_lock_files_are_named_as_virtlockd_names_them(storage: Path, lockspace: Path) -> None:
    # The example of libvirt's own naming: /var/lib/libvirt/images/demo.img
    assert (
        lockspaces.name_of(b"/var/lib/libvirt/images/demo.img")
        == "6f716e8c06fc109acd342e3c129a17ccf3c473c1c76363b543a1cbb55d1cd778"
    )
    async with direct(storage, lockspace=str(lockspace), key="path") as a:
        grant = await a.acquire()
        (file,) = lockspace.iterdir()
        assert file.name == hashlib.sha256(b"/mnt/images/img").hexdigest()
        assert file.stat().st_mode & 0o7777 == 0o600
        assert ofd.test(grant.keep[0], exclusive=True, start=1, length=0) is None
        with file.open("r+b") as other:
            assert ofd.test(other.fileno(), exclusive=True, start=0, length=1) is not None
        await a.release(grant)
        assert not file.exists()


async def test_with_inode_as_key_names_do_not_matter(storage: Path, lockspace: Path) -> None:
    async with (
        direct(storage, "host-a", lockspace=str(lockspace), key="inode") as a,
        direct(storage, "host-b", lockspace=str(lockspace), key="inode") as b,
    ):
        grant = await a.acquire(name="one")
        os.link(storage / "one", storage / "two")
        with pytest.raises(Busy):
            await b.acquire(name="two")
        await a.release(grant)


async def test_a_lock_file_that_was_replaced_meanwhile_is_not_taken_for_the_lock(
    lockspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and lock another host lets go, which removes the file, and a third makes it anew."""
    directory = os.open(lockspace, os.O_RDONLY)
    real, races = ofd.lock, 3

    def lock(fd: int, **how: Any) -> bool:
        nonlocal races
        if races:
            races -= 1
            (lockspace / "name").unlink()
            if races != 1:
                (lockspace / "name").touch()
        return real(fd, **how)

    monkeypatch.setattr(ofd, "lock", lock)
    fd = lockspaces.take(directory, "name", exclusive=True)
    assert fd is not None
    assert os.fstat(fd).st_ino == (lockspace / "name").stat().st_ino
    assert races == 0
    lockspaces.give_back(directory, "name", fd, exclusive=True)
    os.close(directory)


def test_a_lock_file_is_removed_by_the_last_who_shares_it(lockspace: Path) -> None:
    directory = os.open(lockspace, os.O_RDONLY)
    fds = [lockspaces.take(directory, "name", exclusive=False) for _ in range(3)]
    for number, fd in enumerate(fds):
        assert (lockspace / "name").exists()
        assert fd is not None
        lockspaces.give_back(directory, "name", fd, exclusive=False)
        assert (lockspace / "name").exists() == (number < 2)
    os.close(directory)


def test_what_is_no_file_is_no_lock_file(lockspace: Path) -> None:
    directory = os.open(lockspace, os.O_RDONLY)
    os.mkfifo(lockspace / "fifo")
    (lockspace / "link").symlink_to("elsewhere")
    with pytest.raises(LockUnavailable, match="is not a file"):
        lockspaces.take(directory, "fifo", exclusive=True)
    with pytest.raises(OSError, match="symbolic links"):
        lockspaces.take(directory, "link", exclusive=True)
    assert not (lockspace / "elsewhere").exists()
    os.close(directory)


# Preflight ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fstype", "options", "wrong"),
    [
        ("nfs", "rw,relatime,vers=3,hard,nolock,proto=tcp,mountproto=tcp,local_lock=all,addr=10.0.0.1", "local_lock=all"),
        ("nfs", "rw,vers=3,hard,nolock,proto=tcp,local_lock=none", "nolock"),
        ("nfs", "rw,vers=3,hard,local_lock=posix", "local_lock=posix"),
        ("nfs", "rw,vers=3,hard,local_lock=flock", ""),
        ("nfs", "rw,vers=3,hard,local_lock=none", ""),
        ("nfs4", "rw,vers=4.2,hard,local_lock=none,clientaddr=10.0.0.2", ""),
        ("nfs4", "rw,vers=4.2,hard,local_lock=all", "local_lock=all"),
        ("cifs", "rw,vers=3.1.1,nobrl", "nobrl"),
        ("cifs", "rw,vers=3.1.1,cache=strict", ""),
        ("gfs2", "rw,noatime", ""),
        ("gfs2", "rw,localflocks", "localflocks"),
        ("gfs2", "rw,lockproto=lock_nolock", "lockproto=lock_nolock"),
        ("ocfs2", "rw,_netdev,heartbeat=local,coherency=full", ""),
        ("ext4", "rw,nolock", ""),
    ],
)  # fmt: skip
def test_filesystems_that_keep_locks_to_themselves_are_refused(fstype: str, options: str, wrong: str) -> None:
    parsed = {name: value for name, _, value in (each.partition("=") for each in options.split(","))}
    if not wrong:
        preflight.check_options("/srv", fstype, parsed)
        return
    with pytest.raises(MountError) as caught:
        preflight.check_options("/srv", fstype, parsed)
    assert f"is mounted with {wrong}: other hosts do not see its locks" in str(caught.value)
    assert wrong in caught.value.hint


async def test_a_share_that_is_refused_is_left_as_it_was(storage: Path) -> None:
    with pytest.raises(MountError, match="nolock"):
        async with station("a", storage, "fcntl-lockd", {}, fstype="nfs", fsoptions={"nolock": ""}):
            pytest.fail("it came up")
    assert list(storage.iterdir()) == []


async def test_with_a_lockspace_the_locks_of_the_images_do_not_matter(storage: Path, lockspace: Path) -> None:
    options = {"lockspace": str(lockspace)}
    async with station("a", storage, "fcntl-lockd", options, fstype="nfs", fsoptions={"nolock": ""}) as a:
        await a.release(await a.acquire())


@pytest.mark.parametrize("wrong", ["missing", "file"])
async def test_a_lockspace_must_be_a_directory(storage: Path, tmp_path: Path, wrong: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="cannot open the lockspace") as caught:
        async with direct(storage, lockspace=str(tmp_path / wrong)):
            pytest.fail("it came up")
    assert "all hosts share" in caught.value.hint


async def test_a_lockspace_must_be_writable(storage: Path, lockspace: Path, read_only: Callable[[Path], None]) -> None:
    read_only(lockspace)
    with pytest.raises(MountError, match="no files can be made in the lockspace"):
        async with direct(storage, lockspace=str(lockspace)):
            pytest.fail("it came up")


@pytest.fixture
def read_only(leaves_nothing: None) -> Any:
    """Make a directory read-only, for root too."""
    mounted: list[Path] = []

    def make(path: Path) -> None:
        mount_calls.mount(os.fsencode(path), os.fsencode(path), "", mount_calls.MS_BIND, "")
        mounted.append(path)
        flags = mount_calls.MS_BIND | mount_calls.MS_REMOUNT | mount_calls.MS_RDONLY
        mount_calls.mount(b"none", os.fsencode(path), "", flags, "")

    yield make
    for path in reversed(mounted):
        mounts.umount(path)


# Cards -------------------------------------------------------------------------------------------


async def test_the_card_is_there_with_the_lock_and_gone_after_it(storage: Path) -> None:
    async with direct(storage) as a:
        grant = await a.acquire()
        card = json.loads(card_of(storage).read_text())
        assert (card["host"], card["pid"], card["vm"], card["mode"]) == ("host-a", 4711, "vm1", "exclusive")
        assert card["path"] == "/mnt/images/img"
        await a.release(grant)
        assert not card_of(storage).exists()
        assert list(card_of(storage).parent.iterdir()) == []


async def test_no_cards_are_written_if_none_are_wanted(storage: Path) -> None:
    async with direct(storage, cards="no") as a, direct(storage, "host-b", cards="no") as b:
        grant = await a.acquire()
        assert sorted(path.name for path in storage.iterdir()) == ["img"]
        with pytest.raises(Busy) as caught:
            await b.acquire()
        assert caught.value.holder == Holder(UNKNOWN_HOST, EXCLUSIVE)
        await a.release(grant)


CARDS = {
    "empty": b"",
    "no json": b"\xff\xfe{",
    "other json": b"[1, 2]",
    "no host": b'{"mode": "exclusive"}',
    "wrong type": b'{"host": 7, "mode": "exclusive"}',
    "wrong mode": b'{"host": "x", "mode": "mine"}',
    "wrong pid": b'{"host": "x", "mode": "exclusive", "pid": -1}',
    "huge number": b'{"host": "x", "mode": "exclusive", "since": 1e300}',
    "too long": b'{"host": "x", "mode": "exclusive", "vm": "' + b"x" * 5000 + b'"}',
    "deep": b"[" * 4000,
}


@pytest.mark.parametrize("what", CARDS)
async def test_a_card_that_makes_no_sense_names_nobody(storage: Path, what: str) -> None:
    async with direct(storage) as a, direct(storage, "host-b") as b:
        grant = await a.acquire()
        card_of(storage).write_bytes(CARDS[what])
        with pytest.raises(Busy) as caught:
            await b.acquire()
        assert caught.value.holder == Holder(UNKNOWN_HOST, EXCLUSIVE)
        await a.release(grant)
        # It is not ours any more, so it stays; it keeps nobody out.
        assert card_of(storage).exists()
        await b.release(await b.acquire())


@pytest.mark.parametrize("kind", ["fifo", "directory", "symlink"])
async def test_a_card_that_is_no_file_hangs_and_leads_nowhere(storage: Path, tmp_path: Path, kind: str) -> None:
    async with direct(storage) as a, direct(storage, "host-b") as b:
        (storage / "img").touch()
        card = card_of(storage)
        victim = tmp_path / "victim"
        victim.write_text('{"host": "leaked", "mode": "exclusive"}')
        if kind == "fifo":
            os.mkfifo(card)
        elif kind == "directory":
            card.mkdir()
        else:
            card.symlink_to(victim)
        holding = ofd_lock(storage / "img")
        with trio.fail_after(5), pytest.raises(Busy) as caught:
            await b.acquire()
        assert caught.value.holder.host == UNKNOWN_HOST
        os.close(holding)
        await a.release(await a.acquire())
        assert victim.read_text() == '{"host": "leaked", "mode": "exclusive"}'


def ofd_lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR)
    assert ofd.lock(fd, exclusive=True, start=0, length=1)
    return fd


async def test_a_stale_card_keeps_nobody_out(storage: Path) -> None:
    async with direct(storage) as a, direct(storage, "host-b") as b:
        grant = await a.acquire()
        ofd.unlock(grant.image.fd, start=0, length=1)
        assert await b.holder_seen() is None
        other = await b.acquire()
        assert json.loads(card_of(storage).read_text())["host"] == "host-b"
        with pytest.raises(Busy) as caught:
            await a.acquire()
        assert caught.value.holder.host == "host-b"
        await b.release(other)


async def test_what_a_card_says_cannot_drive_a_terminal(storage: Path) -> None:
    async with direct(storage) as a, direct(storage, "host-b") as b:
        grant = await a.acquire()
        evil = {"host": "x\x1b[2J\ny\u202e", "mode": "exclusive", "vm": "v\x00"}
        card_of(storage).write_text(json.dumps(evil))
        with pytest.raises(Busy) as caught:
            await b.acquire()
        assert str(caught.value).isprintable()
        assert caught.value.holder.host == r"x\x1b[2J\ny\u202e"
        assert caught.value.holder.vm == r"v\x00"
        await a.release(grant)


async def test_the_directory_of_the_cards_is_not_followed_elsewhere(storage: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (storage / ".lockfs").symlink_to(elsewhere)
    async with direct(storage) as a:
        await a.release(await a.acquire())
    assert list(elsewhere.iterdir()) == []


async def test_where_no_cards_can_be_kept_locks_work_and_it_is_said_once(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (storage / ".lockfs").touch()
    async with direct(storage) as a, direct(storage, "host-b") as b:
        for _ in range(3):
            grant = await a.acquire()
            with pytest.raises(Busy) as caught:
                await b.acquire()
            assert caught.value.holder.host == UNKNOWN_HOST
            await a.release(grant)
    said = [record for record in caplog.records if "no holder cards" in record.message]
    assert [record.levelname for record in said] == ["INFO", "INFO"]


async def test_a_card_never_grows_past_what_is_read(storage: Path) -> None:
    async with direct(storage) as a, direct(storage, "host-b") as b:
        image = a.image()
        long = a.holder(EXCLUSIVE, path="/" + "ö" * 5000, command="\x01" * 500, vm="\N{GRINNING FACE}" * 500)
        grant = await a.backend.acquire(image, EXCLUSIVE, long)
        assert card_of(storage).stat().st_size <= 4096
        with pytest.raises(Busy) as caught:
            await b.acquire()
        assert caught.value.holder.host == "host-a"
        await a.release(grant)
