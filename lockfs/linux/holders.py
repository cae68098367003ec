"""Who still uses files of a FUSE superblock: processes with descriptors, shared mappings or io_uring rings of them.

Nothing here sends a FUSE request, so it works beside a mount daemon that hangs or is dead: a file is never opened,
never looked up by name, and never asked for its attributes; all comes from what procfs itself knows.  The inode number
is the one that the mount shows, which lockfs makes equal to the node id.  A mapping with passthrough is shown as one of
the file on the mount.

What can be relied on.  The caller sees to it that no use comes from a new open.  Then a process that has none gets one
only by fork, by receiving a descriptor, or by taking one out of another process.  As for fork: who was found without
a use stays so, and only who has one can beget one.  `uses` ends with a list of processes that has nobody new, and
during whose listing nobody was born, as the kernel's count of forks says.  So the list was complete, and everybody in
it had been looked at: whoever has a use now was found, for a child born before its parent was looked at is listed too.

What cannot be seen, so that no answer is proof that nobody is left:

* descriptors in flight between two sockets, and files that the kernel itself has open (loop devices, nfsd, LIO);
* which files an io_uring ring has registered: only that some lie on the mount, and not even that after a lazy unmount;
* descriptors and mappings that move while they are looked at (a dup and a close; mremap), or change hands;
* processes outside the pid namespace of this one, and those that a security module hides from it.

Of all but mappings the mount daemon knows: it gets a RELEASE when the last is gone.  Of mappings it gets a FORGET.

Made for a worker thread: it takes milliseconds for hundreds of processes, and before Linux 6.17 may wait for a process
whose address space is locked.  Needs CAP_SYS_PTRACE, and Linux 5.14.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

from lockfs.errors import LockfsError
from lockfs.linux import descriptors, mappings, process, procfs
from lockfs.linux.mountids import MountIds

How = Literal["fd", "mapping", "ring"]
UNKNOWN_INO = 0
"""`Use.ino` of a ring: any file of the superblock; no inode has this number."""
_CAP_SYS_PTRACE = 19
PATIENCE = 5.0
"""Seconds in which there must be one moment without a fork."""


@dataclass(frozen=True, slots=True)
class Use:
    """One way in which a process uses a file; `pid` is a thread-group id, `start` as in `process.Process`.

    `writable` is true for a descriptor open for writing, and for a shared mapping of one, even if it is mapped for
    reading: mprotect(2) changes that at any time.  A private mapping is no use, for it never changes the file.  An
    O_PATH descriptor is one that is not writable.
    """

    pid: int
    start: int
    ino: int
    how: How
    writable: bool


class Incomplete(LockfsError):
    """Some processes could not be looked at, so there may be more uses than those `found`."""

    errno = errno.EAGAIN

    def __init__(self, message: str, found: list[Use], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.found = found


def uses(
    dev: int, inodes: Container[int] | None, *, mappings_only: bool = False, pids: Iterable[int] | None = None
) -> list[Use]:
    """Return all uses of the files *inodes*, or of any file if None, of the superblock whose ``st_dev`` is *dev*.

    With *pids* only these processes are looked at, once, and none that they forked.  A ring is reported whatever
    *inodes* are.  Raises `Incomplete`, or OSError where procfs does not serve.
    """
    scan = _Scan(dev, inodes, mappings_only)
    if pids is not None:
        for pid in pids:
            scan.look_at(pid)
    elif not scan.look_at_everybody():
        raise Incomplete(
            "processes start faster than they can be listed, so some that use files of a mount may be unknown",
            scan.result(),
            hint="Try again when the host is less busy.",
        )
    if scan.refused and not _may_look():
        raise Incomplete(
            f"no permission to see what {_shown(scan.refused)} has open",
            scan.result(),
            hint="Run as root; looking at all processes takes CAP_SYS_PTRACE.",
        )
    return scan.result()


def kill(use: Use) -> bool:
    """Send SIGKILL to the process of *use*; return False if it has gone, or is this one.  Raises PermissionError.

    No other process is ever hit.  It may take its time to die: `uses` tells.
    """
    if use.pid == os.getpid():
        return False
    try:
        pidfd = os.pidfd_open(use.pid)
    except ProcessLookupError:
        return False
    try:
        # The descriptor came first.  Should it stand for another process than the one with the right start
        # time, then that other one had the number before, and is dead.
        if process.of_pid(use.pid) != process.Process(use.pid, use.start):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


class _Scan:
    """What one call of `uses` has found so far."""

    def __init__(self, dev: int, inodes: Container[int] | None, mappings_only: bool) -> None:
        self._dev = dev
        self._inodes = inodes
        self._mappings_only = mappings_only
        self._mounts = MountIds(dev)
        self._found: set[Use] = set()
        self.refused: set[int] = set()

    def result(self) -> list[Use]:
        return sorted(self._found, key=lambda use: (use.pid, use.how, use.ino, use.writable))

    def look_at_everybody(self) -> bool:
        """Return False if there was no moment without a fork."""
        seen: set[tuple[int, int]] = set()
        deadline = time.monotonic() + PATIENCE
        while True:
            forks = _forks()
            fresh = [each for each in _everybody() if each not in seen]
            if not fresh and forks == _forks():
                return True
            if time.monotonic() > deadline:
                return False
            for pid, inode in fresh:
                self.look_at(pid)
                seen.add((pid, inode))

    def look_at(self, pid: int) -> None:
        try:
            # All that follows goes by this descriptor, so that it is about one process, whoever gets its number next.
            proc = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            found = self._uses_of(proc, pid)
            if found:
                start = procfs.start_time(proc)
                self._found.update(Use(pid, start, *each) for each in found)
        except (FileNotFoundError, ProcessLookupError):
            pass
        except PermissionError:
            self.refused.add(pid)
        finally:
            os.close(proc)

    def _uses_of(self, proc: int, pid: int) -> set[tuple[int, How, bool]]:
        found: set[tuple[int, How, bool]] = set()
        # Descriptors first: one that is mapped and closed at this moment is then found as a mapping.
        if not self._mappings_only:
            seen = descriptors.of_process(proc, pid, self._dev, self._wants, self._mounts)
            found.update((ino, "fd", writable) for ino, writable in seen.files)
            if seen.ring:
                found.add((UNKNOWN_INO, "ring", True))
        mapped = mappings.of_process(proc, pid, self._dev, self._wants)
        found.update((ino, "mapping", writable) for ino, writable in mapped)
        return found

    def _wants(self, ino: int) -> bool:
        return self._inodes is None or ino in self._inodes


def _everybody() -> list[tuple[int, int]]:
    """Return each process with the inode number of its directory, which tells it from a later one of its number."""
    with os.scandir("/proc") as entries:
        return [(int(entry.name), entry.inode()) for entry in entries if entry.name.isdigit()]


def _forks() -> int:
    """Return how many processes and threads were started since boot; it grows as they become visible."""
    with open("/proc/stat", "rb", buffering=0) as file:
        content = file.readall()
    start = content.index(b"\nprocesses ") + 11
    return int(content[start : content.index(b"\n", start)])


def _may_look() -> bool:
    """Say whether this thread may look at any process; what refuses even so is meant to be hidden, and left out."""
    status = procfs.contents("/proc/thread-self/status")
    start = status.index(b"\nCapEff:") + 8
    return bool(int(status[start : status.index(b"\n", start)], 16) >> _CAP_SYS_PTRACE & 1)


def _shown(pids: set[int]) -> str:
    numbers = sorted(pids)
    some = ", ".join(map(str, numbers[:5]))
    rest = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"process{'es' if len(numbers) > 1 else ''} {some}{rest}"
