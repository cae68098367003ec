"""The vault as a process: one loop that serves one lockd after the other."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence

import lockfs
from lockfs.steps import step
from lockfs.vault import wire
from lockfs.vault.starter import LAST_PAUSE, MANY, Recipe, Starter
from lockfs.vault.store import Store
from lockfs.vault.wire import Item

HANG = float(os.environ.get("LOCKFS_HANG") or 5)
"""Seconds without a word from lockd after which it counts as one that hangs."""
DOUBT = 4.0
"""Seconds more before it is killed: mounts that live do that before, and this process itself may have been stopped."""
LOOK = 1.0
"""Seconds between two looks at what takes time."""
LINGER = 1.0
"""Seconds without a lockd after which a vault leaves that keeps nothing of a mount."""
LEAVE = 10.0
"""Seconds after SIGTERM in which the end of lockd is the end of the vault, too."""
ANSWER_TIMEOUT = 5.0
"""Seconds for lockd to take what it has asked for."""


class Daemon:
    """Serves those who connect to *listener*; the files of lockd are in *run_dir*."""

    def __init__(self, run_dir: str, listener: socket.socket) -> None:
        self._run_dir = run_dir
        self._listener = listener
        self._store = Store()
        self._starter = Starter()
        self._lockd: socket.socket | None = None
        self._pid, self._pidfd = 0, -1
        self._heard = self._gone = time.monotonic()
        self._doubted = 0.0
        self._told_to_leave = -LEAVE
        self._over = False
        self._loud = False

    def run(self) -> None:
        """Serve until nobody needs the vault."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._leave_soon)
        while not self._over:
            sock = self._lockd or self._listener
            poll = select.poll()
            poll.register(sock.fileno(), select.POLLIN)
            if poll.poll(self._pause() * 1000):
                if self._lockd is None:
                    self._accept()
                else:
                    self._serve(self._lockd)
            if self._lockd is None:
                self._without_lockd()
            else:
                self._starter.reap()
                self._watch()
        if self._lockd is not None:
            self._lockd.close()

    def _leave_soon(self, number: int, _: object) -> None:
        self._told_to_leave = time.monotonic()

    def _pause(self) -> float:
        if self._lockd is None and self._store.mounts:
            return min(LOOK, self._starter.wait)
        return LOOK / 5 if self._lockd is None else LOOK

    # lockd ------------------------------------------------------------------------------------

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        self._pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            sock.close()
            return
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except OSError:
            self._pidfd = -1  # it has ended; what it has said is still to be heard
        sock.settimeout(ANSWER_TIMEOUT)
        self._lockd, self._heard = sock, time.monotonic()
        self._starter.serves()

    def _serve(self, sock: socket.socket) -> None:
        try:
            message, fds = wire.receive(sock)
        except ConnectionResetError:
            return  # it has died with an answer unread; what it had said before is still to be heard
        except OSError as error:
            self._report(f"lockd cannot be heard: {error}")
            self._hang_up()
            return
        if not message:
            self._hang_up()
            return
        self._heard, self._doubted = time.monotonic(), 0.0
        try:
            dealt = list(wire.deal(wire.decode(message), fds))
        except ValueError as error:
            for fd in fds:
                os.close(fd)
            self._report(f"lockd said what cannot be understood: {error}")
            self._hang_up()
            return
        try:
            for item, own in dealt:
                self._obey(sock, item, own)
        except (OSError, ValueError) as error:
            self._report(f"lockd said what cannot be done, or cannot be answered: {error}")
            self._hang_up()

    def _obey(self, sock: socket.socket, item: Item, fds: list[int]) -> None:
        if item.word == wire.PUT:
            self._store.put(item.what, fds)
        elif item.word == wire.DROP:
            self._store.drop(item.what)
        elif item.word == wire.FORGET:
            self._store.forget(item.what)
        elif item.word == wire.TAKE:
            step("vault.before-answer")
            for message, kept in self._store.messages():
                self._answer(sock, message, kept)
            self._answer(sock, wire.encode([Item(wire.ALL, 0, lockfs.__version__)]))
            step("vault.after-answer")
        elif item.word == wire.START:
            self._starter.recipe = Recipe(**json.loads(item.what))
        elif item.word == wire.ALIVE:
            self._answer(sock, wire.encode([item]))
        elif item.word == wire.END:
            self._over = True
        else:
            raise ValueError(f"there is no '{item.word}'")

    def _answer(self, sock: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send an answer; to one that has died none, since what else it had said is still to be heard."""
        try:
            wire.send(sock, message, fds)
        except ConnectionError:
            pass

    def _hang_up(self) -> None:
        if self._lockd is not None:
            self._lockd.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._lockd, self._pidfd, self._gone, self._doubted = None, -1, time.monotonic(), 0.0
        self._starter.gone()

    def _watch(self) -> None:
        """Kill a lockd that hangs, as one that was stopped: with no mount daemon nobody else would notice."""
        now = time.monotonic()
        if now < self._heard + HANG or not self._store.mounts:
            return
        if not self._doubted:
            self._doubted = now
        elif now > self._doubted + DOUBT:
            self._heard, self._doubted = now, 0.0
            try:
                if self._pidfd >= 0:
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                    self._report(f"lockd (process {self._pid}) has not answered for {HANG:g} s: it is killed")
            except ProcessLookupError:
                pass

    def _without_lockd(self) -> None:
        now = time.monotonic()
        if now < self._told_to_leave + LEAVE:
            self._over = True
        elif not self._store.mounts:
            self._over = now > self._gone + LINGER
        else:
            try:
                self._starter.look()
            except OSError as error:
                self._report(f"lockd cannot be started: {error}")
            if self._starter.tries == MANY and not self._loud:
                self._loud = True
                self._report(
                    f"lockd has been started {MANY} times and does not stay; its log says why.  "
                    f"It is tried again every {LAST_PAUSE:g} s; until then who uses a mount waits"
                )

    def _report(self, what: str) -> None:
        # Who never has anything to say need not have loaded this.
        import logging

        from lockfs import log

        if not logging.getLogger().handlers:
            log.set_up("vault", self._run_dir)
        logging.getLogger("lockfs.vault").error("%s", what)
