"""lockd as a process: its socket, its end, and what it takes to be the only one in its run directory.

Invariants:
* The last step of one that leaves because it is idle is taken under ``start.lock``: whoever wants a lockd
  and holds that finds one that stays, or none.
* A lockd that is told to stop gives no lock back: the mounts that it served still hold descriptors that
  keep them, and start another one.  What nobody but itself keeps locked it fences first.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import trio

from lockfs.errors import LockfsError
from lockfs.linux import service as service_manager
from lockfs.linux.closer import Closer
from lockfs.lockd import statefile, upgrade
from lockfs.lockd.adoption import Adoption
from lockfs.lockd.claims import Claims
from lockfs.lockd.connection import Connection
from lockfs.lockd.events import Events
from lockfs.lockd.fence import Fencer
from lockfs.lockd.heirlooms import Heirlooms
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.seat import Seat
from lockfs.lockd.service import Service
from lockfs.lockd.shares import Shares
from lockfs.lockd.statefile import StateFile
from lockfs.lockd.succession import Succession
from lockfs.lockd.table import Table
from lockfs.lockd.upgrade import Version
from lockfs.lockd.vault import Vault

STOP_TIMEOUT = 5.0
"""Seconds that calls under way may take when lockd is told to stop; a storage that hangs must not keep it."""
LEAVE_TIMEOUT = 0.5
"""Seconds that mounts have to go when lockd is told to stop."""
FENCE_TIMEOUT = 5.0
"""Seconds that the fence may take of what only this lockd keeps locked: one or two, on a host in trouble some."""
ANSWER_TIME = 0.1
"""Seconds to send what was said before this process is another one."""
WANTED_DESCRIPTORS = 1 << 19
OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


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
        self._seat = Seat(run_dir, service_manager.inherited())
        self._vault = Vault(run_dir, idle_exit)

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until a signal says stop, or nobody needs it; call *ready* once it serves.

        Raises `SystemError_` if it cannot begin.
        """
        await self._seat.take()
        state = statefile.read(self._run_dir)
        log.info("lockd of host %s serves in %s", self._host, self._run_dir)
        await self._vault.open()
        async with trio.open_nursery() as background:
            events = Events()
            file = StateFile(self._run_dir, self._host, state)
            recorder = Recorder(file)
            claims = Claims(state, self._host)
            heirlooms = Heirlooms(background, self._vault, claims)
            table = Table(events, recorder, claims, heirlooms)
            fencer = Fencer(background, table, events)
            succession = Succession(table, claims, Adoption(table, claims, fencer, recorder, self._host), recorder)
            shares = Shares(
                background, table, fencer, events, recorder, succession, self._host, self._run_dir, self._vault
            )  # fmt: skip

            async def replace(version: Version) -> None:
                await upgrade.check(version, self._run_dir, shares, claims)
                background.start_soon(self._replace_soon, version)

            service = Service(table, shares, fencer, succession, events, self._run_dir, replace)
            heirlooms.begin()
            succession.begin(background, shares)
            background.start_soon(self._vault.keep, partial(_everything, self._vault, shares, table))
            async with trio.open_nursery() as nursery:
                stop = nursery.cancel_scope.cancel
                # Before the socket is there: who can reach lockd can also stop it in an orderly way.
                await nursery.start(self._heed_signals, shares, claims, stop)
                nursery.start_soon(self._accept, self._seat.listen(), service)
                nursery.start_soon(self._watchdog)
                if self._idle_exit is not None:
                    nursery.start_soon(self._leave_when_idle, shares, claims, self._idle_exit, stop)
                ready()
                service_manager.notify(READY=1, STATUS=f"serves {self._run_dir}", MAINPID=os.getpid())
            background.cancel_scope.cancel()
        self._vault.close()
        file.close()

    # Connections ------------------------------------------------------------------------------

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
        self, shares: Shares, claims: Claims, stop: Callable[[], None],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:  # fmt: skip
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                try:
                    await upgrade.check(Version(), self._run_dir, shares, claims)
                    self._replace(Version())
                except LockfsError as error:
                    log.error("SIGHUP: %s", error)
            service_manager.notify(STOPPING=1)
            log.info("%s: lockd stops", signal.Signals(number).name)
            await self._end_well(shares, claims)
            stop()

    async def _end_well(self, shares: Shares, claims: Claims) -> None:
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
        self._seat.close()
        lives = any(not each.absent for each in shares.mounts.values())
        if lives or any(not each.orphaned for each in claims.all()):
            for mounted in shares.mounts.values():
                if mounted.absent:
                    self._vault.forget(mounted.mount_id)
        else:
            await self._vault.end()
        killer = threading.Timer(STOP_TIMEOUT, _end_at_once)
        killer.daemon = True
        killer.start()

    def _replace(self, version: Version) -> None:
        idle = [] if self._idle_exit is None else ["--idle-exit", str(self._idle_exit)]
        upgrade.replace(version, ["--run-dir", self._run_dir, *idle], self._seat.to_hand_on())

    async def _replace_soon(self, version: Version) -> None:
        await trio.sleep(ANSWER_TIME)
        self._replace(version)

    async def _watchdog(self) -> None:
        """Tell the service manager that the event loop goes round: all that lockd has to do at once it does there."""
        seconds = service_manager.watchdog()
        while seconds is not None:
            service_manager.notify(WATCHDOG=1)
            await trio.sleep(seconds / 3)

    async def _leave_when_idle(
        self, shares: Shares, claims: Claims, seconds: float, stop: Callable[[], None]
    ) -> None:
        while True:
            while self._connections:
                self._idle = trio.Event()
                await self._idle.wait()
            # A connection that comes and goes meanwhile starts the time anew.
            seen = self._accepted
            await trio.sleep(seconds)
            if claims or shares.mounts:
                continue  # mounts of the last lockd may come back, get a successor, or have left writers behind
            if self._accepted == seen and not self._connections and self._seat.try_to_leave():
                log.info("nobody has needed lockd for %g s: it ends", seconds)
                await self._vault.end()
                stop()
                return


def _everything(vault: Vault, shares: Shares, table: Table) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield all that a vault is to keep; last of all that it is all."""
    whole = {key: fds for key, fds in vault.inherited.items() if key.startswith("whole/")}
    yield from ((key, fds) for key, fds in vault.inherited.items() if key not in whole)
    yield from table.kept()
    for mounted in shares.mounts.values():
        yield from mounted.all_kept()
    yield from whole.items()
    for mounted in shares.mounts.values():
        if mounted.whole:
            mounted.is_whole()


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
