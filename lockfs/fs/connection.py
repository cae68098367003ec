"""The FUSE connection: /dev/fuse, the mount, and the connection's limits."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Sequence

import pyfuse3
import trio

from lockfs import kernel, text
from lockfs.errors import MountError, SystemError_
from lockfs.fs.operations import Operations
from lockfs.fs.session import LockdSession
from lockfs.kernel import extra, session, wire
from lockfs.kernel.gates import Gates
from lockfs.linux import mount, mountinfo, tree

log = logging.getLogger("lockfs.fs")

DEVICE = "/dev/fuse"
FSTYPE = "fuse.lockfs"

MAX_BACKGROUND = 1000
"""Requests that no caller waits for and that the kernel has under way at once.

Its default of 12 is soon full of direct I/O, behind which each RELEASE, and the next owner of that image, would wait.
"""

SETTINGS = session.Settings(
    flags=wire.PASSTHROUGH | wire.HANDLE_KILLPRIV_V2 | wire.DONT_MASK,
    max_background=MAX_BACKGROUND,
    congestion_threshold=MAX_BACKGROUND * 3 // 4,
)

READ_AHEAD_KB = 512
"""How much the kernel reads ahead where the daemon serves data: each request costs the same, large or small.

More does not pay, since the memory that is copied from falls out of the processor's cache.
"""

INTERRUPT_SECONDS = 0.5
"""How long a read of /dev/fuse may block with the interpreter's lock held."""


def attach(source: bytes, mountpoint: bytes, flags: Sequence[str], root_mode: int, data: Sequence[str]) -> int:
    """Mount on *mountpoint*; return the descriptor of the connection, whose first request waits to be read.

    *source* is what mount(8) and df show.  Raises `SystemError_` without /dev/fuse, `MountError` if mount(2) fails.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SystemError_(f"cannot open {DEVICE}: {error.strerror}", hint="Load the module: modprobe fuse") from error
    options = [
        f"fd={fd}", f"rootmode={root_mode:o}", "user_id=0", "group_id=0", "default_permissions", "allow_other", *data,
    ]  # fmt: skip
    try:
        mount.mount(source, mountpoint, FSTYPE, mount.flags_of(flags), ",".join(options))
    except OSError as error:
        os.close(fd)
        hint = "Is it a directory, and are you root?"
        if error.errno == errno.EBUSY:
            hint = "Something is mounted there in this way already: see findmnt."
        raise MountError(f"cannot mount on {text.from_bytes(mountpoint)}: {error.strerror}", hint=hint) from error
    return fd


def begin(operations: Operations, fd: int, nursery: trio.Nursery) -> None:
    """Start the session on a mounted connection: with the kernel module, or as pyfuse3 does without.

    Raises `LockfsError`, RuntimeError.
    """
    if (missing := kernel.why_not()) is None:
        operations.negotiated = session.begin(operations, fd, extra.Requests(operations, nursery), SETTINGS)
        operations.gates = Gates()
        return
    log.info("no sparse files, allocation or copies inside the storage on this mount: %s", missing)
    interrupt_reads()
    pyfuse3.init(operations, f"/dev/fd/{fd}", set())


def resume(operations: Operations, fd: int, nursery: trio.Nursery, init: bytes) -> None:
    """Take over a connection whose daemon has died; nothing is read before pyfuse3's main loop runs.

    Raises `LockfsError`.
    """
    operations.negotiated = session.begin(operations, fd, extra.Requests(operations, nursery), SETTINGS, init)
    operations.gates = Gates()


def heed(operations: Operations, lockd: LockdSession) -> None:
    """Have the kernel module heed the deadline of locks that expire."""
    if operations.gates is not None:
        lockd.heed(operations.gates.heed)


def read_ahead(dev: int) -> None:
    """Have the kernel read ahead further than it does of itself; *dev* is the device number of the mount."""
    try:
        with open(f"/sys/class/bdi/{os.major(dev)}:{os.minor(dev)}/read_ahead_kb", "w", encoding="ascii") as limit:
            limit.write(str(READ_AHEAD_KB))
    except OSError as error:
        log.info("the kernel reads no further ahead than by default: %s", error)


def interrupt_reads() -> None:
    """End reads of /dev/fuse that find nothing.

    Without the kernel module pyfuse3 reads with the interpreter's lock held when the device is ready; but a caller
    that is killed at that moment takes its request back, and the read blocks.  After a signal pyfuse3 waits for the
    device again.
    """
    signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, INTERRUPT_SECONDS, INTERRUPT_SECONDS)


def widen(mountpoint: bytes) -> None:
    """Raise the limits of the connection of the mount on *mountpoint*, which must have answered its first request.

    Done by a mount of the control filesystem that nobody else sees; where that fails the kernel's limits stay.
    """
    found = mountinfo.at(mountpoint)
    if found is None:
        return
    try:
        control = tree.detached(b"fusectl")
        try:
            for name, value in (("max_background", MAX_BACKGROUND), ("congestion_threshold", MAX_BACKGROUND * 3 // 4)):
                fd = os.open(f"{os.minor(found.dev)}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
                try:
                    os.write(fd, b"%d" % value)
                finally:
                    os.close(fd)
        finally:
            os.close(control)
    except OSError as error:
        log.info("the limit of background requests stays at the kernel's default: %s", error)
