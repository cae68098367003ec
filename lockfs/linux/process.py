"""Who a process is: its identity for as long as it lives, and what people call it.

FUSE reports the id of the *thread* that makes a request.  A process is its thread-group id with its start time,
which no later process has.  Everything here reads /proc, and may find that the process has gone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lockfs.text import from_bytes

_QEMU_NAME = re.compile(rb"(?:^|,)guest=((?:[^,]|,,)*)")


@dataclass(frozen=True, slots=True)
class Process:
    """A process: `pid` is its thread-group id, `start` its start time in clock ticks since boot."""

    pid: int
    start: int


def of_thread(tid: int) -> Process | None:
    """Return the process that thread *tid* belongs to; None if it has gone (or is in a pid namespace that we do not
    see).
    """
    if tid <= 0:
        return None
    pid = _thread_group(tid)
    return None if pid is None else of_pid(pid)


def of_pid(pid: int) -> Process | None:
    """Return the process *pid*; None if there is none."""
    stat = _read(f"/proc/{pid}/stat")
    if stat is None:
        return None
    # The command may contain anything, parentheses too: fields start after the last one.
    fields = stat.rpartition(b")")[2].split()
    return Process(pid, int(fields[19]))


def _thread_group(tid: int) -> int | None:
    status = _read(f"/proc/{tid}/status")
    if status is None:
        return None
    start = status.index(b"\nTgid:") + 6
    return int(status[start : status.index(b"\n", start)])


def groups(tid: int) -> tuple[int, ...] | None:
    """Return the supplementary groups of a thread; None if it has gone."""
    status = _read(f"/proc/{tid}/status") if tid > 0 else None
    if status is None:
        return None
    start = status.index(b"\nGroups:") + 8
    return tuple(map(int, status[start : status.index(b"\n", start)].split()))


def program(pid: int) -> str:
    """Return the file name of the program that *pid* runs, without directory; empty if it cannot be told."""
    try:
        path = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""
    return os.path.basename(path.removesuffix(" (deleted)"))


def command(pid: int) -> str:
    """Return the short name of the process, for people."""
    return from_bytes((_read(f"/proc/{pid}/comm") or b"").rstrip(b"\n"))


def cgroup(pid: int) -> str:
    """Return the control group of a process in the unified hierarchy, else in the first one; empty if there is none."""
    lines = (_read(f"/proc/{pid}/cgroup") or b"").splitlines()
    paths = dict(line.split(b":", 2)[::2] for line in lines if line.count(b":") >= 2)
    if not paths:
        return ""
    unified = paths.get(b"0", b"/")
    if unified != b"/":
        return from_bytes(unified)
    # A host that still runs the old hierarchies keeps its services in the named one.
    named = [line.split(b":", 2)[2] for line in lines if b":name=" in line]
    return from_bytes(named[0] if named else unified)


def virtual_machine(pid: int) -> str:
    """Return the name of the virtual machine that *pid* runs (QEMU's ``-name``); empty if it runs none."""
    arguments = (_read(f"/proc/{pid}/cmdline") or b"").split(b"\0")
    if b"-name" not in arguments:
        return ""
    value = arguments[arguments.index(b"-name") + 1 : arguments.index(b"-name") + 2]
    if not value:
        return ""
    found = _QEMU_NAME.search(value[0])
    name = found.group(1) if found else value[0].partition(b",")[0]
    return from_bytes(name.replace(b",,", b","))


def _read(path: str) -> bytes | None:
    # Every open for writing comes here several times, and a file object costs more than the reading.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        content = b""
        while part := os.read(fd, 65536):
            content += part
        return content
    except OSError:
        return None
    finally:
        os.close(fd)
