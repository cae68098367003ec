"""What a test may leave behind in its own process and below its directory: nothing."""

from __future__ import annotations

import gc
import time
from pathlib import Path

from harness import mounts, processes

PATIENCE = 2.0
"""Seconds that a thread may take which closes what nobody waits for; a leak is still there after it."""


class Watch:
    """Remembers this process's open descriptors and the mounts below a directory, to tell what is new."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.descriptors = processes.descriptors()
        self.mounts = set(mounts.below(directory))

    def complaints(self) -> list[str]:
        """Return what is new, and unmount what is."""
        found = []
        if self._leaked():
            gc.collect()  # what only a reference cycle keeps open is no leak
            self._wait()
            found += [f"descriptor {fd} was left open: {what}" for fd, what in sorted(self._leaked().items())]
        for mount in reversed(mounts.below(self.directory)):
            if mount not in self.mounts:
                found.append(f"{mount.path} ({mount.fstype}) was left mounted")
                mounts.umount(mount.path, lazy=True)
        return found

    def _wait(self) -> None:
        until = time.monotonic() + PATIENCE
        while self._leaked() and time.monotonic() < until:
            time.sleep(0.01)

    def _leaked(self) -> dict[int, str]:
        now = processes.descriptors()
        return {fd: what for fd, what in now.items() if self.descriptors.get(fd) != what}
