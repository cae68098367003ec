"""``lockfs lease prune``: leases that nobody needs are removed, and nothing is granted twice meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from lockfs_paxos_lease.disk.file import Disks
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.prune import ABANDONED, Pruned, Pruner, timing_of, unneeded
from t3_backends.stations import Open, Station, station

from lockfs.backend import Busy, Mode
from lockfs.errors import LockUnavailable

PATIENCE = 20.0
TAKEOVER = 16.0
LOCKFS = Path(sys.executable).with_name("lockfs")


@pytest.fixture
def host(leaves_nothing: None, storage: Path, tmp_path: Path) -> Open:
    options = {"takeover": f"{TAKEOVER:g}"}
    return partial(station, share=storage, name="paxos-lease", options=options, run_dirs=tmp_path / "run")


@pytest.fixture
def leases(storage: Path) -> Path:
    return storage / ".lockfs" / "leases"


async def prune(leases: Path, names: list[str]) -> Pruned:
    return await Pruner(Disks(), str(leases), Timing.own(TAKEOVER)).prune(names, lambda name: None)


def there(leases: Path) -> set[str]:
    return {path.name.removesuffix(".lease") for path in leases.glob("*.lease")}


async def test_the_command_removes_what_nobody_needs(host: Open, storage: Path, leases: Path) -> None:
    (storage / "sub").mkdir()
    async with host("host-a") as a:
        inodes = {}
        for name in "kept", "sub/kept", "gone", "removed while it is held":
            grant = await a.acquire(name=name)
            inodes[name] = f"i-{grant.image.ino:x}"
            if name != "removed while it is held":
                await a.release(grant)
        os.close(a.fds.pop(2))  # an inode number is free again when nobody has the file open
        for name in "gone", "removed while it is held":
            (storage / name).unlink()
        for name in "named", "i-", "i-xyz":
            (leases / f"{name}.lease").write_bytes(b"")
        before = there(leases)
        call = partial(subprocess.run, capture_output=True, text=True, check=True)
        shown = await trio.to_thread.run_sync(call, [LOCKFS, "lease", "prune", storage, "--dry-run"])
        unneeded_ones = sorted([inodes["gone"], inodes["removed while it is held"]])
        assert shown.stdout == "".join(f"unneeded: {name}\n" for name in unneeded_ones)
        assert there(leases) == before
        done = await trio.to_thread.run_sync(call, [LOCKFS, "lease", "prune", storage, "--json"])
        assert json.loads(done.stdout) == {
            "unneeded": unneeded_ones, "removed": [inodes["gone"]], "in_use": [inodes["removed while it is held"]],
            "problems": [],
        }  # fmt: skip
        assert there(leases) == before - {inodes["gone"]}
        assert timing_of(str(leases)) == Timing.own(TAKEOVER)
        await a.release(grant)
        with trio.fail_after(PATIENCE):  # until it has seen that the command has left the lockspace
            while [each.state for each in await a.backend.hosts()].count("live") != 1:
                await trio.sleep(0.05)
        left = [inodes["removed while it is held"]]
        assert (await prune(leases, unneeded(os.fsencode(storage), str(leases)))).removed == left
    assert unneeded(os.fsencode(storage), str(leases)) == []


async def test_two_hosts_at_work_never_have_a_lease_at_once_that_is_removed_again_and_again(
    host: Open, leases: Path
) -> None:
    """The worst that can be: it is removed although the image is there, and both want it all the time."""
    async with host("host-a") as a, host("host-b") as b:
        name = f"i-{a.image().ino:x}"
        holding: list[str] = []
        grants = dict.fromkeys((a.host, b.host), 0)
        removed = 0

        async def work(who: Station) -> None:
            image = who.image()
            while True:
                try:
                    grant = await who.backend.acquire(image, Mode.EXCLUSIVE, who.holder(Mode.EXCLUSIVE))
                except (Busy, LockUnavailable):
                    await trio.sleep(0.002)
                    continue
                holding.append(who.host)
                await trio.sleep(0.001)
                assert holding == [who.host]
                holding.remove(who.host)
                grants[who.host] += 1
                await who.release(grant)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, a)
            nursery.start_soon(work, b)
            with trio.move_on_after(40):
                while removed < 3 or min(grants.values()) < 3:
                    removed += len((await prune(leases, [name] * 20)).removed)
            nursery.cancel_scope.cancel()
        assert removed >= 3
        assert min(grants.values()) >= 3


async def test_what_was_left_half_removed_is_removed_when_it_is_old(host: Open, leases: Path) -> None:
    async with host("host-a") as a:
        await a.release(await a.acquire())
        (lease,) = leases.glob("i-*.lease")
        name = lease.name.removesuffix(".lease")
        # As if it had been cut short, after the mark and before the removal.
        kept = leases / "kept"
        os.link(lease, kept)
        assert (await prune(leases, [name])).removed == [name]
        os.rename(kept, lease)
        with pytest.raises(LockUnavailable, match="the lease was deleted"):
            await a.acquire()
        os.utime(lease)
        (problem,) = (await prune(leases, [name])).problems
        assert "is being removed" in problem
        old = lease.stat().st_mtime - ABANDONED - 10
        os.utime(lease, (old, old))
        assert (await prune(leases, [name])).removed == [name]
        await a.release(await a.acquire())


async def test_what_is_damaged_stays(host: Open, leases: Path, flip: Callable[[Path, int], None]) -> None:
    async with host("host-a") as a:
        await a.release(await a.acquire())
        (lease,) = leases.glob("i-*.lease")
        flip(lease, 60)
        old = lease.stat().st_mtime - ABANDONED - 10
        os.utime(lease, (old, old))
        (problem,) = (await prune(leases, [lease.name.removesuffix(".lease")])).problems
        assert "it is damaged" in problem
        assert lease.exists()


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    def change(path: Path, offset: int) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 0x20
        path.write_bytes(data)

    return change


async def test_a_new_file_of_that_name_is_not_removed(host: Open, leases: Path) -> None:
    """What was to be removed was that other one."""
    async with host("host-a") as a:
        await a.release(await a.acquire())
        (lease,) = leases.glob("i-*.lease")
        pruner = Pruner(Disks(), str(leases), Timing.own(TAKEOVER))
        directory = pruner._directory
        await directory.open()
        area = await directory.find(lease.stem)
        assert area is not None
        with pytest.raises(LockUnavailable, match="too long"):
            await directory.remove(lease.stem, area, 0.0)
        os.rename(lease, leases / "moved")
        await a.release(await a.acquire())
        assert not await directory.remove(lease.stem, area, float("inf"))
        assert lease.exists()
        await area.close()
        await directory.close()
