"""What a case notes while it runs: for each step, what the kernel answered, in a form that two runs can be compared in.

What must differ between two directories is left out of the form: inode and device numbers, descriptor numbers, and
times, unless a case notes them on purpose.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from typing import Any

Event = tuple[str, object]
LONG = 64


class Recorder:
    """Runs steps and notes how each ended.

    `backing` is a descriptor of the directory on the storage that the current directory shows: on the mount the source,
    in the plain twin the same directory.  What is done there happens behind the mount's back.
    """

    def __init__(self, backing: int) -> None:
        self.events: list[Event] = []
        self.backing = backing

    def note(self, step: str, value: object) -> None:
        """Note a value that was got otherwise."""
        self.events.append((step, comparable(value)))

    def __call__(self, step: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call *function*, note what it returned or its errno, and return it or None."""
        value = self.quietly(step, function, *args, **kwargs)
        if value is not FAILED:
            self.note(step, value)
        return None if value is FAILED else value

    def quietly(self, step: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call *function* and note only a failure; return what it returned, or FAILED."""
        try:
            return function(*args, **kwargs)
        except OSError as error:
            self.note(step, errno.errorcode.get(error.errno or 0, str(error)))
            return FAILED

    def open(self, step: str, name: Any, flags: int, mode: int = 0o666, **kwargs: Any) -> int | None:
        """Open a file, note whether that worked, and return the descriptor, or None."""
        fd = self.quietly(step, os.open, name, flags, mode, **kwargs)
        if fd is FAILED:
            return None
        self.note(step, "opened")
        return int(fd)

    def stat(self, step: str, name: Any) -> None:
        """Note the attributes of a name (a symlink's own) or of a descriptor."""
        if isinstance(name, int):
            self(step, os.fstat, name)
        else:
            self(step, os.lstat, name)

    def refuses(self, function: Callable[..., Any], *args: Any) -> bool:
        """Say whether *function* fails, and note nothing: for loops that go on until a limit."""
        try:
            function(*args)
        except OSError:
            return True
        return False


FAILED = object()


def comparable(value: object) -> object:
    """Return *value* in a form that is equal on both sides if the kernel treats them alike."""
    if isinstance(value, os.stat_result):
        return attributes(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        if len(data) <= LONG:
            return data
        return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}, begins {data[:16]!r}"
    if isinstance(value, (list, tuple)):
        return tuple(comparable(each) for each in value)
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    return value


def attributes(status: os.stat_result) -> str:
    """Return the attributes that twins share."""
    kind = stat.S_IFMT(status.st_mode)
    parts = [
        stat.filemode(status.st_mode),
        f"links={status.st_nlink}",
        f"owner={status.st_uid}:{status.st_gid}",
        f"size={status.st_size}",
        f"blksize={status.st_blksize}",
    ]
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        parts.append(f"rdev={os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
    return " ".join(parts)
