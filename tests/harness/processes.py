"""Other processes as /proc shows them: which belong to a host, what they have open, how much memory they use.

A process that ends while it is looked at counts as gone, never as an error; so does a zombie.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def everyone() -> list[int]:
    """Return the ids of all processes."""
    return [int(name) for name in os.listdir(PROC) if name.isdigit()]


def of_run_dir(run_dir: Path) -> list[int]:
    """Return the processes whose environment says that they belong to the host *run_dir*."""
    wanted = b"LOCKFS_RUN_DIR=" + os.fsencode(run_dir)
    return [pid for pid in everyone() if wanted in environment(pid)]


def environment(pid: int) -> list[bytes]:
    """Return the environment that a process was started with; empty for a zombie."""
    return _read(pid, "environ").split(b"\0")


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process; empty for a zombie."""
    return [os.fsdecode(part) for part in _read(pid, "cmdline").split(b"\0")[:-1]]


def running(pid: int) -> bool:
    """Say whether a process exists and is not a zombie."""
    state = _read(pid, "stat").rpartition(b")")[2].split()
    return bool(state) and state[0] not in (b"Z", b"X")


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """Return what each open descriptor of a process stands for."""
    directory = PROC / str(pid) / "fd"
    found: dict[int, str] = {}
    for name in os.listdir(directory):
        try:
            found[int(name)] = os.readlink(directory / name)
        except FileNotFoundError:
            pass  # the descriptor of the listing itself
    return found


def memory(pid: int) -> dict[str, int]:
    """Return the resident and the proportional set size of a process in bytes, as ``Rss`` and ``Pss``."""
    sizes: dict[str, int] = {}
    for line in _read(pid, "smaps_rollup").splitlines()[1:]:
        name, _, rest = line.partition(b":")
        if name in (b"Rss", b"Pss"):
            sizes[name.decode()] = int(rest.split()[0]) * 1024
    return sizes


def wait_until_gone(pids: Iterable[int], seconds: float) -> list[int]:
    """Wait until all of *pids* have ended; return those that have not after *seconds*."""
    left = list(pids)
    deadline = time.monotonic() + seconds
    while left := [pid for pid in left if running(pid)]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.005)
    return left


def end(pids: Iterable[int], how: signal.Signals, seconds: float) -> list[int]:
    """Send a signal to *pids*; return those still there after *seconds*."""
    pids = list(pids)
    for pid in pids:
        try:
            os.kill(pid, how)
        except ProcessLookupError:
            pass
    return wait_until_gone(pids, seconds)


def describe(pid: int) -> str:
    """Return one line that tells a person which process this is."""
    return f"process {pid}: {' '.join(command_line(pid)) or '(gone)'}"


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
