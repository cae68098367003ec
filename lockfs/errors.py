"""Every error that lockfs raises on purpose, with the errno a caller of the mount sees and the exit code of a command.

An error says what failed and on what; `hint` says what to do next.  Exit codes are those of mount(8), so that
the mount helper and the `lockfs` command speak alike; none is used for two things.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

EXIT_OK = 0
EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_HELD = 4
EXIT_INTERRUPTED = 8
EXIT_MOUNT = 32

EXIT_CODES: Mapping[int, str] = {
    EXIT_OK: "success",
    EXIT_USAGE: "wrong words on the command line, or missing rights",
    EXIT_SYSTEM: "something that lockfs needs from the system is missing or failed",
    EXIT_HELD: "lockfs who was asked with --check, and an image is held",
    EXIT_INTERRUPTED: "a signal ended the command",
    EXIT_MOUNT: "the mount failed",
}
"""What each says; mount(8) has the same ones, but for 4."""


class LockfsError(Exception):
    """The base of them all.

    `errno` is what a system call on the mount would return, `exit_code` what a command ends with.
    """

    errno: int = errno.EIO
    exit_code: int = EXIT_SYSTEM

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(LockfsError):
    """An option, an argument or a call that cannot be right."""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class Denied(UsageError):
    """Something that an admin asked for and that must not, or cannot, be done; nothing has changed."""


class MountError(LockfsError):
    """A mount that cannot keep its promise, and so does not come up."""

    exit_code = EXIT_MOUNT


class SystemError_(LockfsError):
    """Something missing on this host: rights, a device, a program."""

    exit_code = EXIT_SYSTEM


class LockUnavailable(LockfsError):
    """The lock service cannot say who holds an image; nothing was granted."""

    errno = errno.ENOLCK
