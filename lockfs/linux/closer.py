"""Closing descriptors without waiting for it.

close(2) on a network filesystem writes back what is dirty in the file, whoever wrote it, and so waits for the
storage as long as that takes.  An event loop must never do that.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable

LINGER = 1.0
"""Seconds that the thread waits for more before it ends."""


class Closer:
    """A thread that closes descriptors in the order in which they come; there is one while there is work.

    Have one for each storage: a close that hangs holds up those behind it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._fds: deque[int] = deque()
        self._changed = threading.Condition()
        self._running = False

    def close(self, fds: Iterable[int]) -> None:
        """Have descriptors closed soon.  They are the closer's from here on."""
        if not (new := list(fds)):
            return  # as with most calls: the thread is not to be woken for nothing
        with self._changed:
            self._fds.extend(new)
            if self._running:
                self._changed.notify()
            else:
                self._running = True
                threading.Thread(target=self._run, name=f"closer of {self._name}", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._fds and not self._changed.wait_for(lambda: self._fds, LINGER):
                    self._running = False
                    return
                fd = self._fds.popleft()
            try:
                os.close(fd)
            except OSError:
                # It reports on data that somebody else wrote; the descriptor is gone all the same.
                pass
