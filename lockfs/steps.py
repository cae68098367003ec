"""Named steps at which a test can end a daemon: right before and right after what must not be lost.

A step costs one comparison where the environment has no ``LOCKFS_STEPS``.  There that names a directory: a daemon that
comes to a step whose file lies in it removes the file, and dies as by ``kill -9``.  So one file is one death, whichever
process comes first, and a successor goes on.  A number in the file says how often the step is to be passed before.
`STEPS` lists them all; each has a test.
"""

from __future__ import annotations

import os
import signal

ENVIRONMENT = "LOCKFS_STEPS"

MOUNT_DAEMON = (
    "mount.before-attachment",
    "mount.after-attachment",
    "journal.before-write",
    "journal.after-write",
    "journal.before-replacement",
    "journal.after-replacement",
    "effect.before",
    "effect.after",
    "nameless.before",
    "nameless.after",
    "nameless.before-forgotten",
    "open.before-journal",
    "open.after-journal",
    "close.before-journal",
    "close.after-journal",
    "resume.before-registration",
    "resume.after-registration",
    "resume.before-take-over",
    "resume.after-take-over",
    "resume.after-resend",
)
"""Those of a mount daemon."""

LOCKD: tuple[str, ...] = (
    "lockd.before-replacement",
    "lockd.after-replacement",
    "lockd.before-mount-record",
    "lockd.after-mount-record",
    "lockd.before-attached-record",
    "lockd.after-attached-record",
    "lockd.before-left-record",
    "lockd.after-left-record",
    "lockd.before-hold-record",
    "lockd.after-hold-record",
    "lockd.before-backend-acquire",
    "lockd.after-backend-acquire",
    "lockd.before-backend-release",
    "lockd.after-backend-release",
    "lockd.before-free-record",
    "lockd.after-free-record",
    "lockd.before-lost-record",
    "lockd.after-lost-record",
    "lockd.before-adoption",
    "lockd.after-adoption",
    "lockd.before-adopted-record",
    "lockd.after-adopted-record",
    "lockd.before-obeyed",
    "lockd.before-vault-put",
    "lockd.after-vault-put",
    "lockd.before-vault-drop",
    "lockd.after-vault-drop",
)
"""Those of lockd."""

HANDOVER = (
    "handover.before-attach",
    "handover.after-attach",
    "handover.before-holds",
    "handover.after-holds",
)
"""Those of a mount daemon that hands over to a new lockd what it holds."""

REVIVAL = (
    "revival.before-inheritance",
    "revival.after-inheritance",
    "revival.before-successor",
)
"""Those of a lockd that finds a mount whose daemon has died together with the last lockd."""

VAULT = (
    "vault.before-answer",
    "vault.after-answer",
    "vault.before-start",
    "vault.after-start",
)
"""Those of the vault."""

STEPS = (*MOUNT_DAEMON, *LOCKD, *HANDOVER, *REVIVAL, *VAULT)

_directory = os.environ.get(ENVIRONMENT)


def step(name: str) -> None:
    """Come to a step.  *name* is one of `STEPS`."""
    if _directory is not None:
        _die_if_asked(_directory, name)


def _die_if_asked(directory: str, name: str) -> None:
    if name not in STEPS:
        raise ValueError(f"there is no step '{name}'")
    path = os.path.join(directory, name)
    try:
        with open(path, encoding="ascii") as file:
            more = int(file.read() or 0)
    except FileNotFoundError:
        return
    if more:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(more - 1))
        return
    os.unlink(path)
    os.kill(os.getpid(), signal.SIGKILL)
