"""Taking a lock, giving it back, asking who has it."""

from __future__ import annotations

import msgspec

from lockfs.protocol.messages.terms import HolderInfo, Image, ModeName, Owner


class Acquire(msgspec.Struct, frozen=True):
    """Take or share a lock.  *wait* is how many seconds a conflict may last before it is refused.

    *node* is the number by which the kernel knows the file on the mount, 0 if it is not known.
    """

    mount_id: str
    image: Image
    mode: ModeName
    owner: Owner
    wait: float = 0.0
    lock_fd: int = 0
    node: int = 0


class Acquired(msgspec.Struct, frozen=True, omit_defaults=True):
    """`since` and `token` are those of the lock.

    Descriptors that ride along come with the first hold that a mount has on an image, and must be kept open
    until its last one is released: the lock lives in them too.  `first` says that this is such a hold; with `foreign`
    the first of the descriptors is the one that the lock was put on, without it that is the one of the call.
    """

    since: float
    token: int | None = None
    first: bool = False
    foreign: bool = False


class Release(msgspec.Struct, frozen=True):
    """Give back one hold: the same image, owner and mode as in one earlier `Acquire`."""

    mount_id: str
    dev: int
    ino: int
    mode: ModeName
    owner: str


class Released(msgspec.Struct, frozen=True):
    """Another owner, here or elsewhere, gets the image now unless there are other holds."""


class Inspect(msgspec.Struct, frozen=True):
    """Ask who holds an image; never takes a lock.

    *lock_fd* is open for writing where the storage allows it.
    """

    mount_id: str
    image: Image
    lock_fd: int = 0


class Inspected(msgspec.Struct, frozen=True):
    """`holders` is empty if nobody holds the image."""

    holders: list[HolderInfo]
