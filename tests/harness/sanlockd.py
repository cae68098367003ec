"""A real sanlock daemon with a run directory of its own: a host that has sanlock.

No watchdog is used, so the daemon resets nothing.  Its time-outs come from who joins a lockspace.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import processes
from harness.waiting import wait_until

PROGRAM = "/usr/sbin/sanlock"
LOG = "sanlockd.log"


def installed() -> bool:
    return os.path.exists(PROGRAM)


@contextmanager
def sanlockd(run_dir: Path, name: str = "", *arguments: str) -> Iterator[int]:
    """Run one as host *name*; yield its process id.  It listens in *run_dir*, and logs there."""
    run_dir.mkdir(exist_ok=True)
    command = [PROGRAM, "daemon", "-D", "-w", "0", *(("-e", name) if name else ()), *arguments]
    with open(run_dir / LOG, "ab") as log, subprocess.Popen(
        command, env=environment(run_dir), stdin=subprocess.DEVNULL, stdout=log, stderr=log
    ) as process:
        try:
            wait_until(lambda: "started" in (run_dir / LOG).read_text(), 20, "sanlock listens")
            yield process.pid
        finally:
            # Not asked to end: it does not while it has lockspaces.
            process.kill()
            process.wait(20)
    assert not processes.running(process.pid)


def run(run_dir: Path, *arguments: str, check: bool = True) -> str:
    """Run the ``sanlock`` command; return what it prints."""
    done = subprocess.run(
        [shutil.which("sanlock") or PROGRAM, *arguments],
        env=environment(run_dir), check=check, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout


def environment(run_dir: Path) -> dict[str, str]:
    """Without privileges it keeps its user, and its memory is not locked."""
    return {**os.environ, "SANLOCK_RUN_DIR": str(run_dir), "SANLOCK_PRIVILEGED": "0"}
