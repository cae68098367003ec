"""Closing descriptors without waiting for it.

close(2) on a network filesystem writes back what is dirty in the file, whoever wrote it, and so waits for the
storage as long as that takes.  An event loop must never do that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from queue import Empty, SimpleQueue

LINGER = 1.0
"""Seconds that the thread waits for more before it ends."""


class Closer:
    """A thread that closes descriptors in the order in which they come; there is one while there is work.

    Have one for each storage: a close that hangs holds up those behind it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._fds: SimpleQueue[int] = SimpleQueue()  # to wake who waits for it costs much less than a `Condition` does
        self._lock = threading.Lock()
        self._running = False

    def close(self, fds: Iterable[int]) -> None:
        """Have descriptors closed soon.  They are the closer's from here on."""
        for fd in fds:
            self._fds.put(fd)
        with self._lock:
            if self._running or self._fds.empty():
                return
            self._running = True
        threading.Thread(target=self._run, name=f"closer of {self._name}", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                fd = self._fds.get(timeout=LINGER)
            except Empty:
                with self._lock:
                    if not self._fds.empty():
                        continue
                    self._running = False
                    return
            try:
                os.close(fd)
            except OSError:
                # It reports on data that somebody else wrote; the descriptor is gone all the same.
                pass
