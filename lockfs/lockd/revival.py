"""A mount daemon that dies or hangs gets a successor: a new process on its connection, which goes on from its journal.

Until it serves, callers of the mount wait, and notice no more than that; locks stay as they are, and images can be
fenced (`keeper`).  One that dies again and again is started less and less often, and after `RESTARTS` times no more.
Then lockd answers in its place, so that nobody waits for good, and the locks stay until nobody can write.

Invariant: at most one process reads requests.  A successor is started when the one before has ended with all its
threads, admitted by the token that it was given, and reads nothing before `TakeOver` is answered.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from lockfs import text
from lockfs.lockd.attachment import Attachment
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.share import Mounted
from lockfs.protocol.messages import Claimed
from lockfs.steps import step

RESTARTS = int(os.environ.get("LOCKFS_RESTARTS") or 10)
"""How many times in a row a daemon that does not stay alive is started; 0: never."""
STEADY = 10.0
"""Seconds after which a daemon counts as one that stays alive."""
HANG = float(os.environ.get("LOCKFS_HANG") or 5)
"""Seconds for the event loop of a daemon to go round once; a stopped process counts as hung, too."""
PING_PAUSE = 1.0
"""Seconds between two looks whether it does."""
START_TIMEOUT = 15.0
"""Seconds for a successor to take over; it takes a fraction of one, but for a storage that has to be woken."""
DEATH_PATIENCE = 5.0
"""Seconds for a daemon whose life line has ended to end itself; after that it is killed, and awaited."""
LAST_PAUSE = 5.0
"""Seconds of pause before the last start of `RESTARTS`; none before the first, and little before the next ones."""

log = logging.getLogger(__name__)


class Revival:
    """The successor of one mount daemon, while it is being started.

    `claimed` is what it says that the one before has held.
    """

    def __init__(self, mounted: Mounted, attachment: Attachment, source: Descriptor, run_dir: str) -> None:
        self._source = source
        self._mounted = mounted
        self._attachment = attachment
        self._run_dir = run_dir
        self._token = ""
        self._served = trio.Event()
        self.claimed: set[Claimed] = set()

    async def run(self) -> bool:
        """Start successors until one serves; return False if there is none, and is to be none."""
        mounted, attachment = self._mounted, self._attachment
        mountpoint = mounted.mount.mountpoint
        with attachment.until_closed():
            with attachment.in_use(), attachment.fuse.in_use(), self._source.in_use(), attachment.namespace.in_use():
                await self._await_death()
                mounted.deaths = mounted.deaths + 1 if trio.current_time() < mounted.served_since + STEADY else 1
                while mounted.deaths <= RESTARTS:
                    if attachment.connection_has_ended():
                        return False
                    await trio.sleep(LAST_PAUSE * ((mounted.deaths - 1) / RESTARTS) ** 2)
                    log.info("the daemon of %s (process %d) has died; another one is started", mountpoint, mounted.pid)
                    if await self._start():
                        return True
                    mounted.deaths += 1
            log.error(
                "the daemon of %s has died %d times in a row and is not started any more; its log says why.  What is "
                "open there stays locked while it can be written to.  End who uses it, unmount it, and mount it again",
                mountpoint, mounted.deaths,
            )  # fmt: skip
        return False

    def admit(self, token: str, pid: int) -> bool:
        """Let the process *pid* register if it is the one that was started last."""
        if not self._token or not secrets.compare_digest(token, self._token):
            return False
        self._token = ""
        self.claimed.clear()
        try:
            self._attachment.succeed(pid)
        except OSError:
            return False
        return True

    def succeed(self) -> None:
        """The successor serves."""
        self._mounted.revival = None
        self._mounted.restarts += 1
        self._mounted.served_since = trio.current_time()
        self._served.set()

    async def _await_death(self) -> None:
        """Wait until nothing that the daemon has begun can happen any more."""
        with trio.move_on_after(DEATH_PATIENCE):
            await _ended(self._attachment)
            return
        self._attachment.kill_daemon()
        with trio.move_on_after(DEATH_PATIENCE):
            await _ended(self._attachment)
            return
        log.warning(
            "the daemon of %s (process %d) was killed and does not end: it may be stuck in the storage; callers wait",
            self._mounted.mount.mountpoint, self._mounted.pid,
        )  # fmt: skip
        await _ended(self._attachment)

    async def _start(self) -> bool:
        """Start one; return whether it serves.  If not, it has ended."""
        step("revival.before-successor")
        self._token = secrets.token_hex(16)
        try:
            process = await trio.to_thread.run_sync(partial(self._spawn, self._token))
        except OSError as error:
            log.error("a daemon of %s cannot be started: %s", self._mounted.mount.mountpoint, error)
            return False
        pidfd = os.pidfd_open(process.pid)
        try:
            with trio.move_on_after(START_TIMEOUT):
                await _first(self._served.wait, partial(_readable, pidfd))
            if self._served.is_set():
                trio.lowlevel.spawn_system_task(_reap, process, os.dup(pidfd))
                return True
            self._token = ""
            process.kill()
            with trio.CancelScope(shield=True):
                await _readable(pidfd)
            status = process.wait()
            log.warning("a daemon of %s did not come up: status %d", self._mounted.mount.mountpoint, status)
            return False
        except BaseException:
            self._token = ""
            process.kill()
            trio.lowlevel.spawn_system_task(_reap, process, os.dup(pidfd))
            raise
        finally:
            os.close(pidfd)

    def _spawn(self, token: str) -> subprocess.Popen[bytes]:
        attachment, mounted = self._attachment, self._mounted
        fds = (attachment.fuse.number, self._source.number, attachment.namespace.number)
        mount = mounted.mount
        return subprocess.Popen(
            [
                sys.executable, "-P", "-m", "lockfs.fs", text.to_bytes(mount.source), text.to_bytes(mount.mountpoint),
                "--resume", mounted.mount_id, "--token", token,
                "--fuse-fd", str(fds[0]), "--source-fd", str(fds[1]), "--namespace-fd", str(fds[2]),
            ],
            cwd="/", env={**os.environ, "LOCKFS_RUN_DIR": self._run_dir}, start_new_session=True, pass_fds=fds,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


async def watch(mounted: Mounted, attachment: Attachment) -> None:
    """Kill the daemon of a mount when it hangs: its successor does not.  Return when the mount has gone."""
    with attachment.until_closed():
        while not mounted.gone and not mounted.detached:
            await trio.sleep(PING_PAUSE)
            restarts = mounted.restarts
            if mounted.absent or await mounted.orders.ping(HANG):
                continue
            if mounted.restarts == restarts and not mounted.absent and not mounted.detached:
                log.error(
                    "the daemon of %s (process %d) has not answered for %g s: it is killed, and another one started",
                    mounted.mount.mountpoint, mounted.pid, HANG,
                )  # fmt: skip
                attachment.kill_daemon()


async def _first(*waits: Callable[[], Awaitable[None]]) -> None:
    """Return when one of these does."""

    async def wait(one: Callable[[], Awaitable[None]]) -> None:
        await one()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for each in waits:
            nursery.start_soon(wait, each)


async def _ended(attachment: Attachment) -> None:
    if attachment.process is not None:
        await _readable(attachment.process.number)


async def _readable(pidfd: int) -> None:
    await trio.lowlevel.wait_readable(pidfd)


async def _reap(process: subprocess.Popen[bytes], pidfd: int) -> None:
    try:
        await _readable(pidfd)
        process.wait()
    finally:
        os.close(pidfd)
        process.returncode = process.returncode or 0
