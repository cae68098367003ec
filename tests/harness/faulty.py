"""One host's path to shared storage, that can be made to stall, fail, tear and be slow; see `harness.faulty_server`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import mounts
from harness.waiting import wait_until

PATIENCE = 10.0
SERVER = Path(__file__).with_name("faulty_server.py")


class Faulty:
    """The *directory*, seen at *path* by a path of its own."""

    def __init__(self, directory: Path, path: Path) -> None:
        path.mkdir()
        self.path = path
        self._server = subprocess.Popen(
            [sys.executable, SERVER, directory, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._await("ready")

    def be(self, how: str) -> None:
        """Be as *how* says."""
        assert self._server.stdin is not None
        self._server.stdin.write(how + "\n")
        self._server.stdin.flush()
        self._await(how.split()[0])

    def _await(self, word: str) -> None:
        assert self._server.stdout is not None
        if self._server.stdout.readline() != word + "\n":
            raise OSError(f"the server of {self.path} has not said {word}")

    def lose_memory(self) -> None:
        """Have all that this host has not written yet be gone, as when the host is reset."""
        # The kernel gives up a connection whose server is gone, and with it all that waits to be written by it.
        self._server.kill()
        self._server.wait(PATIENCE)

    def close(self) -> None:
        """Unmount, as soon as daemons that are ending have let go.  Raises OSError if that does not happen."""
        if self._server.poll() is None:
            self.be("fine")
        try:
            wait_until(lambda: not mounts.umount(self.path), PATIENCE, f"{self.path} is not in use")
        except TimeoutError:
            mounts.umount(self.path, lazy=True)
            self._server.terminate()
            raise
        finally:
            with self._server:
                assert self._server.stdin is not None
                self._server.stdin.close()
                self._server.wait(PATIENCE)
