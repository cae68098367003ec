"""What the calls of all themes speak of: owners, images, mounts, holders."""

from __future__ import annotations

from typing import Literal

import msgspec

from lockfs.backend import Holder, Mode

ModeName = Literal["shared", "exclusive"]
DataPath = Literal["passthrough", "gated"]
"""How data gets to the storage: inside the kernel, or through the mount daemon."""


class Owner(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who opens: `key` says who is the same owner, the rest is for people."""

    key: str
    pid: int = 0
    command: str = ""
    vm: str = ""
    uid: int = 0


class Image(msgspec.Struct, frozen=True):
    """An image as the mount daemon sees it: identity, path below the source, path that programs use."""

    dev: int
    ino: int
    relative: str
    path: str


class Mount(msgspec.Struct, frozen=True):
    """A mount, as its daemon registers it.

    `fstype` and `fsoptions` are those of the storage as the daemon's mount namespace has it, and as it was before
    the daemon took its private view of it, which no list of mounts shows.
    """

    source: str
    mountpoint: str
    fstype: str
    fsoptions: dict[str, str]
    backend: str
    options: dict[str, str] = {}


class HolderInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who holds an image.  `here` is true if it is this host."""

    host: str
    mode: ModeName
    pid: int = 0
    command: str = ""
    vm: str = ""
    since: float = 0.0
    path: str = ""
    token: int | None = None
    here: bool = False

    @classmethod
    def of(cls, holder: Holder, *, here: bool = False) -> HolderInfo:
        """Make the message form of what a backend said."""
        return cls(
            host=holder.host,
            mode=holder.mode.value,
            pid=holder.pid,
            command=holder.command,
            vm=holder.vm,
            since=holder.since,
            path=holder.path,
            token=holder.token,
            here=here,
        )

    def holder(self) -> Holder:
        """Return the same as the backend interface has it."""
        return Holder(
            host=self.host,
            mode=Mode(self.mode),
            pid=self.pid,
            command=self.command,
            vm=self.vm,
            since=self.since,
            path=self.path,
            token=self.token,
        )


class Noted(msgspec.Struct, frozen=True):
    pass
