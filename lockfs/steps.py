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
    "journal.before-write",
    "journal.after-write",
    "journal.before-replacement",
    "journal.after-replacement",
    "effect.before",
    "effect.after",
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

LOCKD: tuple[str, ...] = ()
"""Those of lockd."""

STEPS = (*MOUNT_DAEMON, *LOCKD)

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
