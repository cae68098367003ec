"""What lockd tells the daemon of one mount to do, and whether it has done it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from lockfs.protocol.messages import FencedImage, Order

IMAGES = 100
"""Images of one order.  A daemon that gets little of the processor shows by each one it carries out that it lives."""


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

    async def fence(
        self, images: Sequence[FencedImage], reason: str, patience: float, in_all: float = math.inf
    ) -> bool:
        """Order a fence; return whether it was carried out.

        It is ordered in parts.  The first may take *patience* seconds, as each may after the one before, and all
        together *in_all*.
        """
        parts = [list(images[at : at + IMAGES]) for at in range(0, len(images), IMAGES)]
        with trio.move_on_after(in_all):
            return await self._order("fence", parts, reason, patience)
        return False

    async def ping(self, patience: float) -> bool:
        """Say whether the mount daemon's event loop goes round; also if there is no daemon that listens."""
        return self._daemon is None or await self._order("ping", [[]], "", patience) or self._daemon is None

    async def _order(self, kind: str, parts: Sequence[list[FencedImage]], reason: str, patience: float) -> bool:
        if self._daemon is None:
            return False
        events = {next(self._serial): trio.Event() for _ in parts}
        self._waiting |= events
        try:
            for serial, images in zip(events, parts, strict=True):
                self._daemon.send_nowait(Order(serial, kind, images, reason))
            for done in events.values():
                with trio.move_on_after(patience) as waited:
                    await done.wait()
                if waited.cancelled_caught:
                    return False
        finally:
            for serial in events:
                del self._waiting[serial]
        return True
