"""A backend that excludes nobody, on this host or another, and never waits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import trio

from lockfs.backend import Context, Denied, Grant, Holder, Host, Image, Mode


class NopBackend:
    """See the module; what each method is for stands in `lockfs.backend.Backend`."""

    excludes = False
    deadline = None

    def __init__(self, context: Context) -> None:
        self._stopped = trio.Event()

    async def start(self) -> None:
        """Nothing can be missing."""

    async def stop(self) -> None:
        """End the stream of losses."""
        self._stopped.set()

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        """Grant it."""
        return Grant(image, mode)

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        """Grant it: what is never kept is always there."""
        return Grant(image, mode)

    async def inherit(self) -> None:
        """Nothing is ever kept."""

    async def convert(self, grant: Grant, mode: Mode, holder: Holder) -> None:
        """Grant it in the other mode."""
        grant.mode = mode

    async def release(self, grant: Grant) -> None:
        """Forget it."""

    async def inspect(self, image: Image) -> Holder | None:
        """No other host tells this one anything."""
        return None

    async def hosts(self) -> Sequence[Host]:
        """No other host is known."""
        return ()

    async def confirm_dead(self, host: str) -> str:
        """No host is judged."""
        raise Denied("the backend nop does not judge whether hosts live", hint="It keeps nobody out.")

    async def lost(self) -> AsyncIterator[Grant]:
        """What is never kept is never lost."""
        await self._stopped.wait()
        nothing: Sequence[Grant] = ()
        for grant in nothing:
            yield grant

    async def fenced(self, grant: Grant) -> None:
        """Nothing is ever lost."""
