"""A mount that comes back to a lockd that was started anew says what it holds."""

from __future__ import annotations

import msgspec

from lockfs.protocol.messages.terms import Image, ModeName, Owner


class HeldBy(msgspec.Struct, frozen=True, omit_defaults=True):
    """That one owner holds an image through a mount, *count* times; *nodes* as `Acquire.node`, *since* for people."""

    owner: Owner
    mode: ModeName
    count: int = 1
    nodes: list[int] = []
    since: float = 0.0


class HeldImage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is held of one image through a mount.

    *lock_fd* is the descriptor that the lock was put on, *keep_fds* the others that came with it; -1 and none if the
    mount has none.  *token* is that of the lock.  *lost* says that the image was fenced.
    """

    image: Image
    holds: list[HeldBy]
    lock_fd: int = -1
    keep_fds: list[int] = []
    lost: bool = False
    token: int | None = None


class HandOver(msgspec.Struct, frozen=True, omit_defaults=True):
    """A mount that has come back says what it holds; the last one of these calls has *last*.

    What is listed in none of them it does not hold.
    """

    mount_id: str
    images: list[HeldImage] = []
    last: bool = False


class HandedOver(msgspec.Struct, frozen=True):
    """lockd has it.  What it finds lost is being fenced."""
