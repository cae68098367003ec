"""fcntl-lockd and a real virtlockd exclude each other, in both of virtlockd's modes and in both directions."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from t3_backends.stations import MOUNTPOINT, station
from t8_system.virtlockd import PROGRAM, Client, Refused, client, virtlockd

from lockfs.backend import Busy, Mode

pytestmark = pytest.mark.skipif(not os.path.exists(PROGRAM), reason="virtlockd is not installed")
EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED


@dataclass
class Setting:
    """One mode of virtlockd, with what lockfs is told to agree with it, and how virtlockd is asked for the image."""

    virtlockd: Client
    pid: int
    options: dict[str, str]
    lockspace: str
    name: str

    def acquire(self, *, shared: bool = False) -> None:
        self.virtlockd.acquire(self.name, lockspace=self.lockspace, shared=shared)

    def release(self) -> None:
        self.virtlockd.release(self.name, lockspace=self.lockspace)


@pytest.fixture
def owner() -> Iterator[int]:
    """A process that stands for a virtual machine."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process.pid
        process.kill()


@pytest.fixture(params=["direct", "indirect"])
def setting(
    leaves_nothing: None, request: pytest.FixtureRequest, storage: Path, tmp_path: Path, owner: int
) -> Iterator[Setting]:
    (storage / "img").touch()
    with virtlockd(tmp_path) as (run_dir, pid), client(run_dir, owner) as made:
        if request.param == "direct":
            yield Setting(made, pid, {}, "", str(storage / "img"))
        else:
            lockspace = tmp_path / "lockspace"
            made.create_lockspace(lockspace)
            # libvirt names the file by the path in the domain: that of the mount.
            name = hashlib.sha256(f"{MOUNTPOINT}/img".encode()).hexdigest()
            yield Setting(made, pid, {"lockspace": str(lockspace), "key": "path"}, str(lockspace), name)


async def test_what_virtlockd_holds_is_refused_here(setting: Setting, storage: Path) -> None:
    async with station("host-a", storage, "fcntl-lockd", setting.options) as a:
        setting.acquire()
        for mode in Mode:
            with pytest.raises(Busy) as caught:
                await a.acquire(mode)
            assert caught.value.holder.command == "virtlockd"
            assert caught.value.holder.pid == setting.pid
            assert caught.value.holder.mode is EXCLUSIVE
        seen = await a.holder_seen()
        assert seen
        assert seen.command == "virtlockd"
        setting.release()
        assert await a.holder_seen() is None
        await a.release(await a.acquire())


async def test_what_is_held_here_virtlockd_refuses(setting: Setting, storage: Path) -> None:
    async with station("host-a", storage, "fcntl-lockd", setting.options) as a:
        grant = await a.acquire()
        for shared in (False, True):
            with pytest.raises(Refused, match="is locked"):
                setting.acquire(shared=shared)
        await a.release(grant)
        setting.acquire()
        setting.release()


async def test_both_share(setting: Setting, storage: Path) -> None:
    async with station("host-a", storage, "fcntl-lockd", setting.options) as a:
        setting.acquire(shared=True)
        grant = await a.acquire(SHARED)
        with pytest.raises(Busy) as caught:
            await a.backend.convert(grant, EXCLUSIVE, a.holder(EXCLUSIVE))
        assert caught.value.holder.mode is SHARED
        setting.release()
        await a.backend.convert(grant, EXCLUSIVE, a.holder(EXCLUSIVE))
        with pytest.raises(Refused, match="is locked"):
            setting.acquire(shared=True)
        await a.backend.convert(grant, SHARED, a.holder(SHARED))
        setting.acquire(shared=True)
        await a.release(grant)
        setting.release()


async def test_they_hand_over_again_and_again(setting: Setting, storage: Path) -> None:
    """In indirect mode each removes the lock file on release, which the other must notice."""
    async with station("host-a", storage, "fcntl-lockd", setting.options) as a:
        for _ in range(30):
            setting.acquire()
            with pytest.raises(Busy):
                await a.acquire()
            setting.release()
            grant = await a.acquire()
            with pytest.raises(Refused):
                setting.acquire()
            await a.release(grant)


async def test_both_name_the_lock_file_alike(setting: Setting, storage: Path) -> None:
    if not setting.lockspace:
        return
    lockspace = Path(setting.lockspace)
    async with station("host-a", storage, "fcntl-lockd", setting.options) as a:
        setting.acquire()
        by_virtlockd = [path.name for path in lockspace.iterdir()]
        setting.release()
        assert list(lockspace.iterdir()) == []
        grant = await a.acquire()
        assert [path.name for path in lockspace.iterdir()] == by_virtlockd
        await a.release(grant)
        assert list(lockspace.iterdir()) == []
