"""Whether lockd answers: one that was stopped, or hangs, keeps its connections, and nobody gets an image."""

from __future__ import annotations

import math

import trio

from lockfs.errors import LockfsError
from lockfs.protocol import hung, messages
from lockfs.protocol.client import LockdClient, end_hung

SILENCE = 2.5
"""Seconds without a word from lockd, which gives an order each second or so, before it is asked."""
LOOK_PAUSE = 1.0
"""Seconds between two looks at this."""


class Vigil:
    """Kills a lockd that does not answer any more; that it is gone is noticed by others."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._heard = -math.inf

    def heard(self) -> None:
        """Take note that lockd has said something on its own account."""
        self._heard = trio.current_time()

    async def keep(self) -> None:
        """Look after it, until cancelled."""
        while True:
            await trio.sleep(LOOK_PAUSE)
            if trio.current_time() < self._heard + SILENCE:
                continue
            if not await self._answers():
                await end_hung(self._run_dir)
            self.heard()

    async def _answers(self) -> bool:
        """Say whether it answers within `hung.HANG` seconds; also if there is none."""
        client = LockdClient(self._run_dir)
        with trio.move_on_after(hung.HANG) as scope:
            try:
                await client.call(messages.GetStatus(), messages.Status)
            except LockfsError:
                pass
        await client.aclose()
        return not scope.cancelled_caught
