"""A successor takes the place of a mount daemon that died or is to be replaced; another version that of lockd."""

from __future__ import annotations

import msgspec

from lockfs.protocol.messages.terms import DataPath, ModeName, Mount


class Resume(msgspec.Struct, frozen=True):
    """A successor of a mount daemon that died, started by lockd, which has given it the *token*.

    The connection that makes this call is the mount's life line from now on.
    """

    mount_id: str
    token: str


class Resumed(msgspec.Struct, frozen=True):
    """The successor may claim what the daemon before has held.  *deadline_fd* is as in `Registered`."""

    mount: Mount
    deadline_fd: int | None = None


class Claimed(msgspec.Struct, frozen=True):
    """A hold: that of one owner on an image in one mode."""

    dev: int
    ino: int
    mode: ModeName
    owner: str


class Claim(msgspec.Struct, frozen=True):
    """What the daemon before has held, by its journal.  With the *last* call lockd takes away what was not claimed."""

    mount_id: str
    holds: list[Claimed]
    last: bool = True


class Claims(msgspec.Struct, frozen=True, omit_defaults=True):
    """`unsafe` are those of the claimed holds that there are not, or that were lost."""

    unsafe: list[Claimed] = []


class Reclaim(msgspec.Struct, frozen=True):
    """Ask for the descriptors that a mount has to keep with the lock on an image."""

    mount_id: str
    dev: int
    ino: int


class Reclaimed(msgspec.Struct, frozen=True, omit_defaults=True):
    """The descriptors ride along; none if the image is not held.  `token` is that of the lock."""

    token: int | None = None


class Fetch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask for what was entrusted, in the order of the nodes, or for what follows the node *after*."""

    mount_id: str
    after: int = 0


class Fetched(msgspec.Struct, frozen=True):
    """As many as fit into one message; the descriptors ride along.  None if there are no more."""

    nodes: list[int]


class Known(msgspec.Struct, frozen=True):
    """Ask which nodes of a mount the kernel knows, which its daemon itself cannot find out."""

    mount_id: str
    nodes: list[int]


class KnownNodes(msgspec.Struct, frozen=True):
    """Those of which it is not certain that the kernel does not know them."""

    nodes: list[int]


class TakeOver(msgspec.Struct, frozen=True):
    """The successor, which has called `Orders`, answers the kernel from now on; nobody else does."""

    mount_id: str


class TakenOver(msgspec.Struct, frozen=True, omit_defaults=True):
    """`fenced` are the numbers by which the kernel knows what has been fenced on the mount.

    With it comes the root of the mount, which the successor needs, as `dev` and `data`, to attach to a later lockd.
    """

    dev: int
    data: DataPath
    fenced: list[int] = []


class Replace(msgspec.Struct, frozen=True):
    """Have the daemon of a mount replaced by one of the version that lockd is of."""

    mount_id: str


class Replaced(msgspec.Struct, frozen=True):
    """`done` is false if there is no successor, and the daemon is the one it was."""

    done: bool


class Upgrade(msgspec.Struct, frozen=True):
    """Have lockd replaced by another version: the interpreter, and the directory that the package is in.

    It may be refused; then nothing has changed.  Else lockd ends all connections soon, and is back in a moment.
    """

    python: str
    path: str


class Upgrading(msgspec.Struct, frozen=True):
    """The new version can take over."""
