"""The file with lockd's state: read at its start, written anew at once, then appended to.

Invariants:
* Each record is one write(2); what was not written whole is taken away again, so that only death tears a record.
* The file is replaced by rename(2), so that at any moment there is the old one or the new one, whole.

It needs no fsync: it is about processes, none of which outlives the kernel.  Only the lockd that has ``lockd.lock``
writes it.
"""

from __future__ import annotations

import errno
import logging
import os

import lockfs
from lockfs.errors import LockUnavailable, SystemError_
from lockfs.linux import procfs
from lockfs.lockd import state
from lockfs.lockd.state import Begin, Record, State
from lockfs.steps import step

NAME = "lockd.state"
SLACK = 1 << 20
"""Bytes by which the file may grow before it is looked whether writing it anew makes it shorter."""

log = logging.getLogger(__name__)


def read(run_dir: str) -> State:
    """Return the state that a lockd of this run directory has left; an empty one if there is none of this boot.

    Raises `OtherFormat`, `SystemError_`.
    """
    path = os.path.join(run_dir, NAME)
    try:
        data = procfs.contents(path)
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise SystemError_(f"cannot read the state of lockd in {path}: {error.strerror}") from error
    found = state.replay(data)
    if found.begin is not None and found.begin.boot != boot():
        return State()  # all that it tells of has ended
    if found.damaged or (found.begin is None and data):
        log.error("some of the state in %s cannot be read; what mounts hold is known when they have come back", path)
        found.damaged = True
    return found


def boot() -> str:
    """Return the id of this boot of the kernel."""
    return procfs.contents("/proc/sys/kernel/random/boot_id").decode().strip()


class StateFile:
    """The state, in memory and in the file.  *begun* is what the predecessor left; it stays until that is settled."""

    def __init__(self, run_dir: str, host: str, begun: State) -> None:
        self._path = os.path.join(run_dir, NAME)
        self._begin = Begin(state.FORMAT, lockfs.__version__, host, boot())
        self.state = begun
        self._fd = -1
        self._size = 0
        self._limit = 0
        self._rewrite()

    def write(self, *records: Record) -> None:
        """Write records down, at once.  Raises `LockUnavailable`; then nothing has changed."""
        data = b"".join(map(state.encode, records))
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                os.ftruncate(self._fd, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise LockUnavailable(f"lockd cannot write to {self._path}: {error.strerror}") from error
        self._size += written
        for record in records:
            self.state.apply(record)
        if self._size > self._limit:
            self._rewrite()

    def note(self, *records: Record) -> None:
        """Write down what has ended; without that a successor only has to find out."""
        try:
            self.write(*records)
        except LockUnavailable as error:
            for record in records:
                self.state.apply(record)
            log.error("%s", error)

    def _rewrite(self) -> None:
        data = state.lines(self._begin, self.state.records())
        temporary = f"{self._path}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            with memoryview(data) as left:
                at = 0
                while at < len(left):
                    at += os.write(fd, left[at:])
            step("lockd.before-replacement")
            os.rename(temporary, self._path)
            step("lockd.after-replacement")
        except OSError as error:
            os.close(fd)
            if self._fd < 0:
                raise SystemError_(f"cannot write the state of lockd to {self._path}: {error.strerror}") from error
            self._limit = self._size + SLACK
            log.error("cannot write %s anew: %s", self._path, error.strerror)
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = fd, len(data)
        self._limit = 2 * len(data) + SLACK

    def close(self) -> None:
        """Close the file; a state of nothing leaves none."""
        if self._fd < 0:
            return
        if not self.state.mounts:
            os.unlink(self._path)
        os.close(self._fd)
        self._fd = -1
