"""The errors of the protocol as exceptions, and their way over the wire and back."""

from __future__ import annotations

import errno

import msgspec

from lockfs.backend import Busy, Holder
from lockfs.errors import Denied, LockfsError, LockUnavailable, MountError, UsageError
from lockfs.protocol import messages, varlink


class HeldError(Busy):
    """Another owner holds the image; `here` is true if that is one on this host."""

    def __init__(self, holder: Holder, *, here: bool) -> None:
        super().__init__(holder)
        self.here = here


class LockdGone(LockUnavailable):
    """The connection to lockd broke, or there is none: whether a call was carried out is not known."""


class UnknownMount(LockUnavailable):
    """lockd knows no such mount, or another process registered it."""

    def __init__(self, mount_id: str) -> None:
        super().__init__(f"lockd knows no mount '{mount_id}' of this process")
        self.mount_id = mount_id


class NotHeld(LockfsError):
    """What was to be released is not held; nothing has changed."""

    errno = errno.ENOENT

    def __init__(self, dev: int, ino: int) -> None:
        super().__init__(f"inode {ino} of device {dev} is not held so")
        self.dev = dev
        self.ino = ino


class InvalidCall(UsageError):
    """lockd does not understand a call: no such method, or parameters of the wrong kind."""


def to_wire(error: LockfsError) -> tuple[str, msgspec.Struct]:
    """Return the name of the error on the wire, and its parameters."""
    name, parameters = _to_wire(error)
    return f"{messages.INTERFACE}.{name}", parameters


def _to_wire(error: LockfsError) -> tuple[str, msgspec.Struct]:
    match error:
        case HeldError():
            return "Busy", messages.BusyError(messages.HolderInfo.of(error.holder, here=error.here))
        case UnknownMount():
            return "UnknownMount", messages.UnknownMountError(error.mount_id)
        case NotHeld():
            return "NotHeld", messages.NotHeldError(error.dev, error.ino)
        case MountError():
            return "Refused", messages.RefusedError(error.message, error.hint)
        case Denied():
            return "Denied", messages.DeniedError(error.message, error.hint)
        case _:
            return "Unavailable", messages.UnavailableError(str(error))


def from_wire(name: str, raw: msgspec.Raw) -> LockfsError:
    """Return the exception for an error reply.

    Raises `ProtocolError` if its parameters are of the wrong kind.
    """
    interface, _, short = name.rpartition(".")
    if interface == varlink.SERVICE:
        detail = bytes(raw).decode(errors="backslashreplace")
        hint = "Are lockd and its client of one version?"
        return InvalidCall(f"lockd refused the call: {short} {detail}", hint=hint)
    kind = messages.ERRORS.get(short) if interface == messages.INTERFACE else None
    if kind is None:
        return varlink.ProtocolError(f"lockd answered with an unknown error '{name}'")
    match varlink.decode_parameters(raw, kind):
        case messages.BusyError(holder=holder):
            return HeldError(holder.holder(), here=holder.here)
        case messages.RefusedError(reason=reason, hint=hint):
            return MountError(reason, hint=hint)
        case messages.DeniedError(reason=reason, hint=hint):
            return Denied(reason, hint=hint)
        case messages.UnknownMountError(mount_id=mount_id):
            return UnknownMount(mount_id)
        case messages.NotHeldError(dev=dev, ino=ino):
            return NotHeld(dev, ino)
        case messages.UnavailableError(reason=reason):
            return LockUnavailable(reason)
        case other:
            return varlink.ProtocolError(f"lockd answered with an unknown error {other!r}")
