"""One lock of this host: who holds it here, what the backend has granted for it, and who waits.

Pure state: nothing here waits or does I/O.

Invariants:
* An owner who holds it exclusively is the only owner; others may hold it shared together.
* There is a grant while there are holds, and it is at least as strong as the strongest of them.
* Grant and holds are changed by whoever has `transition`, but for two steps that need no backend: a hold
  that the grant covers is added while no transition is under way, and a hold may be taken away at any time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from lockfs.backend import Grant, Holder, Mode
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.share import Mounted, Share
from lockfs.vault.wire import lock_key

Key = tuple[int, int, int]
"""Device and inode number; before them 0, or the number of a share that excludes nobody."""


@dataclass(slots=True)
class Hold:
    """That one owner holds the lock through one mount in one mode, `count` times.

    `holder` is for people; `nodes` are the numbers by which the kernel knows the file on the mount.
    """

    mounted: Mounted
    owner: str
    mode: Mode
    holder: Holder
    nodes: set[int] = field(default_factory=set)
    count: int = 1


@dataclass(slots=True)
class Waiter:
    """One acquire in the queue of a lock; `turn` is set when it should look again."""

    turn: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True, eq=False)
class Lock:
    """See the module.

    `users` counts the calls that have to do with it, `overdue` storage calls that have not come back in
    time. `lost` means that the grant is no longer safe, `backed` that the backend knows of it.  `forget` is
    called when it may be idle.  `fd`, `mount` and `since` tell of the grant: the descriptor that it is on,
    the mount for which it was taken, and when.
    """

    key: Key
    share: Share
    forget: Callable[[Lock], None]
    holds: dict[tuple[str, str, Mode], Hold] = field(default_factory=dict)
    grant: Grant | None = None
    fd: Descriptor | None = None
    mount: Mounted | None = None
    since: float = 0.0
    lost: bool = False
    backed: bool = True
    users: int = 0
    overdue: int = 0
    transition: trio.Lock = field(default_factory=trio.Lock)
    queue: deque[Waiter] = field(default_factory=deque)

    @property
    def wanted(self) -> Mode | None:
        """The strongest mode that is held, None if none is."""
        if not self.holds:
            return None
        modes = {hold.mode for hold in self.holds.values()}
        return Mode.EXCLUSIVE if Mode.EXCLUSIVE in modes else Mode.SHARED

    @property
    def unsettled(self) -> bool:
        """True if the grant is stronger than what is wanted."""
        return self.grant is not None and self.grant.mode is not self.wanted

    @property
    def idle(self) -> bool:
        """True if nothing would be forgotten with it."""
        return not (self.holds or self.grant or self.users or self.overdue)

    def keep(self) -> None:
        """Have the vault keep what the grant lives in: from now on the lock outlives this lockd and the mounts."""
        if self.grant is not None and self.fd is not None and self.share.backend.excludes:
            self.share.vault.put(lock_key(*self.key[1:]), self.kept)

    def keep_no_more(self) -> None:
        """Have the vault close what it keeps for the grant."""
        if self.fd is not None and self.share.backend.excludes:
            self.share.vault.drop(lock_key(*self.key[1:]))

    @property
    def kept(self) -> list[int]:
        """The descriptors that the grant lives in."""
        if self.grant is None or self.fd is None:
            return []
        return [self.fd.number, *self.grant.keep]

    def came_back(self) -> None:
        """An overdue call has ended."""
        self.forget(self)

    def blocker(self, owner: str, mode: Mode) -> Holder | None:
        """Return somebody else on this host who excludes *owner* from *mode*, None if nobody does."""
        if not self.share.backend.excludes:
            return None
        for hold in self.holds.values():
            if hold.owner != owner and Mode.EXCLUSIVE in (mode, hold.mode):
                return hold.holder
        return None

    def covers(self, mode: Mode) -> bool:
        """Say whether a hold in *mode* may be added as things stand, without a word to the backend."""
        return (
            self.grant is not None
            and bool(self.holds)
            and not self.lost
            and not self.transition.locked()
            and (mode is Mode.SHARED or self.grant.mode is Mode.EXCLUSIVE)
        )

    def add(self, mounted: Mounted, owner: str, mode: Mode, holder: Holder, node: int = 0) -> bool:
        """Count one more hold.  Return True if it is the first one of this mount."""
        key = (mounted.mount_id, owner, mode)
        first = not any(hold.mounted is mounted for hold in self.holds.values())
        if key in self.holds:
            self.holds[key].count += 1
        else:
            self.holds[key] = Hold(mounted, owner, mode, holder)
        if node:
            self.holds[key].nodes.add(node)
        return first

    def put(self, mounted: Mounted, owner: str, hold: Hold) -> None:
        """Have one owner hold it as *hold* says, whatever was before."""
        self.holds[mounted.mount_id, owner, hold.mode] = hold

    def nodes(self, mounted: Mounted) -> set[int]:
        """Return the numbers by which the kernel knows the file on one mount."""
        return {node for hold in self.holds.values() if hold.mounted is mounted for node in hold.nodes}

    def is_held_by(self, mounted: Mounted) -> bool:
        """Say whether anything is held through a mount."""
        return any(hold.mounted is mounted for hold in self.holds.values())

    def remove(self, mount_id: str, owner: str, mode: Mode) -> bool:
        """Count one hold less.  Return False if there is none."""
        hold = self.holds.get((mount_id, owner, mode))
        if hold is None:
            return False
        hold.count -= 1
        if not hold.count:
            del self.holds[mount_id, owner, mode]
        return True

    def remove_mount(self, mount_id: str) -> bool:
        """Take away all holds of one mount.  Return False if there are none."""
        gone = [key for key in self.holds if key[0] == mount_id]
        for key in gone:
            del self.holds[key]
        return bool(gone)

    def enter(self, owner: str) -> Waiter:
        """Join the queue: at its end, or at its head if this owner holds the lock already.

        Who waits for a lock must not keep its owner from opening the image once more.
        """
        waiter = Waiter()
        if any(hold.owner == owner for hold in self.holds.values()):
            self.queue.appendleft(waiter)
        else:
            self.queue.append(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Leave the queue, and let the next one look."""
        self.queue.remove(waiter)
        self.kick()

    def kick(self) -> None:
        """Let the head of the queue look again: something has changed."""
        if self.queue:
            self.queue[0].turn.set()

    def holders(self) -> Iterable[Holder]:
        """Return the owners here, for people."""
        return [hold.holder for hold in self.holds.values()]
