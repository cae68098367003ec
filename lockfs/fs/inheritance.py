"""What a successor asks lockd for: what the mount daemon before it has held.

It goes by the lockd of the moment when it was asked for (`LockdSession.inheritance`).
"""

from __future__ import annotations

from lockfs.protocol import messages
from lockfs.protocol.client import LockdClient
from lockfs.protocol.errors import InvalidCall

CLAIMS = 1000
"""Holds that are claimed in one message."""


class Inheritance:
    """What was the mount's, which lockd knows by *mount_id*."""

    def __init__(self, client: LockdClient, mount_id: str) -> None:
        self._client = client
        self._mount_id = mount_id

    async def claim(self, claims: list[messages.Claimed]) -> list[messages.Claimed]:
        """Say what the daemon before has held, and all of it; return what is not safe to write under.

        Raises `LockUnavailable`.
        """
        unsafe: list[messages.Claimed] = []
        for at in range(0, max(1, len(claims)), CLAIMS):
            last = at + CLAIMS >= len(claims)
            call = messages.Claim(self._mount_id, claims[at : at + CLAIMS], last)
            answer, _ = await self._client.call(call, messages.Claims)
            unsafe += answer.unsafe
        return unsafe

    async def fetch(self) -> dict[int, int]:
        """Return the descriptors that lockd has kept for a successor, by node.  Raises `LockUnavailable`."""
        found: dict[int, int] = {}
        while True:
            call = messages.Fetch(self._mount_id, max(found, default=0))
            try:
                fetched, fds = await self._client.call(call, messages.Fetched)
            except InvalidCall:
                return found  # a lockd that runs on after an update may be of a version that keeps none
            found.update(zip(fetched.nodes, fds, strict=True))
            if not fetched.nodes:
                return found

    async def reclaim(self, image: messages.Image) -> tuple[int | None, list[int]]:
        """Return the token of the lock of an image, and the descriptors to keep with it.  Raises `LockfsError`."""
        call = messages.Reclaim(self._mount_id, image.dev, image.ino)
        reclaimed, keep = await self._client.call(call, messages.Reclaimed)
        return reclaimed.token, keep

    async def known(self, nodes: list[int]) -> set[int]:
        """Return those nodes that the kernel knows.  Raises `LockUnavailable`."""
        answer, _ = await self._client.call(messages.Known(self._mount_id, nodes), messages.KnownNodes)
        return set(answer.nodes)
