"""Page-aligned buffers, kept for the next I/O of the same size.

A buffer belongs to one I/O until that has ended in the kernel, however long it takes: it is taken and given back in
the thread that makes the system call.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KEPT = 8
"""Buffers of one size that are kept."""


class Buffers:
    """A store of buffers; safe to use from all threads."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def take(self, length: int) -> Iterator[memoryview]:
        """Lend *length* bytes of aligned memory with anything in it."""
        size = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            free = self._free.setdefault(size, [])
            buffer = free.pop() if free else mmap.mmap(-1, size)
        try:
            with memoryview(buffer) as whole, whole[:length] as part:
                yield part
        finally:
            with self._lock:
                if len(free) < KEPT:
                    free.append(buffer)
