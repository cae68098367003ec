"""Who has the flock on a file, and how it is ended where its owner was stopped and lets nobody else have it."""

from __future__ import annotations

import os
import signal

from lockfs.linux import procfs


def holder(path: str) -> int:
    """Return the process that has the flock on a file, 0 if there is none."""
    return next(iter(_holders(path)), 0)


def end_holder(path: str) -> int:
    """Kill who has the flock on a file; return its process id, 0 if there is none.  Raises OSError."""
    for pid in _holders(path):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Once more: from now on the number is not another's.
            if pid in _holders(path):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return pid
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)
    return 0


def _holders(path: str) -> list[int]:
    """Return the processes that have taken the flock on a file (proc_locks(5)), and have it open still."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return []
    found = []
    for line in procfs.contents("/proc/locks").decode().splitlines():
        # As "1: FLOCK  ADVISORY  WRITE 4711 00:1c:1234 0 EOF"; waiters have an arrow after the number.
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(info.st_ino) and int(fields[4]) > 0:
            found.append(int(fields[4]))
    return [pid for pid in found if _has_open(pid, info)]


def _has_open(pid: int, info: os.stat_result) -> bool:
    directory = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(directory):
            try:
                if os.path.samestat(os.stat(f"{directory}/{name}"), info):
                    return True
            except OSError:
                continue  # closed meanwhile
    except OSError:
        pass
    return False
