"""Fencing images."""

from __future__ import annotations

import msgspec


class FenceTarget(msgspec.Struct, frozen=True, omit_defaults=True):
    """An image that this host holds, by its path when it was opened, on a mount or on the storage; or by device and
    inode number on the storage.
    """

    path: str = ""
    dev: int = 0
    ino: int = 0


class Fence(msgspec.Struct, frozen=True, omit_defaults=True):
    """Make every further I/O on what is open of these images fail, at once and for good."""

    images: list[FenceTarget]
    reason: str = ""


class KilledProcess(msgspec.Struct, frozen=True):
    """A process that could still write in a way that no error stops."""

    pid: int
    command: str
    why: str


class FenceResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the fence of one image on one mount went.

    `fenced` is true if nothing more can get to the storage; `problems` says what could not be stopped, or is not
    certain.  `drained` is true if what was being written at the time is known to have ended.
    """

    image: str
    mountpoint: str = ""
    fenced: bool = False
    drained: bool = False
    daemon_killed: bool = False
    killed: list[KilledProcess] = []
    problems: list[str] = []


class Fenced(msgspec.Struct, frozen=True):
    """One result for each image and mount; for an image that is not held here one without mount."""

    results: list[FenceResult]
