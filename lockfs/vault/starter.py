"""How the vault starts a lockd that nobody else starts."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockfs.linux import flocks
from lockfs.steps import step

FIRST_PAUSE, LAST_PAUSE = 0.03, 5.0
"""Seconds before the first try, in which a mount that lives starts one; and most seconds before another try."""
MANY = int(os.environ.get("LOCKFS_RESTARTS") or 10) or 10
"""Tries in a row after which the pause before the next is the longest one; before the second there is hardly any."""
STEADY = 10.0
"""Seconds after which a lockd counts as one that stays alive."""
STUCK = 3 * float(os.environ.get("LOCKFS_HANG") or 5) + 5
"""Seconds for somebody else to start one: longer than a start may take.  Who needs more was stopped, and is killed."""
PATIENCE = 15.0
"""Seconds for one to come up (`lockfs.protocol.start.START_TIMEOUT`)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to start one: *ready_fd* is appended to *command*.  The files are in *run_dir*."""

    command: Sequence[str]
    environment: Mapping[str, str]
    run_dir: str
    socket: str
    start_lock: str
    lockd_lock: str


class Starter:
    """Goes by what a lockd has said at last of how it is started."""

    def __init__(self) -> None:
        self.recipe: Recipe | None = None
        self._next = 0.0
        self._served_since = 0.0
        self._pid = 0
        self._lock = self._ready = -1
        self._until = 0.0
        self._ended: list[int] = []
        self._busy, self._busy_since = 0, 0.0
        self.tries = 0
        """How many in a row did not come up, or did not stay."""

    def serves(self) -> None:
        """One has connected."""
        self._served_since = time.monotonic()
        self._busy = 0
        self._end_try()

    def gone(self) -> None:
        """It has ended."""
        now = time.monotonic()
        if now > self._served_since + STEADY:
            self.tries = 0
        self._next = now + self._pause

    @property
    def _pause(self) -> float:
        return FIRST_PAUSE + LAST_PAUSE * min(1.0, (max(0, self.tries - 1) / MANY) ** 2)

    @property
    def wait(self) -> float:
        """Seconds until `look` has something to do."""
        return 0.02 if self._ready >= 0 else max(0.0, self._next - time.monotonic())

    def look(self) -> None:
        """Start one, if nobody else does.  Raises OSError."""
        self.reap()
        now = time.monotonic()
        if self._ready >= 0:
            if self._has_spoken() or now > self._until:
                self._end_try()
            return
        if now < self._next or self.recipe is None:
            return
        self._next = now + FIRST_PAUSE
        if self._somebody_does(self.recipe):
            return
        step("vault.before-start")
        self.tries += 1
        self._next = now + self._pause
        self._start(self.recipe)
        step("vault.after-start")

    def reap(self) -> None:
        """Collect what has ended of those that were started."""
        for pid in self._ended:
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self._ended.remove(pid)
                    return
            except ChildProcessError:
                self._ended.remove(pid)
                return

    def _somebody_does(self, recipe: Recipe) -> bool:
        """Say whether one runs or is being started; if not, nobody else starts one until `_end_try`."""
        if _listens(recipe.run_dir, recipe.socket):
            return True
        self._lock = _locked(os.path.join(recipe.run_dir, recipe.start_lock))
        if self._lock < 0:
            self._end_stuck(recipe)
            return True
        seat = _locked(os.path.join(recipe.run_dir, recipe.lockd_lock))
        if seat < 0 or _listens(recipe.run_dir, recipe.socket):
            self._end_try()
        if seat >= 0:
            os.close(seat)
        return self._lock < 0

    def _end_stuck(self, recipe: Recipe) -> None:
        """Kill who has been starting one for too long: while one that was stopped has the lock nobody else can."""
        path, now = os.path.join(recipe.run_dir, recipe.start_lock), time.monotonic()
        if (busy := flocks.holder(path)) != self._busy:
            self._busy, self._busy_since = busy, now
        elif busy and now > self._busy_since + STUCK:
            flocks.end_holder(path)

    def _start(self, recipe: Recipe) -> None:
        self._ready, ready_w = os.pipe()
        os.set_blocking(self._ready, False)
        os.set_inheritable(ready_w, True)
        command = [*recipe.command, str(ready_w)]
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]
        try:
            self._pid = os.posix_spawn(command[0], command, recipe.environment, file_actions=null, setsid=True)
        except OSError:
            self._end_try()
            raise
        finally:
            os.close(ready_w)
        self._ended.append(self._pid)
        self._until = time.monotonic() + PATIENCE

    def _has_spoken(self) -> bool:
        try:
            said = os.read(self._ready, 4096)
        except BlockingIOError:
            return False
        return not said or said.endswith(b"\n")

    def _end_try(self) -> None:
        if self._ready >= 0 and self._pid in self._ended and time.monotonic() > self._until:
            os.kill(self._pid, signal.SIGKILL)  # it is our child, and not collected yet
        for fd in (self._ready, self._lock):
            if fd >= 0:
                os.close(fd)
        self._ready = self._lock = -1


def _listens(run_dir: str, name: str) -> bool:
    """Say whether somebody listens; if that is a service manager, it starts lockd now."""
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            sock.connect(f"/proc/self/fd/{directory}/{name}")
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except BlockingIOError:
        pass
    finally:
        os.close(directory)
    return True


def _locked(path: str) -> int:
    """Return a descriptor with the flock on a file, -1 if somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
