"""A mount comes, serves, and goes; and the descriptors that lockd keeps for it meanwhile."""

from __future__ import annotations

import msgspec

from lockfs.protocol.messages.terms import DataPath, Mount


class Register(msgspec.Struct, frozen=True, omit_defaults=True):
    """The connection that makes this call is the mount's life line: it closes when the mount daemon ends.

    With *mount_id* a mount that was registered before comes back, after lockd or its daemon was restarted; `HandOver`
    follows.
    """

    mount: Mount
    source_fd: int = 0
    mount_id: str = ""


class Registered(msgspec.Struct, frozen=True):
    """`excludes` is false if the backend grants everything.

    *deadline_fd* is shared memory that says until when locks are safe (`lockfs.linux.deadline`); null if they do not
    expire.
    """

    mount_id: str
    host: str
    excludes: bool
    deadline_fd: int | None = None


class Attach(msgspec.Struct, frozen=True):
    """The mount serves.  Here is what lockd needs to fence its images, also when its daemon hangs or is dead.

    *root_fd* is the root directory, on a private clone of the mount; *fuse_fd* the connection to the kernel.  lockd
    keeps both until the mount is gone.  *resumable* says that there is a journal: if the daemon dies, lockd starts a
    successor.
    """

    mount_id: str
    dev: int
    data: DataPath
    root_fd: int = 0
    fuse_fd: int = 1
    resumable: bool = False


class Attached(msgspec.Struct, frozen=True):
    """The images of the mount can be fenced from now on."""


class Detach(msgspec.Struct, frozen=True):
    """The mount is mounted nowhere any more: lockd is to close what it keeps of it, which ends the mount."""

    mount_id: str


class Detached(msgspec.Struct, frozen=True):
    """Not `done` while images are held: they may have to be fenced yet."""

    done: bool


class Entrust(msgspec.Struct, frozen=True):
    """Have lockd keep a descriptor of each of these nodes, which ride along in this order: they are open, and about to
    lose their last name, so that a successor finds them by it alone.
    """

    mount_id: str
    nodes: list[int]


class Entrusted(msgspec.Struct, frozen=True):
    """lockd has them, until `Dispose`, or until the mount is gone."""


class Dispose(msgspec.Struct, frozen=True):
    """The kernel knows these nodes no more: what lockd keeps of them is to be closed."""

    mount_id: str
    nodes: list[int]
