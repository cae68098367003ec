"""What lockd keeps of a mount, from when it serves until it is mounted nowhere any more; and what lockd orders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from lockfs import text
from lockfs.errors import LockUnavailable
from lockfs.fs.operations import Operations
from lockfs.fs.session import LockdSession
from lockfs.linux import tree
from lockfs.linux.unmounting import MountChanges, is_mounted, is_mounted_here
from lockfs.protocol.messages import DataPath, Order

log = logging.getLogger("lockfs.fs")

Obey = Callable[[Order], None]
_ELSEWHERE_PAUSE = 1.0
"""Seconds between two looks at other mount namespaces, whose changes nobody tells."""
_FIRST_PAUSE, _LAST_PAUSE = 0.01, 1.0
"""Seconds before lockd is told again of a mount that has gone while images are held, as it can be with umount -l."""


async def attach(
    session: LockdSession, mountpoint: bytes, data: DataPath, fuse_fd: int, *, resumable: bool
) -> int:
    """Give lockd the root of the mount, which must serve, and its connection; return its device number.

    With *resumable* lockd is to start a successor if this daemon dies.
    Raises `LockUnavailable`, OSError.
    """
    # In a thread: the mount asks this very process for its root.
    root, dev = await trio.to_thread.run_sync(_root, mountpoint)
    try:
        await session.attach(dev, data, root, fuse_fd, resumable=resumable)
    finally:
        os.close(root)
    return dev


def _root(mountpoint: bytes) -> tuple[int, int]:
    root = tree.clone(mountpoint)
    try:
        return root, os.fstat(root).st_dev
    except BaseException:
        os.close(root)
        raise


async def detach_when_unmounted(session: LockdSession, mountpoint: bytes, dev: int) -> None:
    """Have lockd let the mount go when no mount namespace shows it any more: that ends it, and this daemon."""
    changes = MountChanges()
    try:
        while True:
            await trio.lowlevel.wait_readable(changes.fileno())
            changes.clear()
            if not is_mounted_here(dev):
                break
    finally:
        changes.close()
    shown = text.from_bytes(mountpoint)
    elsewhere = False
    while True:
        if not await trio.to_thread.run_sync(is_mounted, dev):
            break
        if not elsewhere:
            log.info("%s is unmounted, but other mount namespaces show it still", shown)
            elsewhere = True
        await trio.sleep(_ELSEWHERE_PAUSE)
    pause = _FIRST_PAUSE
    try:
        while not await session.detach():
            if pause == _LAST_PAUSE:
                log.info("%s is unmounted, but images of it are held still", shown)
            await trio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
    except LockUnavailable as error:
        log.info("%s is unmounted, and lockd cannot be told: %s", shown, error)
        session.let_go()


def obey(order: Order, operations: Operations) -> None:
    """Carry out an order of lockd; asks no storage, and waits for nothing.  A ``ping`` is just answered."""
    operations.shut_gates({number for image in order.images for number in image.nodes})
    for image in order.images:
        for number in image.nodes:
            operations.nodes.fence(number)
        operations.guard.lose((image.dev, image.ino), order.reason)
