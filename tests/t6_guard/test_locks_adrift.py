"""A lock that its lockd took to the grave before it was given back is gone before its image is asked for again.

The guard alone, with real files and real locks; lockd is played here, as one that dies at the worst moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from lockfs import options
from lockfs.backend import Busy, Holder, Mode
from lockfs.errors import LockUnavailable
from lockfs.fs import source
from lockfs.fs.guard import Guard, Hold
from lockfs.fs.journal.file import Journal
from lockfs.fs.nodes import NodeTable
from lockfs.fs.policy import Policy
from lockfs.fs.work import DAEMON, Work
from lockfs.linux import ofd
from lockfs.linux.deadline import Deadline
from lockfs.protocol import messages
from lockfs.protocol.messages import Owner

OWNER, OTHER = (Owner(key=f"process:{number}:1", pid=number, command="program") for number in (1, 2))


class Lockd:
    """Locks byte 0, as fcntl-lockd does.  With `dies` the next call is the last that this lockd carries out, or begins:
    its successor is told what is held, and of nothing else.  With `gone` there is no successor: the answer is an error.
    """

    deadline: Deadline | None = None

    def __init__(self) -> None:
        self.epoch = 0
        self.dies = self.gone = False
        self.fd = -1

    async def acquire(
        self, image: messages.Image, mode: Mode, owner: Owner, fd: int, node: int
    ) -> tuple[messages.Acquired, list[int]]:
        await trio.lowlevel.checkpoint()
        if not ofd.lock(fd, exclusive=True, start=0, length=1):
            raise Busy(Holder("host", mode))
        if self.gone:
            raise LockUnavailable("lockd is gone")
        self.fd = fd
        return messages.Acquired(0.0, first=True), []

    async def release(self, image: messages.Image, mode: Mode, owner: Owner) -> None:
        await trio.lowlevel.checkpoint()
        if self.dies:
            self.epoch += 1
            self.dies = False
        else:
            ofd.unlock(self.fd, start=0, length=1)

    async def inspect(self, image: messages.Image, fd: int) -> list[messages.HolderInfo]:
        return []


class SlowWork(Work):
    """A daemon that is slow to close what nobody waits for, as on storage that frees the blocks of a big file."""

    def __init__(self) -> None:
        super().__init__("ext4")
        self.left: list[int] = []

    def close(self, fd: int) -> None:
        self.left.append(fd)

    async def close_now(self, fds: Iterable[int]) -> None:
        await trio.sleep(1)
        await super().close_now(fds)

    def finish(self) -> None:
        for fd in self.left:
            os.close(fd)
        super().finish()


class Scene:
    def __init__(self, directory: Path) -> None:
        (directory / "image").touch()
        self.lockd, self.work = Lockd(), SlowWork()
        self.root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        top = source.identify(os.open(directory, source.PATH_FLAGS))
        self.nodes = NodeTable(self.root, top, open_limit=9, close=self.work.close, journal=Journal())
        policy = Policy(options.parse("").values)
        self.guard = Guard(self.nodes, self.work, policy, self.lockd, os.fsencode(directory), False, lambda node: None)
        self.image = self.nodes.adopt(source.find(self.root, b"image"), self.nodes.root, b"image")

    async def take(self, owner: Owner = OWNER) -> Hold:
        return await self.guard.hold(self.image, Mode.EXCLUSIVE, owner, DAEMON)

    async def take_and_give_back(self, owner: Owner = OWNER, *, dies: bool = False) -> None:
        hold = await self.take(owner)
        self.lockd.dies = dies
        await self.guard.release(hold)

    def close(self) -> None:
        self.nodes.close()
        self.work.finish()
        os.close(self.root)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


async def test_what_was_being_given_back_can_be_had_at_once(scene: Scene, autojump_clock: MockClock) -> None:
    for dies in (True, True, False, True, False):
        await scene.take_and_give_back(dies=dies)


async def test_what_was_taken_for_a_call_that_failed_is_not_in_the_way(scene: Scene, autojump_clock: MockClock) -> None:
    scene.lockd.gone = True
    with pytest.raises(LockUnavailable):
        await scene.take()
    scene.lockd.gone = False
    await scene.take_and_give_back()


async def test_who_comes_while_it_is_being_closed_waits(scene: Scene, autojump_clock: MockClock) -> None:
    hold = await scene.take()
    scene.lockd.dies = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.guard.release, hold)
        await trio.sleep(0.5)
        await scene.take_and_give_back(OTHER)
    assert trio.current_time() >= 1


async def test_who_shares_the_descriptors_meanwhile_keeps_them(scene: Scene, autojump_clock: MockClock) -> None:
    hold = await scene.take()
    scene.lockd.dies = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.guard.release, hold)
        again = await scene.take()
    assert trio.current_time() < 1
    await scene.guard.release(again)
    await scene.take_and_give_back(OTHER)


async def test_the_lock_of_another_description_is_in_the_way(scene: Scene, tmp_path: Path) -> None:
    """Else nothing of this would show."""
    fd = os.open(tmp_path / "image", os.O_RDWR)
    try:
        assert ofd.lock(fd, exclusive=True, start=0, length=1)
        with pytest.raises(Busy):
            await scene.take()
    finally:
        os.close(fd)
