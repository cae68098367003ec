"""Mounting a filesystem whose byte locks fail or hang; see `harness.lockless_server`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from harness import mounts
from harness.waiting import wait_until

PATIENCE = 10.0
SERVER = Path(__file__).with_name("lockless_server.py")


class Lockless:
    """One such filesystem, mounted at `path`: locks fail with *error* on every file, or with *where* "img" on that one.

    With 0 as *error* they are not answered before `go_on`.
    """

    def __init__(self, path: Path, error: int, where: str) -> None:
        path.mkdir()
        self.path = path
        command = [sys.executable, SERVER, path, str(error), where]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE)
        if not self.server.stdout or self.server.stdout.readline() != b"ready\n":
            raise OSError("the server did not come up")

    def go_on(self) -> None:
        """Answer all locks from now on."""
        self.server.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """Unmount, as soon as daemons that are ending have let go.  Raises OSError if that does not happen."""
        self.go_on()
        try:
            wait_until(lambda: not mounts.umount(self.path), PATIENCE, f"{self.path} is not in use")
        except TimeoutError:
            mounts.umount(self.path, lazy=True)
            self.server.terminate()
            raise
        finally:
            with self.server:
                status = self.server.wait(PATIENCE)
        if status != 0:
            raise OSError(f"the server of {self.path} ended with {status}")
