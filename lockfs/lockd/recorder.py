"""Writes down what the lock table and the mounts are about to become; see `lockfs.lockd.state`."""

from __future__ import annotations

from collections.abc import Iterable

from lockfs import text
from lockfs.backend import Holder, Image, Mode
from lockfs.linux import process
from lockfs.lockd.lock import Hold, Lock
from lockfs.lockd.share import Mounted
from lockfs.lockd.state import AttachedAs, HoldIs, HoldLeft, ImageLost, MountIs, MountLeft
from lockfs.lockd.statefile import StateFile
from lockfs.protocol import messages
from lockfs.protocol.messages import HeldBy, Owner
from lockfs.steps import step


class Recorder:
    """Writes to *file*; without one, as in tests of the table alone, nothing is written."""

    def __init__(self, file: StateFile | None = None) -> None:
        self._file = file

    # Mounts ----------------------------------------------------------------------------------

    def mount(self, mounted: Mounted) -> None:
        """A mount is about to be registered.  Raises `LockUnavailable`."""
        if self._file is None:
            return
        daemon = process.of_pid(mounted.pid)
        top = (mounted.share.dev, mounted.share.ino)
        start = daemon.start if daemon is not None else 0
        step("lockd.before-mount-record")
        self._file.write(MountIs(mounted.mount_id, mounted.mount, mounted.pid, start, top, mounted.since))
        step("lockd.after-mount-record")

    def attached(self, mounted: Mounted, dev: int, data: messages.DataPath) -> None:
        """A mount is about to serve.  Raises `LockUnavailable`."""
        if self._file is not None:
            step("lockd.before-attached-record")
            self._file.write(AttachedAs(mounted.mount_id, dev, data))
            step("lockd.after-attached-record")

    def left(self, mount_id: str) -> None:
        """A mount is gone, and with it all that was held through it."""
        if self._file is not None:
            step("lockd.before-left-record")
            self._file.note(MountLeft(mount_id))
            step("lockd.after-left-record")

    # Holds -----------------------------------------------------------------------------------

    def wanted(self, lock: Lock, mounted: Mounted, image: Image, owner: str, holder: Holder, node: int) -> None:
        """An owner is about to get one hold more, in the mode of *holder*.  Raises `LockUnavailable`."""
        if self._file is None:
            return
        there = lock.holds.get((mounted.mount_id, owner, holder.mode))
        nodes = (there.nodes if there else set()) | ({node} if node else set())
        count = (there.count if there else 0) + 1
        step("lockd.before-hold-record")
        self._file.write(_hold_is(mounted, image, owner, holder, count, nodes))
        step("lockd.after-hold-record")

    def now(self, lock: Lock, mounted: Mounted, image: Image, owner: str, mode: Mode) -> None:
        """An owner holds less than before, or not what was wanted."""
        if self._file is None:
            return
        hold = lock.holds.get((mounted.mount_id, owner, mode))
        step("lockd.before-free-record")
        if hold is None:
            self._file.note(HoldLeft(mounted.mount_id, image.dev, image.ino, owner, mode.value))
        else:
            self._file.note(_hold_is(mounted, image, owner, hold.holder, hold.count, hold.nodes))
        step("lockd.after-free-record")

    def adopted(self, mounted: Mounted, image: Image, holds: Iterable[Hold], dropped: Iterable[HeldBy]) -> None:
        """A mount that has come back holds an image so, and no longer as *dropped*."""
        if self._file is None:
            return
        step("lockd.before-adopted-record")
        self._file.note(
            *(HoldLeft(mounted.mount_id, image.dev, image.ino, by.owner.key, by.mode) for by in dropped),
            *(_hold_is(mounted, image, hold.owner, hold.holder, hold.count, hold.nodes) for hold in holds),
        )
        step("lockd.after-adopted-record")

    def free(self, mount_id: str, dev: int, ino: int, holds: Iterable[tuple[str, Mode]]) -> None:
        """An image is held through a mount no more."""
        if self._file is not None:
            self._file.note(*(HoldLeft(mount_id, dev, ino, owner, mode.value) for owner, mode in holds))

    def lost(self, lock: Lock) -> None:
        """An image is about to be fenced."""
        if self._file is not None:
            step("lockd.before-lost-record")
            self._file.note(ImageLost(*lock.key[1:]))
            step("lockd.after-lost-record")


def _hold_is(
    mounted: Mounted, image: Image, owner: str, holder: Holder, count: int, nodes: set[int]
) -> HoldIs:
    names = text.from_bytes(image.relative), text.from_bytes(image.path)
    who = Owner(owner, holder.pid, holder.command, holder.vm)
    by = HeldBy(who, holder.mode.value, count, sorted(nodes), holder.since)
    return HoldIs(mounted.mount_id, messages.Image(image.dev, image.ino, *names), by)
