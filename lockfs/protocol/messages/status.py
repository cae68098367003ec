"""What there is on this host, and what happens: for people and programs that look."""

from __future__ import annotations

import msgspec

from lockfs.protocol.messages.terms import HolderInfo, Image, ModeName, Mount


class LockInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One lock that this host holds, with all its owners here."""

    source: str
    mountpoint: str
    image: Image
    mode: ModeName
    since: float
    backend: str
    owners: list[HolderInfo]
    token: int | None = None


class MountInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One registered mount.

    `data` says how data gets to the storage, empty before the mount serves.  `daemon_gone` is true if its daemon has
    died and gets no successor: what is open may still be written to, and stays locked.  `restarts` counts the
    successors so far; while one is being started, `restarting` is true.
    """

    mount_id: str
    mount: Mount
    pid: int
    since: float
    locks: int
    data: str = ""
    daemon_gone: bool = False
    restarts: int = 0
    restarting: bool = False


class ListLocks(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask for the locks of this host, or for those that follow where an earlier answer ended."""

    after: str = ""


class Locks(msgspec.Struct, frozen=True, omit_defaults=True):
    """As many locks as fit into one message; `next` is the `after` of the call that asks for more, empty at
    the end.
    """

    locks: list[LockInfo]
    next: str = ""


class GetStatus(msgspec.Struct, frozen=True):
    pass


class Status(msgspec.Struct, frozen=True):
    host: str
    version: str
    pid: int
    run_dir: str
    since: float
    mounts: list[MountInfo]
    locks: int


class Watch(msgspec.Struct, frozen=True):
    """Ask for events from now on; one that reads them too slowly loses its connection."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened: ``acquired``, ``released``, ``refused``, ``lost``, ``fenced``, ``mounted``,
    ``unmounted``, ``daemon-restarted``, ``daemon-gone``, ``confirmed-dead``.

    The first one of a `Watch` is ``watching``: what happens after it will be told.
    """

    kind: str
    time: float
    mountpoint: str = ""
    image: str = ""
    mode: str = ""
    holder: HolderInfo | None = None
    owner: HolderInfo | None = None
    reason: str = ""
