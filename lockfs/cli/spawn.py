"""How the mount helper starts a mount daemon and learns that the mount serves.  Imports no trio."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lockfs.cli.preflight import DEAD, FSTYPE
from lockfs.errors import EXIT_MOUNT, LockfsError, MountError
from lockfs.linux import mount, mountinfo
from lockfs.protocol import start
from lockfs.text import from_bytes

READY_TIMEOUT = 60.0
"""Seconds for a mount to come up; shared storage that has to be woken may take many of them."""
ANSWER_TIMEOUT = 20.0
"""Seconds for the first request of a mount that says it is ready."""
END_TIMEOUT = 5.0
"""Seconds for a daemon to clean up after SIGTERM, before SIGKILL."""
MAX_LINE = 1 << 16
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Say = Callable[[str], None]
"""Tells a person who asked for it (mount -v) what goes on."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a mount daemon is told.

    `source` and `mountpoint` are real paths; `fsname` is the source as it was typed, which is what mount(8)
    compares with fstab.  `data` goes to mount(2) besides what FUSE needs.
    """

    source: bytes
    mountpoint: bytes
    fsname: bytes
    flags: Sequence[str]
    options: str
    data: str

    def command(self, ready_fd: int) -> list[str | bytes]:
        """Return the command line of the daemon."""
        return [
            sys.executable, "-P", "-m", "lockfs.fs", self.source, self.mountpoint,
            "--fsname", self.fsname, "--flags", ",".join(self.flags), "-o", self.options,
            *(("--data", self.data) if self.data else ()),
            "--ready-fd", str(ready_fd),
        ]  # fmt: skip

    @property
    def log_hint(self) -> str:
        """Where the daemon logs, for people."""
        component = "mount-" + from_bytes(self.mountpoint).strip("/").replace("/", "-")[-200:]
        return f"Its log: journalctl -t 'lockfs-{component}', or log/{component}.log in the run directory."


def mount_and_wait(request: Request, run_dir: str, say: Say) -> None:
    """Start the daemon, and lockd if none runs, and wait until the mount serves.

    Both start at the same time, which they need most of for their imports.  Raises `LockfsError`, leaving nothing
    behind.
    """
    start.prepare_run_dir(run_dir)
    ready, ready_w = os.pipe()
    process = None
    try:
        with _uninterrupted():
            process = _start(request, run_dir, ready_w)
        os.close(ready_w)
        ready_w = -1
        say(f"started the mount daemon, process {process.pid}")
        start.ensure_lockd(run_dir)
        say(f"lockd runs in {run_dir}")
        _wait_ready(ready, process, request, say)
        _wait_answer(request)
    except BaseException:
        if process is not None:
            _end(process, request.mountpoint)
        raise
    finally:
        os.close(ready)
        if ready_w >= 0:
            os.close(ready_w)
    # It lives on as nobody's child; Popen would otherwise warn when it is collected.
    process.returncode = 0


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Make a signal that ends this program wait for the end of the block: what is started in it must become known."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _start(request: Request, run_dir: str, ready_fd: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            request.command(ready_fd), cwd="/", env={**os.environ, "LOCKFS_RUN_DIR": os.path.abspath(run_dir)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, pass_fds=[ready_fd],
        )  # fmt: skip
    except OSError as error:
        raise MountError(f"the mount daemon cannot be started: {error.strerror}") from error


def _wait_ready(ready: int, process: subprocess.Popen[bytes], request: Request, say: Say) -> None:
    line = _read_line(ready, say)
    if line is None:
        raise MountError(f"the mount daemon was not ready after {READY_TIMEOUT:.0f} s", hint=request.log_hint)
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        if _is_mounted(request.mountpoint) and _ask(request.mountpoint) == 0:
            say("the mount daemon died, and lockd has started another one")
            return
        status = _status(process.wait(END_TIMEOUT))
        raise MountError(f"the mount daemon died while it started ({status})", hint=request.log_hint)
    if said.get("ready") is not True:
        raise _failure(said)


def _failure(said: dict[str, object]) -> LockfsError:
    reason = str(said.get("error") or "the mount daemon gave no reason")
    error = MountError(reason, hint=str(said.get("hint") or ""))
    code = said.get("exit")
    error.exit_code = code if isinstance(code, int) and 0 < code < 128 else EXIT_MOUNT
    return error


def _status(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"


def _read_line(fd: int, say: Say) -> bytes | None:
    """Read up to a newline or the end; None if `READY_TIMEOUT` passes first."""
    start = time.monotonic()
    data = b""
    while not data.endswith(b"\n") and len(data) < MAX_LINE:
        waited = time.monotonic() - start
        if waited > READY_TIMEOUT:
            return None
        if not select.select([fd], [], [], 5.0)[0]:
            say(f"waiting for the mount daemon, {time.monotonic() - start:.0f} s")
            continue
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        data += chunk
    return data


def _wait_answer(request: Request) -> None:
    shown = from_bytes(request.mountpoint)
    code = _ask(request.mountpoint)
    if code is None:
        message = f"'{shown}' is mounted but did not answer within {ANSWER_TIMEOUT:.0f} s"
        raise MountError(message, hint=request.log_hint)
    if code != 0:
        message = f"'{shown}' is mounted but cannot be used: {os.strerror(code)}"
        raise MountError(message, hint=request.log_hint)
    if not _is_mounted(request.mountpoint):
        raise MountError(f"the mount daemon is ready, but '{shown}' is not mounted", hint=request.log_hint)


def _ask(mountpoint: bytes) -> int | None:
    """Ask a mount for the attributes of its root.  Return 0 or the errno; None if nobody answers in time.

    A child asks, for a request that is never answered holds whoever made it.
    """
    child = os.fork()
    if child == 0:
        code = errno.EIO
        try:
            os.stat(mountpoint)
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    pidfd = os.pidfd_open(child)
    try:
        answered = bool(select.select([pidfd], [], [], ANSWER_TIMEOUT)[0])
    finally:
        os.close(pidfd)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if answered else None


def _is_mounted(mountpoint: bytes) -> bool:
    there = mountinfo.at(mountpoint)
    return there is not None and there.fstype == FSTYPE


def _end(process: subprocess.Popen[bytes], mountpoint: bytes) -> None:
    """End a daemon that did not come up, and take away its mount if it could not do so itself."""
    process.terminate()
    try:
        process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Only a mount whose daemon is dead: another helper may have mounted here at the same time.
    if _is_mounted(mountpoint) and _ask(mountpoint) in DEAD:
        with contextlib.suppress(OSError):
            mount.umount(mountpoint, mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW)
