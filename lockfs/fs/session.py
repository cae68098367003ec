"""The mount daemon's side of its talk with lockd, which may be killed at any time and is started again.

Invariants:
* What was granted stays granted over the death of lockd: the descriptors in which locks live are open in this daemon
  too, and the next lockd takes them up from here (`_come_back`).
* A call that lockd's death has cut short is made again, and counts once.  `epoch` says how often all that is held was
  listed for a new lockd: what was granted before, and came to be known here after, is not granted any more; what was
  given back before is not listed, and needs no call.
* Who asks for a lock waits while there is no lockd, for at most `PATIENCE`; then nothing is granted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import trio

from lockfs.backend import Mode
from lockfs.errors import LockfsError, LockUnavailable
from lockfs.fs.handover import Held, in_messages
from lockfs.fs.inheritance import Inheritance
from lockfs.fs.vigil import Vigil
from lockfs.linux.closer import Closer
from lockfs.linux.deadline import Deadline
from lockfs.protocol import messages
from lockfs.protocol.client import LockdClient
from lockfs.protocol.errors import LockdGone, NotHeld
from lockfs.protocol.messages import Owner
from lockfs.protocol.start import START_TIMEOUT
from lockfs.protocol.wire import MAX_FDS, close_all
from lockfs.steps import step

PATIENCE = 2 * START_TIMEOUT
"""Seconds that a call waits for a lockd that is gone; one is started anew in well under one, on a host in trouble in
some.  One that was stopped while it started is given up after `START_TIMEOUT`, and the next one has as long.
"""
FIRST_PAUSE, LAST_PAUSE = 0.05, 2.0
"""Seconds before the next try to start one."""
T = TypeVar("T", bound=msgspec.Struct)
log = logging.getLogger("lockfs.lockd-client")


@dataclass(frozen=True, slots=True)
class _Attachment:
    dev: int
    data: messages.DataPath
    root_fd: int
    fuse_fd: int
    resumable: bool


class LockdSession:
    """One registered mount.  *mount* and *source_fd* are what it registers by; the descriptor stays the caller's."""

    def __init__(self, run_dir: str, mount: messages.Mount, source_fd: int, wait: float) -> None:
        self._run_dir = run_dir
        self._mount = mount
        self._source_fd = source_fd
        self._wait = wait
        self._client = LockdClient(run_dir)
        self._mount_id = ""
        self._fuse_fd = -1
        self._attachment: _Attachment | None = None
        self.epoch = 0
        """How often all that is held was listed for a lockd that was started anew."""
        self.deadline: Deadline | None = None
        """Until when the locks of this mount are safe; None if they do not expire."""
        self.entrusted: Callable[[], dict[int, int]] = dict
        """Returns what lockd is to keep for a successor: descriptors by node, to be closed by who called."""
        self._heed: Callable[[int], None] | None = None
        self._up, self._down = trio.Event(), trio.Event()
        self._ended = False
        self._vigil = Vigil(run_dir)
        self._closer = Closer(mount.mountpoint)

    @classmethod
    async def begin(cls, run_dir: str, mount: messages.Mount, source_fd: int, wait: float) -> LockdSession:
        """Register a mount.  Raises `MountError` if lockd or the backend refuses it, `LockUnavailable` without
        lockd.
        """
        session = cls(run_dir, mount, source_fd, wait)
        until = trio.current_time() + PATIENCE
        while True:
            try:
                await session._register()
            except LockdGone:
                if trio.current_time() > until:
                    raise
                await trio.sleep(FIRST_PAUSE)
            else:
                session._up.set()
                return session

    async def _register(self) -> None:
        client = await LockdClient.connect(self._run_dir, start=True)
        try:
            call = messages.Register(self._mount, mount_id=self._mount_id)
            registered, fds = await client.register(call, self._source_fd)
            self._take_deadline(registered.deadline_fd, fds)
        except BaseException:
            with trio.CancelScope(shield=True):
                await client.aclose()
            raise
        self._client, self._mount_id = client, registered.mount_id

    @classmethod
    async def resume(
        cls, run_dir: str, mount_id: str, token: str, wait: float, source_fd: int, fuse_fd: int
    ) -> LockdSession:
        """Register as the successor of a mount daemon that died.  Raises `LockUnavailable`."""
        client = await LockdClient.connect(run_dir)
        try:
            resumed, fds = await client.resume(messages.Resume(mount_id, token))
            session = cls(run_dir, resumed.mount, source_fd, wait)
            session._take_deadline(resumed.deadline_fd, fds)
        except BaseException:
            with trio.CancelScope(shield=True):
                await client.aclose()
            raise
        session._client, session._mount_id, session._fuse_fd = client, mount_id, fuse_fd
        session._up.set()
        return session

    def heed(self, heed: Callable[[int], None]) -> None:
        """Have *heed* called with the descriptor of the deadline: now, if there is one, and whenever it is another."""
        self._heed = heed
        if self.deadline is not None:
            heed(self.deadline.fd)

    def _take_deadline(self, index: int | None, fds: list[int]) -> None:
        """Heed the deadline that lockd has sent.  Raises `LockUnavailable`."""
        before = self.deadline
        try:
            if index is not None:
                self.deadline = Deadline.attach(fds.pop(index))
        except (IndexError, OSError, ValueError) as error:
            raise LockUnavailable(f"lockd does not say until when locks are safe: {error}") from error
        finally:
            close_all(fds)
        if index is not None and self._heed is not None and self.deadline is not None:
            self._heed(self.deadline.fd)
        if before is not None and before is not self.deadline:
            before.close()

    @property
    def mount_id(self) -> str:
        """What lockd knows the mount by."""
        return self._mount_id

    @property
    def inheritance(self) -> Inheritance:
        """What a successor asks the lockd of this moment for."""
        return Inheritance(self._client, self._mount_id)

    async def take_over(self) -> list[int]:
        """Say that this daemon answers from now on, and heeds orders; return the nodes that are fenced.

        Raises `LockUnavailable`.
        """
        answer, (root_fd,) = await self._client.call(messages.TakeOver(self._mount_id), messages.TakenOver)
        self._attachment = _Attachment(answer.dev, answer.data, root_fd, self._fuse_fd, resumable=True)
        return answer.fenced

    async def entrust(self, nodes: Sequence[int], fds: Sequence[int]) -> None:
        """Have lockd keep a descriptor of each node for a successor; they stay the caller's.  Raises `LockfsError`."""
        await self._call(messages.Entrust(self._mount_id, list(nodes)), messages.Entrusted, fds)

    async def dispose(self, nodes: Sequence[int]) -> None:
        """Have lockd close what it keeps of these nodes.  Raises `LockfsError`."""
        await self._call(messages.Dispose(self._mount_id, list(nodes)), messages.Noted)

    # Calls -----------------------------------------------------------------------------------------

    async def acquire(
        self, image: messages.Image, mode: Mode, owner: Owner, fd: int, node: int
    ) -> tuple[messages.Acquired, list[int]]:
        """Take a lock; return the answer, and descriptors to keep open with it.  Raises `Busy`, `LockUnavailable`.

        The caller must take note of it before it waits for anything.
        """
        call = messages.Acquire(self._mount_id, image, mode.value, owner, self._wait, node=node)
        while True:
            down = await self._wait_until_up()
            epoch = self.epoch
            try:
                acquired, keep = await self._client.call(call, messages.Acquired, [fd])
            except LockdGone:
                await _come(down)
                continue
            if self.epoch == epoch:
                return acquired, keep
            for each in keep:
                os.close(each)

    async def release(self, image: messages.Image, mode: Mode, owner: Owner) -> None:
        """Give it back; the caller counts it no more, and has not waited since.  Never fails.

        Waits for lockd as long as that takes: until then the descriptors must stay.
        """
        call = messages.Release(self._mount_id, image.dev, image.ino, mode.value, owner.key)
        epoch, repeated = self.epoch, False
        while True:
            await self._up.wait()
            if self.epoch != epoch:
                return  # it is in no list that the next lockd was given
            down = self._down
            try:
                await self._client.call(call, messages.Released)
            except LockdGone:
                repeated = True
                await _come(down)
                continue
            except NotHeld as error:
                if not repeated:
                    log.error("could not release %s: %s", image.path, error)
            except LockfsError as error:
                log.error("could not release %s: %s", image.path, error)
            return

    async def inspect(self, image: messages.Image, fd: int) -> list[messages.HolderInfo]:
        """List who holds an image.  Raises `LockUnavailable`."""
        inspected = await self._call(messages.Inspect(self._mount_id, image), messages.Inspected, [fd])
        return inspected.holders

    async def attach(
        self, dev: int, data: messages.DataPath, root_fd: int, fuse_fd: int, *, resumable: bool
    ) -> None:
        """Give lockd what it needs to fence images of this mount by itself, and to start a successor of this daemon.

        Raises `LockUnavailable`.  Both descriptors stay the caller's; a duplicate of the first is kept until the mount
        is detached.
        """
        self._attachment = _Attachment(dev, data, os.dup(root_fd), fuse_fd, resumable)
        down = await self._wait_until_up()
        try:
            call = messages.Attach(self._mount_id, dev, data, resumable=resumable)
            await self._client.call(call, messages.Attached, [root_fd, fuse_fd])
        except LockdGone:
            await _come(down)
            await self._wait_until_up()  # the next lockd has been given it

    async def detach(self) -> bool:
        """Tell lockd that the mount is mounted nowhere any more.  Return False while images are held.

        Raises `LockUnavailable`.
        """
        detached = await self._call(messages.Detach(self._mount_id), messages.Detached)
        if detached.done:
            self.let_go()
        return detached.done

    def let_go(self) -> None:
        """Close what keeps the mount from ending."""
        if self._attachment is not None:
            # By a thread: it may be the end of the mount, and that wait for this daemon.
            self._closer.close([self._attachment.root_fd])
            self._attachment = None

    async def _call(self, call: msgspec.Struct, reply: type[T], fds: Sequence[int] = ()) -> T:
        """Make a call that may be made twice."""
        while True:
            down = await self._wait_until_up()
            try:
                answer, kept = await self._client.call(call, reply, fds)
            except LockdGone:
                await _come(down)
                continue
            for each in kept:
                os.close(each)
            return answer

    async def _wait_until_up(self) -> trio.Event:
        """Wait for lockd; return what is set when it is gone.  Raises `LockUnavailable`."""
        with trio.move_on_after(PATIENCE):
            await self._up.wait()
            return self._down
        raise LockUnavailable("lockd is gone, and cannot be started again")

    # The life of lockd -----------------------------------------------------------------------------

    async def follow(
        self,
        mountpoint: str,
        obey: Callable[[messages.Order], None],
        held: Callable[[], list[Held]],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Have *obey* carry out lockd's orders; when lockd is gone, start it again and hand over what is *held*.

        Started when orders arrive.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._vigil.keep)
            await self._follow(mountpoint, obey, held, task_status)
            nursery.cancel_scope.cancel()

    async def _follow(
        self,
        mountpoint: str,
        obey: Callable[[messages.Order], None],
        held: Callable[[], list[Held]],
        task_status: trio.TaskStatus[None],
    ) -> None:
        started = False
        while True:
            async with trio.open_nursery() as nursery:
                # Before it learns what is held: what it then finds lost it orders to be fenced.
                await nursery.start(self._obey, obey)
                if not started:
                    task_status.started()
                    started = True
                if self._up.is_set() or await self._hand_over(held):
                    self._up.set()
                    await self._client.lost()
                nursery.cancel_scope.cancel()
            if self._ended:
                return
            begin = trio.current_time()
            log.info("lockd is gone; it is started again for %s", mountpoint)
            self._down.set()
            self._down = trio.Event()
            if self._up.is_set():  # else this lockd has died before it took over, and callers wait for the next one
                self._up = trio.Event()
            await self._come_back(mountpoint)
            log.info("lockd is back after %.3f s", trio.current_time() - begin)

    async def _come_back(self, mountpoint: str) -> None:
        """Register with the next lockd, and give it what it needs to fence."""
        pause = FIRST_PAUSE
        while True:
            await self._client.aclose()
            try:
                await self._register()
                if (there := self._attachment) is not None:
                    step("handover.before-attach")
                    call = messages.Attach(self._mount_id, there.dev, there.data, resumable=there.resumable)
                    await self._client.call(call, messages.Attached, [there.root_fd, there.fuse_fd])
                    step("handover.after-attach")
                await self._entrust_again()
                return
            except (LockfsError, OSError) as error:
                level = logging.ERROR if pause == LAST_PAUSE else logging.INFO
                log.log(level, "%s cannot have lockd back: %s", mountpoint, error)
            await trio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)

    async def _entrust_again(self) -> None:
        kept = self.entrusted()
        try:
            for at in range(0, len(kept), MAX_FDS):
                part = dict(list(kept.items())[at : at + MAX_FDS])
                call = messages.Entrust(self._mount_id, list(part))
                await self._client.call(call, messages.Entrusted, list(part.values()))
        except LockdGone:
            raise
        except LockfsError as error:
            log.info("open files without names are lost if this mount daemon dies: %s", error)
        finally:
            self._closer.close(kept.values())

    async def _hand_over(self, held: Callable[[], list[Held]]) -> bool:
        """Give a lockd that was started anew all that this mount holds.  Return False if it is gone again.

        Descriptors stay open meanwhile: whoever would give back what they belong to waits for `_up`.
        """
        self.epoch += 1
        parts = in_messages(held())
        try:
            for number, (images, fds) in enumerate(parts, 1):
                step("handover.before-holds")
                call = messages.HandOver(self._mount_id, images, number == len(parts))
                await self._client.call(call, messages.HandedOver, fds)
                step("handover.after-holds")
        except LockfsError as error:
            log.info("lockd did not take over what is held: %s", error)
            return False
        return True

    async def _obey(
        self,
        obey: Callable[[messages.Order], None],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        client, listening = self._client, False
        try:
            async with client.orders(self._mount_id) as orders:
                listening = True
                task_status.started()
                async for order in orders:
                    self._vigil.heard()
                    obey(order)
                    await client.call(messages.Obeyed(self._mount_id, order.serial), messages.Noted)
        except LockUnavailable:  # the life line tells
            if not listening:
                task_status.started()

    async def end(self) -> None:
        """Leave; lockd then frees what is left of the mount."""
        self._ended = True
        self.let_go()
        await self._client.aclose()
        if self.deadline is not None:
            self.deadline.close()


async def _come(down: trio.Event) -> None:
    """A call was cut short: wait until that is known here, too, so that the next one goes to the next lockd."""
    with trio.move_on_after(LAST_PAUSE):
        await down.wait()
