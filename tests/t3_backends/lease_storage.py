"""Storage for tests of leases that does what a test says: hangs, fails, or reads wrong bytes.  Below the disk seam."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lockfs_paxos_lease.disk.file import Disks, RawFile, Storage


class TroubledFile:
    """A file of `Trouble`."""

    def __init__(self, trouble: Trouble, below: RawFile, path: str) -> None:
        self._trouble = trouble
        self._below = below
        self._path = path

    @property
    def identity(self) -> tuple[int, int]:
        """Its device and inode number."""
        return self._below.identity

    def read(self, offset: int, length: int) -> bytes:
        """Read, unless there is trouble."""
        self._trouble.meet("read", self._path)
        return self._below.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write, unless there is trouble."""
        self._trouble.meet("write", self._path)
        self._below.write(offset, data)

    def close(self) -> None:
        """Close it."""
        self._below.close()


class Trouble:
    """Real files; a call for which `hangs` says yes waits for `heal`, and one for which `fails` does ends with EIO.

    Both are asked with what is done ("open", "read" or "write") and the path.
    """

    def __init__(self, below: Storage | None = None) -> None:
        self._below = below or Disks()
        self._well = threading.Event()
        self.hangs: Callable[[str, str], bool] = lambda what, path: False
        self.fails: Callable[[str, str], OSError | None] = lambda what, path: None
        self.waiting = 0
        self.open_files = 0
        self.calls: list[tuple[str, str]] = []

    def open(self, path: str, dir_fd: int | None = None) -> TroubledFile:
        """Open a file, unless there is trouble."""
        self.meet("open", path)
        return TroubledFile(self, self._below.open(path, dir_fd), path)

    def meet(self, what: str, path: str) -> None:
        """Hang or fail here if a test wants it."""
        self.calls.append((what, path))
        if self.hangs(what, path):
            self.waiting += 1
            self._well.wait()
            self.waiting -= 1
        error = self.fails(what, path)
        if error is not None:
            raise error

    def heal(self) -> None:
        """Let all calls go on, those that hang included."""
        self.hangs = lambda what, path: False
        self.fails = lambda what, path: None
        self._well.set()
