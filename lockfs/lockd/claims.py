"""What a predecessor of this lockd had granted, until it is known what has become of it.

Invariants:
* Nothing is granted for an image that a mount of the predecessor held, until that mount has come back and has said what
  it holds, or nobody is left who could write by it.
* Who asks for such an image meanwhile waits; after a limit the answer is that nobody can say (the mount may come back),
  or who has it (its daemon is dead, and processes write on without it).

Pure state, but for the wait.  `lockfs.lockd.orphans` finds out what became of mounts that do not come back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from lockfs.backend import Holder, Mode
from lockfs.errors import LockUnavailable
from lockfs.lockd.state import Identity, ImageState, MountState, State
from lockfs.protocol.errors import HeldError
from lockfs.protocol.messages import HeldBy

PATIENCE = 10.0
"""Seconds that who asks for an image waits for a mount to come back; they take well under one, on a host in trouble
some.
"""


@dataclass(slots=True, eq=False)
class Claim:
    """A mount of the predecessor.

    `before` are the images that it held, `images` those of them that it may hold still.  `orphaned` says that its
    daemon is dead.
    """

    mount: MountState
    before: Mapping[Identity, ImageState]
    images: dict[Identity, ImageState] = field(default_factory=dict)
    orphaned: bool = False

    @classmethod
    def of(cls, mount: MountState) -> Claim:
        """Make one that does not change with the state."""
        before = {
            identity: ImageState(each.image, dict(each.holds), each.lost) for identity, each in mount.images.items()
        }
        return cls(MountState(mount.mount, mount.attached), before, dict(before))

    @property
    def mount_id(self) -> str:
        """The id by which it comes back."""
        return self.mount.mount.mount_id


class Claims:
    """The claims that are not settled.  *host* is the name of this host.

    *blind* says that some of what the predecessor wrote cannot be read: then nothing at all is granted while there may
    be mounts that come back.
    """

    def __init__(self, state: State, host: str) -> None:
        self._host = host
        self._claims = {mount_id: Claim.of(each) for mount_id, each in state.mounts.items()}
        self._by_image: dict[Identity, set[str]] = defaultdict(set)
        for mount_id, claim in self._claims.items():
            for identity in claim.images:
                self._by_image[identity].add(mount_id)
        self._blind_until = trio.current_time() + PATIENCE if state.damaged else 0.0
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._claims)

    def all(self) -> list[Claim]:
        """Return those that are not settled."""
        return list(self._claims.values())

    def get(self, mount_id: str) -> Claim | None:
        """Return the claim of one mount; None if it is settled, or there was none."""
        return self._claims.get(mount_id)

    def strongest(self, identity: Identity) -> Mode | None:
        """Return the strongest mode in which mounts that have not come back may hold an image."""
        modes = {by.mode for mount_id in self._by_image.get(identity, ()) for by in self._holds(mount_id, identity)}
        if not modes:
            return None
        return Mode.EXCLUSIVE if Mode.EXCLUSIVE.value in modes else Mode.SHARED

    def _holds(self, mount_id: str, identity: Identity) -> list[HeldBy]:
        return list(self._claims[mount_id].images[identity].holds.values())

    def shares(self, claim: Claim, identity: Identity) -> bool:
        """Say whether others than this mount may hold an image, too."""
        return self._by_image.get(identity, set()) > {claim.mount_id}

    def is_lost(self, identity: Identity) -> bool:
        """Say whether the predecessor was fencing an image."""
        return any(self._claims[mount_id].images[identity].lost for mount_id in self._by_image.get(identity, ()))

    def settle_image(self, claim: Claim, identity: Identity) -> None:
        """What this mount held of an image is held by the table now, or by nobody."""
        if claim.images.pop(identity, None) is None:
            return
        mounts = self._by_image[identity]
        mounts.discard(claim.mount_id)
        if not mounts:
            del self._by_image[identity]
        self._tell()

    def settle(self, claim: Claim) -> None:
        """All that this mount held is held by the table now, or by nobody."""
        for identity in list(claim.images):
            self.settle_image(claim, identity)
        if self._claims.get(claim.mount_id) is claim:
            del self._claims[claim.mount_id]
        self._tell()

    async def settled(self) -> None:
        """Wait until all claims are settled; for ever where some of what the predecessor wrote cannot be read."""
        while self._claims or self._blind_until:
            await self._changed.wait()

    async def changed(self) -> None:
        """Return when one of them is settled, or holds less."""
        await self._changed.wait()

    @property
    def blind(self) -> bool:
        """Say whether some of what the predecessor wrote cannot be read."""
        return self._blind_until > 0

    def orphan(self, claim: Claim) -> None:
        """The daemon of this mount is dead, and its connection with it."""
        claim.orphaned = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def holders(self, identity: Identity) -> list[Holder]:
        """Return who held an image by what the predecessor had granted."""
        return [
            holder_of(self._host, self._claims[mount_id], by)
            for mount_id in self._by_image.get(identity, ())
            for by in self._holds(mount_id, identity)
        ]

    async def clear(self, identity: Identity, mode: Mode, wait: float) -> None:
        """Return when an image may be had as far as it goes by what the predecessor had granted.

        *wait* is for how many seconds the caller waits for others.  Raises `HeldError`, and `LockUnavailable`.
        """
        begin = trio.current_time()
        while self._claims:
            orphans, awaited = self._obstacles(identity, mode)
            blind = trio.current_time() < self._blind_until
            if not orphans and not awaited and not blind:
                return
            until = begin + (max(wait, PATIENCE) if awaited or blind else wait)
            if trio.current_time() >= until:
                if orphans and not awaited:
                    raise HeldError(holder_of(self._host, *orphans[0]), here=True)
                raise LockUnavailable(self._why(awaited))
            with trio.move_on_at(until):
                await self._changed.wait()

    def _obstacles(self, identity: Identity, mode: Mode) -> tuple[list[tuple[Claim, HeldBy]], list[Claim]]:
        claims = [self._claims[mount_id] for mount_id in self._by_image.get(identity, ())]
        orphans = [
            (claim, by)
            for claim in claims
            if claim.orphaned
            for by in self._holds(claim.mount_id, identity)
            if Mode.EXCLUSIVE in (mode, Mode(by.mode))
        ]
        return orphans, [claim for claim in claims if not claim.orphaned]

    def _why(self, awaited: list[Claim]) -> str:
        claims = awaited or list(self._claims.values())
        names = ", ".join(f"{each.mount.mount.mount.mountpoint} (process {each.mount.mount.pid})" for each in claims)
        return f"lockd was started anew, and has not heard yet what is held by way of {names}"


def holder_of(host: str, claim: Claim, by: HeldBy) -> Holder:
    """Return who held an image, for people."""
    path = next((each.image.path for each in claim.images.values() if by in each.holds.values()), "")
    owner = by.owner
    return Holder(host, Mode(by.mode), owner.pid, owner.command, owner.vm, by.since, path)
