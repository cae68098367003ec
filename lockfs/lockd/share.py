"""A share that is mounted on this host, its backend, and the mounts of it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from lockfs.backend import Backend
from lockfs.lockd.attachment import Attachment
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.keeper import Keeper
from lockfs.lockd.orders import Orders
from lockfs.lockd.storage import Storage
from lockfs.lockd.vault import Vault
from lockfs.protocol import messages
from lockfs.vault.wire import mount_key, nameless_key, whole_key

if TYPE_CHECKING:
    from lockfs.lockd.revival import Revival

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class Share:
    """One source directory, known by device and inode number of its top, with the backend that all its
    mounts use.

    `options` are the parsed options of the backend, `top` a descriptor of the top.  `overdue` makes it a
    place of storage calls that are about the share as a whole.  `vault` is that of this host.
    """

    dev: int
    ino: int
    source: str
    backend_name: str
    options: Mapping[str, object]
    top: Descriptor
    backend: Backend
    storage: Storage
    vault: Vault = field(default_factory=Vault)
    mounts: dict[str, Mounted] = field(default_factory=dict)
    overdue: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    ended: trio.CancelScope = field(default_factory=trio.CancelScope)

    def came_back(self) -> None:
        """An overdue call has ended, which means nothing for the share."""


class Adopting:
    """The images of a mount that has come back whose locks the backend has yet to take up."""

    def __init__(self) -> None:
        self._images: set[tuple[int, int]] = set()
        self._none = trio.Event()
        self._none.set()

    def __contains__(self, identity: tuple[int, int]) -> bool:
        return identity in self._images

    def __len__(self) -> int:
        return len(self._images)

    def add(self, identity: tuple[int, int]) -> None:
        """Begin with one."""
        if not self._images:
            self._none = trio.Event()
        self._images.add(identity)

    def discard(self, identity: tuple[int, int]) -> None:
        """One is done."""
        self._images.discard(identity)
        if not self._images:
            self._none.set()

    async def done(self) -> None:
        """Return when all are."""
        await self._none.wait()


@dataclass(slots=True, eq=False)
class Mounted:
    """A registered mount.  `pid` is that of its daemon, which alone may speak for it.

    `attachment` is None before the mount serves, and again when it is mounted nowhere any more: then it is `detached`,
    and gets no more locks.  `source` is its source directory.  While a successor of its daemon is being started, there
    is a `revival`; `restarts` counts them, `deaths` how often in a row one has died soon after it served.  `gone` says
    that the daemon has ended for good; a `keeper` then answers in its place while there may be somebody who can write.
    `fenced` has the node ids that were fenced.  `came_back` says that its daemon has registered it once more, with this
    lockd, `handed_over` that it has said all that it holds, `whole` that the vault knows all of it.  `nameless` is what
    `lockfs.lockd.nameless` keeps.
    """

    mount_id: str
    mount: messages.Mount
    pid: int
    share: Share
    since: float = field(default_factory=time.time)
    source: Descriptor | None = None
    came_back: bool = False
    attachment: Attachment | None = None
    detached: bool = False
    gone: bool = False
    orders: Orders = field(default_factory=Orders)
    fenced: set[int] = field(default_factory=set)
    keeper: Keeper | None = None
    adopting: Adopting = field(default_factory=Adopting)
    handed_over: bool = False
    whole: bool = False
    revival: Revival | None = None
    restarts: int = 0
    deaths: int = 0
    served_since: float = -math.inf
    nameless: dict[int, Descriptor] = field(default_factory=dict)

    @property
    def absent(self) -> bool:
        """Say whether there is no mount daemon at the moment."""
        return self.gone or self.revival is not None

    def keep(self, attachment: Attachment, nursery: trio.Nursery) -> Keeper:
        """Answer the kernel from now on, since the daemon is dead; also what that one has left unanswered."""
        if self.keeper is None:
            self.keeper = Keeper(attachment, self.mount.mountpoint, self.fenced)
            nursery.start_soon(self.keeper.run)
        self.keeper.holding = not self.gone
        self.keeper.ask_again()
        return self.keeper

    @property
    def kept(self) -> list[int]:
        """What the vault is to keep so that a successor of the daemon can be started: see `mount_key`."""
        there, source = self.attachment, self.source
        if there is None or source is None or not there.resumable:
            return []
        return [there.fuse.number, there.root.number, source.number, there.namespace.number]

    def all_kept(self) -> Iterator[tuple[str, list[int]]]:
        """Yield all that the vault is to keep of the mount, by key."""
        if kept := self.kept:
            yield mount_key(self.mount_id), kept
            for node, each in self.nameless.items():
                yield nameless_key(self.mount_id, node), [each.number]

    def is_whole(self) -> None:
        """All that is held through the mount is kept by the vault from now on, before the mount is told of it."""
        self.whole = True
        self.share.vault.put(whole_key(self.mount_id), [])

    def detach(self) -> None:
        """Close what lockd keeps of the mount."""
        if self.attachment is not None:
            self.attachment.close()
            self.attachment = None
        if self.source is not None:
            self.source.close()
        for each in self.nameless.values():
            each.close()
        self.nameless.clear()
        self.share.vault.forget(self.mount_id)
        self.detached = True
