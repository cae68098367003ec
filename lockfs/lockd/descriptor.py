"""Descriptors that clients sent, and when they may be closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lockfs.linux.closer import Closer


class Descriptor:
    """A descriptor that came with a call.  It is closed once, and not while a storage call works with it."""

    __slots__ = ("_closed", "_closer", "_unwanted", "_users", "number")

    def __init__(self, number: int, closer: Closer) -> None:
        self.number = number
        self._closer = closer
        self._users = 0
        self._unwanted = False
        self._closed = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep it open within the context."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_unused()

    def close(self) -> None:
        """Close it as soon as nobody uses it."""
        self._unwanted = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._unwanted and not self._users and not self._closed:
            self._closed = True  # once: its number may be another file's soon
            self._closer.close([self.number])
