"""Descriptors that lockd keeps of open files without names, for a successor of their mount daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from harness import processes
from harness.host import Host
from harness.logs import Expected
from t4_lockd.clients import FakeMount, mounted
from t4_lockd.fakes import Lab

from lockfs.errors import LockUnavailable
from lockfs.fs.inheritance import Inheritance
from lockfs.lockd import nameless
from lockfs.protocol import messages as m
from lockfs.protocol.errors import InvalidCall
from lockfs.protocol.wire import MAX_FDS, close_all

COUNT = 2 * MAX_FDS + 7


def kept(lockd: Host, directory: Path) -> int:
    return sum(str(directory) in each for each in processes.descriptors(lockd.lockd()).values())


async def entrust(mount: FakeMount, nodes: list[int], fds: list[int]) -> None:
    await mount.client.call(m.Entrust(mount.registered.mount_id, nodes), m.Entrusted, fds)


async def test_it_comes_back_until_it_is_disposed_of(lockd: Host, storage: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    async with mounted(lockd.run_dir, storage) as mount:
        mount_id = mount.registered.mount_id
        fds = [os.open(tmp_path / "files" / str(node), os.O_RDWR | os.O_CREAT) for node in range(1, COUNT + 1)]
        inodes = {node: os.fstat(fd).st_ino for node, fd in enumerate(fds, 1)}
        for at in range(0, COUNT, MAX_FDS):
            part = fds[at : at + MAX_FDS]
            await entrust(mount, list(range(at + 1, at + 1 + len(part))), part)
        await entrust(mount, [5], [fds[4]])  # once more, as after a death of lockd
        close_all(fds)
        found: dict[int, int] = {}
        while True:
            answer, came = await mount.client.call(m.Fetch(mount_id, max(found, default=0)), m.Fetched)
            found.update({node: os.fstat(fd).st_ino for node, fd in zip(answer.nodes, came, strict=True)})
            close_all(came)
            if not came:
                break
        assert found == inodes
        await mount.client.call(m.Dispose(mount_id, [*range(1, COUNT), 4711]), m.Noted)
        with trio.fail_after(10):
            while kept(lockd, tmp_path / "files") != 1:
                await trio.sleep(0.01)
    with trio.fail_after(10):  # with the mount the rest is gone
        while kept(lockd, tmp_path / "files"):
            await trio.sleep(0.01)


async def test_there_is_one_descriptor_for_each(lockd: Host, storage: Path, expect_log: Expected) -> None:
    expect_log("refused a call .*one descriptor for each node")
    async with mounted(lockd.run_dir, storage) as mount:
        fd = os.open(storage, os.O_PATH)
        with pytest.raises(InvalidCall):
            await entrust(mount, [1, 2], [fd])
        os.close(fd)


async def test_an_older_lockd_keeps_none() -> None:
    """It runs on after an update, and starts successors that are of the new version."""

    class Older:
        async def call(self, request: object, reply: object, fds: object = ()) -> object:
            raise InvalidCall("lockd refused the call: MethodNotFound")

    assert await Inheritance(Older(), "mount").fetch() == {}


async def test_there_is_a_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameless, "MOST", 2)
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    lab.fds += fds
    nameless.keep(lab.a, [1, 2], fds[:2])
    with pytest.raises(LockUnavailable, match="lockd keeps 2 nameless files of /mnt/a already"):
        nameless.keep(lab.a, [3], fds[2:])
    nameless.dispose(lab.a, [1, 2])
    assert nameless.after(lab.a, 0) == ([], [])
