"""What a service manager hands to a daemon, and what that tells it (sd_listen_fds(3), sd_notify(3)).

Both are a few environment variables, so that anything may play the service manager: systemd, a test, or a daemon that
replaces itself by exec.  Without one, nothing is inherited and nobody is told.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Mapping

FIRST_FD = 3
_ABOVE = 1 << 10
"""Where descriptors are put aside while others take their place; above `FIRST_FD` and all that are handed on."""


def inherited() -> dict[str, int]:
    """Return the descriptors that were handed to this process, by name, close-on-exec from now on; only once."""
    count, names = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_FDNAMES", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdigit():
        return {}
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    known = names.split(":") if names else []
    return {(known[at] if at < len(known) else "unknown"): fd for at, fd in enumerate(fds)}


def replace_process(command: list[str], environment: Mapping[str, str], fds: Mapping[str, int]) -> None:
    """Make this process run *command*, and hand on *fds* by name.  Returns never, but raises OSError.

    All else that is open is closed, if it is close-on-exec.
    """
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in fds.values()]
    for at, fd in enumerate(aside):
        os.dup2(fd, FIRST_FD + at, inheritable=True)
    said = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(fds)}
    os.execve(command[0], command, {**environment, **said})


def notify(**what: str | int) -> None:
    """Tell the service manager, if there is one: ``notify(READY=1, STATUS="...")``.  Never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    message = "\n".join(f"{name}={value}" for name, value in what.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass  # one that does not listen wants to know nothing


def notify_reloading() -> None:
    """Tell that this process is about to replace itself; READY=1 follows."""
    notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


def watchdog() -> float | None:
    """Return within how many seconds the service manager wants to hear ``WATCHDOG=1``; None if it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return None
    return int(microseconds) / 1e6
