"""lockd's side of the vault (`lockfs.vault`): what the last lockd had is found there, what this one has is kept there.

Invariants:
* Only the start of lockd waits for the vault, for a limited time: what is said to it lies in the kernel when the call
  returns, with its descriptors, and outlives this process.  Where the vault is too slow it lies in a queue: then who is
  to be granted a lock waits until it does not (`flushed`).
* A vault that dies, or hangs and is killed for it, is started anew and filled; until then this process keeps all, as it
  does anyway.
* What was `inherited` is the next holder's: whoever puts something under its key, or drops that, is done with it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import trio

import lockfs
from lockfs.linux.closer import Closer
from lockfs.protocol import hung, start
from lockfs.protocol.wire import close_all
from lockfs.steps import step
from lockfs.vault import wire
from lockfs.vault.wire import Item

ANSWER_TIMEOUT = 2.0
"""Seconds for the vault to hand out all it has; it takes milliseconds."""
PULSE = 1.0
"""Seconds between two signs of life."""
END_TIMEOUT = 1.0
"""Seconds for the vault to end when it is told to."""
RETRY = 1.0
"""Seconds before it is tried again to start one."""
LATER = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
"""Errors of sending that pass."""
NOT_FOR_OTHERS = ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")
"""Variables by which a service manager speaks to this process alone."""

Kept = tuple[str, Sequence[int]]
log = logging.getLogger(__name__)


class Vault:
    """See the module.  One that was not opened keeps nothing, as in tests of the table alone."""

    def __init__(self, run_dir: str = "", idle_exit: float | None = None) -> None:
        self._run_dir = run_dir
        self._idle_exit = start.IDLE_EXIT if idle_exit is None else str(idle_exit)
        self._socket: socket.socket | None = None
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued, self._drained = trio.Event(), trio.Event()
        self._unheard = 0
        self._closers: dict[str, Closer] = {}
        self._children: list[int] = []
        self._ending, self._ended = False, trio.Event()
        self._wanted, self._ready = trio.Event(), trio.Event()
        self.inherited: dict[str, list[int]] = {}
        """What the last lockd had, and nobody has taken up or dropped yet."""

    # What is kept ----------------------------------------------------------------------------

    def put(self, key: str, fds: Sequence[int]) -> None:
        """Have descriptors kept under a key, in place of what was there; they stay the caller's."""
        if self._socket is not None:
            step("lockd.before-vault-put")
            self._say([Item(wire.PUT, len(fds), key)], fds)
            step("lockd.after-vault-put")
        self._let_go(key)

    def drop(self, key: str) -> None:
        """Have what is kept under a key closed."""
        if self._socket is not None:
            step("lockd.before-vault-drop")
            self._say([Item(wire.DROP, 0, key)])
            step("lockd.after-vault-drop")
        self._let_go(key)

    def forget(self, mount_id: str) -> None:
        """Have all closed that is kept of a mount."""
        self._say([Item(wire.FORGET, 0, mount_id)])
        for key in [key for key in self.inherited if not key.startswith("lock/") and wire.group(key) == mount_id]:
            self._let_go(key)
        self._closers.pop(mount_id, None)

    def take(self, key: str) -> list[int] | None:
        """Return what was inherited under a key, which is the caller's from here on; the vault keeps its own."""
        return self.inherited.pop(key, None)

    def take_nameless(self, mount_id: str) -> dict[int, int]:
        """Return open files without names that were inherited, by node; they are the caller's from here on."""
        prefix = wire.nameless_key(mount_id, 0)[:-1]
        found = [key for key in self.inherited if key.startswith(prefix)]
        return {int(key[len(prefix) :]): self.inherited.pop(key)[0] for key in found}

    def copies(self, key: str) -> list[int]:
        """Return duplicates of what was inherited under a key; they are the caller's."""
        return [os.dup(fd) for fd in self.inherited.get(key, ())]

    def settle_mount(self, mount_id: str) -> None:
        """Drop what was inherited of a mount and is not its any more."""
        for key in list(self.inherited):
            if key.startswith(("mount/", "nameless/")) and wire.group(key) == mount_id:
                self.drop(key)

    def is_whole(self, mount_id: str) -> bool:
        """Say whether the last lockd has had kept all that was held through a mount."""
        return wire.whole_key(mount_id) in self.inherited

    async def flushed(self) -> None:
        """Return when all that was said lies in the kernel: at once, but for a vault that is too slow."""
        with trio.move_on_after(3 * hung.HANG):
            while self._queue:
                await self._drained.wait()

    def _let_go(self, key: str) -> None:
        if (fds := self.inherited.pop(key, None)) is not None:
            self._closers.setdefault(wire.group(key), Closer(key)).close(fds)

    # What is said ----------------------------------------------------------------------------

    def _say(self, items: Sequence[Item], fds: Sequence[int] = ()) -> None:
        if self._socket is None:
            return
        message = wire.encode(items)
        if not self._queue:
            try:
                wire.send(self._socket, message, fds)
                return
            except OSError as error:
                if error.errno not in LATER:
                    self._give_up()
                    return
        self._queue.append((message, [os.dup(fd) for fd in fds]))
        self._queued.set()

    async def begun(self) -> None:
        """Return when there is a vault, which is started now if there is none; or if that takes too long."""
        self._wanted.set()
        with trio.move_on_after(ANSWER_TIMEOUT):
            await self._ready.wait()

    def _give_up(self) -> None:
        """Have `keep` notice that the vault does not know all: the next one is filled with it."""
        try:
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended

    async def open(self) -> None:
        """Find the vault, and take what is there.  Never fails: without it all is as it would be."""
        try:
            sock = self._connect()
        except OSError:
            return  # there is none before there is a mount
        with trio.move_on_after(ANSWER_TIMEOUT):
            version = await self._take_all(sock)
            if version == lockfs.__version__:
                self._greet(sock)
                return
            log.info("the vault is of version %s, and is replaced", version)
        sock.close()
        await self._begin(lambda: sorted(self.inherited.items(), key=lambda kept: kept[0].startswith("whole/")))

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            with start.short_path(self._run_dir, wire.SOCKET) as address:
                sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _take_all(self, sock: socket.socket) -> str:
        """Take what the vault has; return its version, an empty one if it does not say all."""
        try:
            wire.send(sock, wire.encode([Item(wire.TAKE)]), [])
            while True:
                await trio.lowlevel.wait_readable(sock)
                message, fds = wire.receive(sock)
                if not message:
                    return ""
                for item, own in wire.deal(wire.decode(message), fds):
                    if item.word == wire.ALL:
                        return item.what
                    self.inherited[item.what] = own
        except (OSError, ValueError) as error:
            log.error("the vault cannot hand out what it has: %s", error)
            return ""

    def _greet(self, sock: socket.socket) -> None:
        """Tell how the next lockd is started; from now on all is said to this one."""
        self._socket, self._unheard = sock, 0
        self._wanted.set()
        self._ready.set()
        command = [sys.executable, "-P", "-m", "lockfs.lockd", "--run-dir", self._run_dir]
        recipe = {
            "command": [*command, "--idle-exit", self._idle_exit, "--ready-fd"],
            "environment": {key: value for key, value in os.environ.items() if key not in NOT_FOR_OTHERS},
            "run_dir": self._run_dir,
            "socket": start.SOCKET,
            "start_lock": start.START_LOCK,
            "lockd_lock": start.LOCKD_LOCK,
        }
        self._say([Item(wire.START, 0, json.dumps(recipe))])

    async def _begin(self, everything: Callable[[], Iterable[Kept]]) -> None:
        """Start one that is given *everything*."""
        try:
            sock = await trio.to_thread.run_sync(self._spawn)
        except OSError as error:
            log.error("there is no vault, so mounts end if lockd and their daemon die at once: %s", error)
            return
        self._greet(sock)
        for key, fds in everything():
            self._say([Item(wire.PUT, len(fds), key)], fds)

    def _spawn(self) -> socket.socket:
        if ended := hung.end(self._run_dir, wire.LOCK):  # one that cannot be reached, or does not answer
            self._children.append(ended)  # perhaps: a lockd that has replaced itself is the parent of the one it had
        path = os.path.dirname(os.path.dirname(os.path.abspath(lockfs.__file__)))
        environment = {key: value for key, value in os.environ.items() if key not in NOT_FOR_OTHERS}
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as listener,
            start.short_path(self._run_dir, wire.SOCKET) as address,
        ):
            try:
                os.unlink(address)
            except FileNotFoundError:
                pass
            listener.bind(address)
            os.chmod(address, 0o600)  # the directory is its owner's alone
            listener.listen()
            os.set_inheritable(listener.fileno(), True)
            command = [sys.executable, "-S", "-P", "-m", "lockfs.vault", self._run_dir, str(listener.fileno())]
            null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]
            environment |= {"PYTHONPATH": path, "LOCKFS_RUN_DIR": self._run_dir}
            self._children.append(os.posix_spawn(command[0], command, environment, file_actions=null, setsid=True))
        return self._connect()

    # Its life --------------------------------------------------------------------------------

    async def keep(self, everything: Callable[[], Iterable[Kept]]) -> None:
        """Look after the vault until cancelled; one that is started anew is given *everything*."""
        await self._wanted.wait()
        while True:
            if self._socket is not None:
                await self._attend(self._socket)
                self.close()
                self._reap()
                if self._ending:
                    self._ended.set()
                    return
                log.warning("the vault has ended; another one is started")
            await self._begin(everything)
            if self._socket is None:
                await trio.sleep(RETRY)

    async def _attend(self, sock: socket.socket) -> None:
        """Return when the vault has ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_queue, sock)
            nursery.start_soon(self._pulse)
            await self._until_end(sock)
            nursery.cancel_scope.cancel()

    async def _until_end(self, sock: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                message, fds = wire.receive(sock)
            except BlockingIOError:
                continue
            except OSError:
                return
            close_all(fds)
            if not message:
                return
            self._unheard = 0

    async def _send_queue(self, sock: socket.socket) -> None:
        while True:
            while self._queue:
                await trio.lowlevel.wait_writable(sock)
                message, fds = self._queue[0]
                try:
                    wire.send(sock, message, fds)
                except OSError as error:
                    if error.errno not in LATER:
                        self._give_up()
                        return
                    await trio.sleep(PULSE / 100)  # there is room, but not enough
                    continue
                self._queue.popleft()
                close_all(fds)
            self._drain()
            self._queued = trio.Event()
            await self._queued.wait()

    async def _pulse(self) -> None:
        """Tell that lockd lives, and kill a vault that does not."""
        while True:
            if self._unheard * PULSE > hung.HANG:
                log.error("the vault has not answered for %g s: it is killed", hung.HANG)
                await trio.to_thread.run_sync(hung.end, self._run_dir, wire.LOCK)
                self._unheard = 0
            self._reap()
            self._unheard += 1
            self._say([Item(wire.ALIVE)])
            await trio.sleep(PULSE)

    async def end(self) -> None:
        """Have the vault close all and leave; return when it has, or after a second."""
        if self._socket is None:
            return
        self._ending = True
        self._say([Item(wire.END)])
        with trio.move_on_after(END_TIMEOUT):
            await self._ended.wait()
        try:
            os.unlink(os.path.join(self._run_dir, wire.SOCKET))
        except FileNotFoundError:
            pass

    def _reap(self) -> None:
        for pid in list(self._children):
            try:
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            except ChildProcessError:
                pass
            self._children.remove(pid)

    def close(self) -> None:
        """Hang up; the vault goes on, unless it was told to end."""
        if self._socket is not None:
            self._socket.close()
            self._socket, self._ready = None, trio.Event()
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self._drain()

    def _drain(self) -> None:
        self._drained.set()
        self._drained = trio.Event()
