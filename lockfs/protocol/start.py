"""Where lockd's run directory is, and how lockd is started on demand.  Light and synchronous: the mount
helper uses it.

Whoever wants lockd running holds an exclusive flock on ``start.lock`` while it starts one, so that mounts
that begin at once start one lockd only; a lockd that leaves because it is idle takes the same lock for its
last step.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator

from lockfs.errors import LockfsError, SystemError_, UsageError
from lockfs.options import seconds

DEFAULT_RUN_DIR = "/run/lockfs"
SOCKET = "lockd.sock"
START_LOCK = "start.lock"
LOCKD_LOCK = "lockd.lock"
START_TIMEOUT = 15.0
"""Seconds for a lockd to come up: an interpreter with its imports takes well under one, on a host that
boots some.
"""
IDLE_EXIT = "10"


def run_dir() -> str:
    """Return the run directory of this host's lockd: ``LOCKFS_RUN_DIR``, or /run/lockfs."""
    return os.environ.get("LOCKFS_RUN_DIR") or DEFAULT_RUN_DIR


def journal_path(path: str, mount_id: str) -> str:
    """Return where the daemon of a mount keeps what its successor has to know; *path* is the run directory."""
    return os.path.join(path, "mounts", f"{mount_id}.journal")


def remove_journal(path: str, mount_id: str) -> None:
    """Remove the journal of a mount that is gone."""
    journal = journal_path(path, mount_id)
    for each in (journal, f"{journal}.new"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each)


def prepare_run_dir(path: str) -> None:
    """Make the run directory if it is missing.

    Raises `SystemError_` for one that others could tamper with.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        info = os.stat(path)
    except OSError as error:
        raise SystemError_(f"cannot make the run directory {path}: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode):
        raise SystemError_(f"the run directory {path} is not a directory")
    if info.st_uid != os.geteuid():
        raise SystemError_(
            f"the run directory {path} belongs to user {info.st_uid}, not to {os.geteuid()}",
            hint=f"Run this as user {info.st_uid}, or remove it, or set LOCKFS_RUN_DIR to another directory.",
        )
    if info.st_mode & 0o022:
        raise SystemError_(
            f"others may write to the run directory {path} (mode {stat.S_IMODE(info.st_mode):04o})",
            hint=f"Make sure of what is in it, then: chmod 0700 {path}",
        )


@contextlib.contextmanager
def short_path(directory: str, name: str) -> Iterator[str]:
    """Yield a path of *name* in *directory* that fits into a socket address, however long the directory's
    own path is.
    """
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def is_running(path: str) -> bool:
    """Say whether a lockd listens in this run directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            with short_path(path, SOCKET) as address:
                sock.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise SystemError_(f"cannot connect to lockd in {path}: {error.strerror}") from error
        return True


def ensure_lockd(path: str) -> None:
    """Start a lockd for this run directory unless one runs.

    Raises `SystemError_` with the reason if it does not come up.  It may leave again when it stays unused
    (``LOCKFS_IDLE_EXIT`` seconds, default 10), so who connects later must be ready to call this again.
    """
    prepare_run_dir(path)
    if is_running(path):
        return
    with _start_lock(path):
        if not is_running(path):
            try:
                _start(path)
            except SystemError_:
                # Somebody may have begun to start one, and died.
                if not is_running(path):
                    raise


@contextlib.contextmanager
def _start_lock(path: str) -> Iterator[None]:
    fd = os.open(os.path.join(path, START_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _flock_until(fd, time.monotonic() + 2 * START_TIMEOUT, path)
        yield
    finally:
        os.close(fd)


def _flock_until(fd: int, deadline: float, path: str) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock = os.path.join(path, START_LOCK)
                raise SystemError_(
                    f"somebody has been starting lockd in {path} for too long",
                    hint=f"See who: fuser -v {lock}",
                ) from None
            time.sleep(0.02)


def _start(path: str) -> None:
    idle = os.environ.get("LOCKFS_IDLE_EXIT") or IDLE_EXIT
    try:
        seconds(idle)
    except ValueError as error:
        raise UsageError(f"LOCKFS_IDLE_EXIT={idle}: must be {error}") from None
    # setsid forks, so that lockd is nobody's child: whoever starts it may live on and need not collect it.
    command = ["setsid", "--fork", sys.executable, "-P", "-m", "lockfs.lockd"]
    command += ["--run-dir", os.path.abspath(path), "--idle-exit", idle, "--ready-fd"]
    ready, ready_w = os.pipe()
    try:
        try:
            null = subprocess.DEVNULL
            subprocess.run(
                [*command, str(ready_w)],
                cwd="/",
                stdin=null,
                stdout=null,
                stderr=null,
                pass_fds=[ready_w],
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            hint = "It is started with setsid, of util-linux."
            raise SystemError_(f"cannot start lockd: {error}", hint=hint) from error
        finally:
            os.close(ready_w)
        _wait_ready(ready, path)
    finally:
        os.close(ready)


def _wait_ready(ready: int, path: str) -> None:
    line = _read_line(ready, time.monotonic() + START_TIMEOUT)
    where = f"Its log: {os.path.join(path, 'log', 'lockd.log')}, or: journalctl -t lockfs-lockd"
    if line is None:
        raise SystemError_(f"lockd was not ready after {START_TIMEOUT:.0f} s", hint=where)
    if not line.endswith(b"\n"):
        raise SystemError_("lockd died while it started", hint=where)
    said = json.loads(line)
    if not said.get("ready"):
        raise SystemError_(f"lockd did not start: {said.get('error')}", hint=said.get("hint") or where)


def _read_line(fd: int, deadline: float) -> bytes | None:
    """Read up to a newline or the end; None if the deadline passes first."""
    data = b""
    while not data.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([fd], [], [], remaining)[0]:
            return None
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        data += chunk
    return data


def tell_ready(fd: int, error: LockfsError | None = None) -> None:
    """Tell the one that started this daemon how it went, over the pipe it gave us, and close that."""
    said: dict[str, object] = {"ready": True}
    if error is not None:
        said = {"error": error.message, "hint": error.hint, "exit": error.exit_code}
    with contextlib.suppress(OSError):
        os.write(fd, json.dumps(said).encode() + b"\n")
    os.close(fd)


__all__ = ["ensure_lockd", "is_running", "prepare_run_dir", "run_dir", "short_path", "tell_ready"]
