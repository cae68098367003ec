"""lockd as a process: its socket, its end, and what it takes to be the only one in its run directory.

Invariants:
* Whoever holds ``lockd.lock`` is the lockd of the run directory; nobody else touches the socket.
* The last step of one that leaves because it is idle is taken under ``start.lock``: whoever wants a lockd
  and holds that finds one that stays, or none.
* A lockd that is told to stop gives no lock back: the mounts that it served still hold descriptors that
  keep them, and start another one.  What nobody but itself keeps locked it fences first.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable

import trio

from lockfs.errors import SystemError_
from lockfs.linux.closer import Closer
from lockfs.lockd import statefile
from lockfs.lockd.adoption import Adoption
from lockfs.lockd.claims import Claims
from lockfs.lockd.connection import Connection
from lockfs.lockd.events import Events
from lockfs.lockd.fence import Fencer
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.service import Service
from lockfs.lockd.shares import Shares
from lockfs.lockd.statefile import StateFile
from lockfs.lockd.succession import Succession
from lockfs.lockd.table import Table
from lockfs.protocol import start

STOP_TIMEOUT = 5.0
"""Seconds that calls under way may take when lockd is told to stop; a storage that hangs must not keep it."""
LEAVE_TIMEOUT = 0.5
"""Seconds that mounts have to go when lockd is told to stop."""
FENCE_TIMEOUT = 5.0
"""Seconds that the fence may take of what only this lockd keeps locked: one or two, on a host in trouble some."""
TAKE_OVER_TIMEOUT = 5.0
"""Seconds that a lockd which has closed its socket may take to end before its successor gives up."""
WANTED_DESCRIPTORS = 1 << 19
OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


class AlreadyRuns(SystemError_):
    """There is a lockd in this run directory; which is what whoever starts one wants."""


class Daemon:
    """One lockd.  *idle_exit* is after how many seconds without a connection it leaves; None for never."""

    def __init__(self, run_dir: str, host: str, idle_exit: float | None) -> None:
        self._run_dir = run_dir
        self._host = host
        self._idle_exit = idle_exit
        self._connections = 0
        self._accepted = 0
        self._idle = trio.Event()
        self._closer = Closer("lockd")
        self._listener: trio.socket.SocketType | None = None

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until a signal says stop, or nobody needs it; call *ready* once it serves.

        Raises `SystemError_` if it cannot begin.
        """
        await self._become_the_one()
        state = statefile.read(self._run_dir)
        log.info("lockd of host %s serves in %s", self._host, self._run_dir)
        async with trio.open_nursery() as background:
            events = Events()
            file = StateFile(self._run_dir, self._host, state)
            recorder = Recorder(file)
            claims = Claims(state, self._host)
            table = Table(events, recorder, claims)
            fencer = Fencer(background, table, events)
            succession = Succession(table, claims, Adoption(table, claims, fencer, recorder, self._host), recorder)
            shares = Shares(background, table, fencer, events, recorder, succession, self._host, self._run_dir)
            service = Service(table, shares, fencer, succession, events, self._run_dir)
            succession.begin(background, shares)
            async with trio.open_nursery() as nursery:
                stop = nursery.cancel_scope.cancel
                # Before the socket is there: who can reach lockd can also stop it in an orderly way.
                await nursery.start(self._heed_signals, shares, stop)
                listener = self._listener = self._listen()
                nursery.start_soon(self._accept, listener, service)
                if self._idle_exit is not None:
                    nursery.start_soon(self._leave_when_idle, listener, claims, self._idle_exit, stop)
                ready()
            background.cancel_scope.cancel()
        file.close()

    # The socket -------------------------------------------------------------------------------

    async def _become_the_one(self) -> None:
        """Take ``lockd.lock``, and keep it until the process ends."""
        path = os.path.join(self._run_dir, start.LOCKD_LOCK)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = trio.current_time() + TAKE_OVER_TIMEOUT
        while not _try_lock(fd):
            # One that has closed its socket is about to end.
            if start.is_running(self._run_dir) or trio.current_time() > until:
                os.close(fd)
                hint = f"See which: fuser -v {path}"
                raise AlreadyRuns(f"another lockd runs in {self._run_dir}", hint=hint)
            await trio.sleep(0.02)

    def _listen(self) -> trio.socket.SocketType:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with start.short_path(self._run_dir, start.SOCKET) as address:
            try:
                os.unlink(address)
            except FileNotFoundError:
                pass
            # Only the umask gives a socket its mode before anybody can connect.
            before = os.umask(0o177)
            try:
                listener.bind(address)
            finally:
                os.umask(before)
        listener.listen(socket.SOMAXCONN)
        return trio.socket.from_stdlib_socket(listener)

    def _unlisten(self, listener: trio.socket.SocketType) -> None:
        try:
            os.unlink(os.path.join(self._run_dir, start.SOCKET))
        except FileNotFoundError:
            pass
        listener.close()

    async def _accept(self, listener: trio.socket.SocketType, service: Service) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except trio.ClosedResourceError:
                    return
                except OSError as error:
                    if listener.fileno() < 0:
                        return
                    if error.errno in OUT_OF_MEANS:
                        log.warning("cannot accept a connection: %s", error.strerror)
                        await trio.sleep(0.1)
                    continue
                self._connections += 1
                self._accepted += 1
                nursery.start_soon(self._serve, sock, service)

    async def _serve(self, sock: trio.socket.SocketType, service: Service) -> None:
        try:
            connection = Connection(sock, service, self._closer)
            with service.serving(connection.client):
                await connection.serve()
            await service.leave(connection.client)
        except Exception:
            log.exception("a connection ended in an unexpected way")
        finally:
            self._connections -= 1
            if not self._connections:
                self._idle.set()

    # The end ----------------------------------------------------------------------------------

    async def _heed_signals(
        self,
        shares: Shares,
        stop: Callable[[], None],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            number = await anext(signals)
            log.info("%s: lockd stops", signal.Signals(number).name)
            # Whoever stops all at once tells us and the mount daemons at the same time.
            with trio.move_on_after(LEAVE_TIMEOUT):
                while shares.mounts or shares.leaving:  # noqa: ASYNC110 - once, for half a second at most
                    await trio.sleep(0.01)
            with trio.move_on_after(FENCE_TIMEOUT) as scope:
                await shares.fence_orphans()
            if scope.cancelled_caught:
                log.error("lockd stops although images of dead mount daemons could not be fenced in time")
            if shares.mounts:
                log.warning("lockd stops while %d mounts need it; they keep the locks they have", len(shares.mounts))
            if self._listener is not None:
                self._unlisten(self._listener)
            killer = threading.Timer(STOP_TIMEOUT, _end_at_once)
            killer.daemon = True
            killer.start()
            stop()

    async def _leave_when_idle(
        self, listener: trio.socket.SocketType, claims: Claims, seconds: float, stop: Callable[[], None]
    ) -> None:
        while True:
            while self._connections:
                self._idle = trio.Event()
                await self._idle.wait()
            # A connection that comes and goes meanwhile starts the time anew.
            seen = self._accepted
            await trio.sleep(seconds)
            if claims:
                continue  # mounts of the last lockd may come back, or have left writers behind
            if self._accepted == seen and not self._connections and self._try_to_leave(listener):
                log.info("nobody has needed lockd for %g s: it ends", seconds)
                stop()
                return

    def _try_to_leave(self, listener: trio.socket.SocketType) -> bool:
        path = os.path.join(self._run_dir, start.START_LOCK)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _try_lock(fd):
            os.close(fd)
            return False
        # Kept to the end of the process: the next lockd is not started before this one has let go of
        # lockd.lock.
        self._unlisten(listener)
        return True


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_at_once() -> None:
    log.warning("lockd ends while calls to the storage still hang")
    logging.shutdown()
    os._exit(0)


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may have: it keeps one for each lock."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(hard, WANTED_DESCRIPTORS),) * 2)
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
