"""The one seat of a run directory: its lock and its socket.

Invariants:
* Whoever holds ``lockd.lock`` is the lockd of the run directory; nobody else touches the socket.
* A socket that a service manager made is neither removed nor made anew here: it outlives this process, and who connects
  meanwhile waits for the next one.
* A lockd that replaces itself hands both on, so that at no moment one of them is missing.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping

import trio

from lockfs.errors import SystemError_
from lockfs.protocol import start

TAKE_OVER_TIMEOUT = 5.0
"""Seconds that a lockd which has closed its socket may take to end before its successor gives up."""


class AlreadyRuns(SystemError_):
    """There is a lockd in this run directory; which is what whoever starts one wants."""


class Seat:
    """See the module.  *inherited* are descriptors by name: the lock, and a listening socket by whatever name."""

    def __init__(self, run_dir: str, inherited: Mapping[str, int]) -> None:
        self._run_dir = run_dir
        self._lock = inherited.get(start.LOCKD_LOCK, -1)
        sockets = {name: fd for name, fd in inherited.items() if name != start.LOCKD_LOCK}
        self._name, self._given = next(iter(sockets.items()), (start.SOCKET, -1))
        for name, fd in sockets.items():
            if name != self._name:
                os.close(fd)
        self._listener: trio.socket.SocketType | None = None

    async def take(self) -> None:
        """Take the lock, and keep it until the process ends.  Raises `AlreadyRuns`."""
        path = os.path.join(self._run_dir, start.LOCKD_LOCK)
        if self._lock < 0:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = trio.current_time() + TAKE_OVER_TIMEOUT
        while not try_lock(self._lock):
            # One that has closed its socket is about to end; one that a service manager made is always there.
            taken = self._given < 0 and start.is_running(self._run_dir)
            if taken or trio.current_time() > until:
                os.close(self._lock)
                hint = f"See which: fuser -v {path}"
                raise AlreadyRuns(f"another lockd runs in {self._run_dir}", hint=hint)
            await trio.sleep(0.02)

    def listen(self) -> trio.socket.SocketType:
        """Return the socket that clients connect to."""
        if self._given >= 0:
            sock = socket.socket(fileno=self._given)
            sock.setblocking(False)
        else:
            sock = self._bind()
        self._listener = trio.socket.from_stdlib_socket(sock)
        return self._listener

    def _bind(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with start.short_path(self._run_dir, start.SOCKET) as address:
            try:
                os.unlink(address)
            except FileNotFoundError:
                pass
            # Only the umask gives a socket its mode before anybody can connect.
            before = os.umask(0o177)
            try:
                sock.bind(address)
            finally:
                os.umask(before)
        sock.listen(socket.SOMAXCONN)
        return sock

    def to_hand_on(self) -> dict[str, int]:
        """Return the descriptors that the next one needs, by name."""
        fds = {start.LOCKD_LOCK: self._lock}
        if self._listener is not None:
            fds[self._name] = self._listener.fileno()
        return fds

    def close(self) -> None:
        """Accept nobody any more."""
        if self._listener is None:
            return
        if self._name == start.SOCKET:
            try:
                os.unlink(os.path.join(self._run_dir, start.SOCKET))
            except FileNotFoundError:
                pass
        self._listener.close()
        self._listener = None

    def try_to_leave(self) -> bool:
        """Close if nobody is about to start a lockd; return False if somebody is."""
        path = os.path.join(self._run_dir, start.START_LOCK)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_lock(fd):
            os.close(fd)
            return False
        # Kept to the end of the process: the next lockd is not started before this one has let go of
        # lockd.lock.
        self.close()
        return True


def try_lock(fd: int) -> bool:
    """Take the flock on a file without waiting; return whether this worked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
