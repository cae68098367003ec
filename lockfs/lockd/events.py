"""What happens, told to whoever watches.

A watcher has a bounded queue; one that does not keep up is dropped, so that it costs neither memory nor
anybody's time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import trio

from lockfs.protocol.messages import Event

QUEUE = 1000
"""Events that a watcher may be behind."""


class Events:
    """The watchers, and the way to reach them all."""

    def __init__(self) -> None:
        self._watchers: dict[trio.MemorySendChannel[Event], Callable[[], None]] = {}

    def publish(self, event: Event) -> None:
        """Tell everybody; never waits."""
        for watcher, drop in list(self._watchers.items()):
            try:
                watcher.send_nowait(event)
            except trio.WouldBlock:
                del self._watchers[watcher]
                drop()

    @contextmanager
    def watch(self, drop: Callable[[], None]) -> Iterator[AsyncIterator[Event]]:
        """Within the context, iterate over what is published; *drop* is called if that is too slow."""
        send, receive = trio.open_memory_channel[Event](QUEUE)
        with send, receive:
            self._watchers[send] = drop
            try:
                yield receive
            finally:
                self._watchers.pop(send, None)
