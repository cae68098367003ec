"""What lockd tells the daemon of one mount to do, and whether it has done it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from lockfs.protocol.messages import FencedImage, Order

IMAGES = 1000
"""Images of one order: with numbers alone, a message of these is far below the limit."""


class Orders:
    """The orders to one mount daemon.  There is none but while it listens."""

    def __init__(self) -> None:
        self._serial = itertools.count(1)
        self._daemon: trio.MemorySendChannel[Order] | None = None
        self._waiting: dict[int, trio.Event] = {}

    @contextmanager
    def listen(self) -> Iterator[trio.MemoryReceiveChannel[Order]]:
        """Within the context, receive the orders; a later listener takes the place of an earlier one."""
        send, receive = trio.open_memory_channel[Order](math.inf)
        if self._daemon is not None:
            self._daemon.close()
        self._daemon = send
        with send, receive:
            try:
                yield receive
            finally:
                if self._daemon is send:
                    self._daemon = None

    def obeyed(self, serial: int) -> None:
        """Note that an order has been carried out."""
        if (event := self._waiting.get(serial)) is not None:
            event.set()

    async def fence(self, images: Sequence[FencedImage], reason: str, patience: float) -> bool:
        """Order a fence; return whether it was carried out.  Each part of it may take *patience* seconds."""
        for at in range(0, len(images), IMAGES):
            if not await self._fence(list(images[at : at + IMAGES]), reason, patience):
                return False
        return True

    async def ping(self, patience: float) -> bool:
        """Say whether the mount daemon's event loop goes round; also if there is no daemon that listens."""
        return self._daemon is None or await self._order("ping", [], "", patience) or self._daemon is None

    async def _fence(self, images: list[FencedImage], reason: str, patience: float) -> bool:
        return await self._order("fence", images, reason, patience)

    async def _order(self, kind: str, images: list[FencedImage], reason: str, patience: float) -> bool:
        if self._daemon is None:
            return False
        serial = next(self._serial)
        done = self._waiting[serial] = trio.Event()
        try:
            self._daemon.send_nowait(Order(serial, kind, images, reason))
            with trio.move_on_after(patience):
                await done.wait()
        finally:
            del self._waiting[serial]
        return done.is_set()
