"""The errors of the interface."""

from __future__ import annotations

import msgspec

from lockfs.protocol.messages.terms import HolderInfo


class BusyError(msgspec.Struct, frozen=True):
    """Another owner, here or on another host, holds the image."""

    holder: HolderInfo


class UnavailableError(msgspec.Struct, frozen=True):
    """The lock service cannot say; nothing was granted."""

    reason: str


class RefusedError(msgspec.Struct, frozen=True):
    """A mount cannot be registered: what is wrong with it and what to do."""

    reason: str
    hint: str = ""


class DeniedError(msgspec.Struct, frozen=True):
    """What was asked for must not or cannot be done; nothing has changed."""

    reason: str
    hint: str = ""


class UnknownMountError(msgspec.Struct, frozen=True):
    """No such mount is registered, or another process registered it."""

    mount_id: str


class NotHeldError(msgspec.Struct, frozen=True):
    """What was to be released is not held; nothing has changed."""

    dev: int
    ino: int
