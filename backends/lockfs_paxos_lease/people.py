"""Who holds an image, for people: the record of its host says the host, a card of that host the rest.

No lock depends on any of this; it costs a bounded time and number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import trio

from lockfs import text
from lockfs.backend import UNKNOWN_HOST, Context, Holder, Host, Image, Mode
from lockfs.cards import Cards, with_holds
from lockfs_paxos_lease import driver
from lockfs_paxos_lease.disk.call import Steps, call
from lockfs_paxos_lease.disk.lane import Lane, Overdue

TIMEOUT = 2.0
"""Seconds for a card."""
THREADS = 4

T = TypeVar("T")


class People:
    """The cards of one share."""

    def __init__(self, context: Context) -> None:
        source = text.from_bytes(context.source)
        self._cards = Cards(context.source_fd, source, f"{context.host}\0{context.run_dir}")
        self._lane = Lane(THREADS)

    async def open(self) -> None:
        """Find or make the place of the cards."""
        await self._aside(self._cards.open)

    async def close(self) -> None:
        """Close it."""
        await self._aside(self._cards.close)

    def note(self, image: Image, holder: Holder) -> Steps[None]:
        """Tell other hosts who holds an image here.

        Nobody waits long for that; and what comes when nobody waits for it any more, is taken back.
        """
        ino = image.ino
        yield from self._in_passing(lambda: self._cards.write(ino, holder), lambda _: self._cards.remove(ino))

    def forget(self, image: Image) -> Steps[None]:
        """Nobody holds it here any more."""
        ino = image.ino
        yield from self._in_passing(lambda: self._cards.remove(ino), lambda _: None)

    def _in_passing(self, work: Callable[[], None], undo: Callable[[None], None]) -> Steps[None]:
        try:
            yield from call(work, TIMEOUT, self._lane, undo)
        except (Overdue, OSError):
            pass

    async def noted(self, image: Image, holder: Holder) -> None:
        """Do as `note`.  Whoever is cancelled in it would not know what has become of the lock."""
        with trio.CancelScope(shield=True):
            await driver.run(self.note(image, holder), {})

    async def forgotten(self, image: Image) -> None:
        """Do as `forget`."""
        with trio.CancelScope(shield=True):
            await driver.run(self.forget(image), {})

    async def holder(self, image: Image, mode: Mode, host: str, host_id: int) -> Holder:
        """Name a holder.  *host* is what its record says, empty if that is not known; *host_id* 0 if not even that."""
        card = await self._aside(lambda: self._cards.read(image.ino))
        if card is not None and (not host or card.host.startswith(host)):
            return replace(card, mode=mode)
        return Holder(host or (f"with id {host_id}" if host_id else UNKNOWN_HOST), mode)

    async def holds(self, hosts: Sequence[Host]) -> Sequence[Host]:
        """Return hosts with what the cards say that they hold."""
        return with_holds(hosts, await self._aside(self._cards.all) or [])

    async def _aside(self, work: Callable[[], T]) -> T | None:
        """Do something with the cards; None where that fails.

        Whoever is cancelled in it would not know what has become of the lock; and it does not take long.
        """
        try:
            with trio.CancelScope(shield=True):
                return await self._lane.call(work, TIMEOUT)
        except (Overdue, OSError):
            pass
        return None
