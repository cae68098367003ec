"""A watchdog device to use where the kernel has none: a terminal, whose other side counts the time.

What a driver does on an ioctl does a library that is preloaded (``watchdog.c``); the rest is as with a real one: it is
armed when it is opened, fed by each write, disarmed by a ``V`` before it is closed, and resets the host when it is not
fed in time.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import threading
import time
import tty
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
_POLL = 0.02


class StandIn:
    """The device `path`, for programs that have `variables` in their environment.  *reset* is called once."""

    def __init__(self, directory: Path, reset: Callable[[], None]) -> None:
        library = directory / "watchdog.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O", "-Wall", "-o", library, SOURCE, "-ldl"], check=True)
        self.variables = {"LD_PRELOAD": str(library)}
        self._ours, self._theirs = pty.openpty()
        tty.setraw(self._theirs)
        self.path = os.ttyname(self._theirs)
        self.fed: list[float] = []
        """When it was fed; CLOCK_MONOTONIC."""
        self.timeout = 0
        self.armed = False
        self.resets: list[float] = []
        self._reset = reset
        self._closing = threading.Event()
        os.set_blocking(self._ours, False)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(_POLL):
            try:
                self._take(os.read(self._ours, 4096))
            except BlockingIOError:
                pass
            if self.armed and not self.resets and time.monotonic() - self.fed[-1] > self.timeout:
                self.resets.append(time.monotonic())
                self._reset()

    def _take(self, data: bytes) -> None:
        for part in re.findall(rb"T\d+\n|.", data, re.DOTALL):
            if part.startswith(b"T"):
                self.timeout = int(part[1:])
            self.armed = part != b"V"
            self.fed.append(time.monotonic())

    def close(self) -> None:
        """Be rid of it."""
        self._closing.set()
        self._thread.join()
        os.close(self._ours)
        os.close(self._theirs)
