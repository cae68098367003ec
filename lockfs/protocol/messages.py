"""What is said on lockd's socket, as types.  `io.lockfs.Lockd.varlink` is the same for any varlink client.

Paths and names are in the text form of `lockfs.text`.  Times are seconds since 1970, for people.
A parameter named ``fd`` or ``*_fd`` is the index of a descriptor that was sent with the message.
`METHODS` and `ERRORS` list what the interface has; their names on the wire are those of the interface, a
dot, and the key.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lockfs.backend import Holder, Mode

INTERFACE = "io.lockfs.Lockd"
ModeName = Literal["shared", "exclusive"]
DataPath = Literal["passthrough", "gated"]
"""How data gets to the storage: inside the kernel, or through the mount daemon."""


class Owner(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who opens: `key` says who is the same owner, the rest is for people."""

    key: str
    pid: int = 0
    command: str = ""
    vm: str = ""
    uid: int = 0


class Image(msgspec.Struct, frozen=True):
    """An image as the mount daemon sees it: identity, path below the source, path that programs use."""

    dev: int
    ino: int
    relative: str
    path: str


class Mount(msgspec.Struct, frozen=True):
    """A mount, as its daemon registers it.

    `fstype` and `fsoptions` are those of the storage as the daemon's mount namespace has it, and as it was before
    the daemon took its private view of it, which no list of mounts shows.
    """

    source: str
    mountpoint: str
    fstype: str
    fsoptions: dict[str, str]
    backend: str
    options: dict[str, str] = {}


class HolderInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who holds an image.  `here` is true if it is this host."""

    host: str
    mode: ModeName
    pid: int = 0
    command: str = ""
    vm: str = ""
    since: float = 0.0
    path: str = ""
    token: int | None = None
    here: bool = False

    @classmethod
    def of(cls, holder: Holder, *, here: bool = False) -> HolderInfo:
        """Make the message form of what a backend said."""
        return cls(
            host=holder.host,
            mode=holder.mode.value,
            pid=holder.pid,
            command=holder.command,
            vm=holder.vm,
            since=holder.since,
            path=holder.path,
            token=holder.token,
            here=here,
        )

    def holder(self) -> Holder:
        """Return the same as the backend interface has it."""
        return Holder(
            host=self.host,
            mode=Mode(self.mode),
            pid=self.pid,
            command=self.command,
            vm=self.vm,
            since=self.since,
            path=self.path,
            token=self.token,
        )


class LockInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One lock that this host holds, with all its owners here."""

    source: str
    mountpoint: str
    image: Image
    mode: ModeName
    since: float
    backend: str
    owners: list[HolderInfo]
    token: int | None = None


class MountInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One registered mount.

    `data` says how data gets to the storage, empty before the mount serves.  `daemon_gone` is true if its daemon has
    died and gets no successor: what is open may still be written to, and stays locked.  `restarts` counts the
    successors so far; while one is being started, `restarting` is true.
    """

    mount_id: str
    mount: Mount
    pid: int
    since: float
    locks: int
    data: str = ""
    daemon_gone: bool = False
    restarts: int = 0
    restarting: bool = False


# Calls -------------------------------------------------------------------------------------------


class Register(msgspec.Struct, frozen=True, omit_defaults=True):
    """The connection that makes this call is the mount's life line: it closes when the mount daemon ends.

    With *mount_id* a mount that was registered before comes back, after lockd or its daemon was restarted; `HandOver`
    follows.
    """

    mount: Mount
    source_fd: int = 0
    mount_id: str = ""


class Registered(msgspec.Struct, frozen=True):
    """`excludes` is false if the backend grants everything.

    *deadline_fd* is shared memory that says until when locks are safe (`lockfs.linux.deadline`); null if they do not
    expire.
    """

    mount_id: str
    host: str
    excludes: bool
    deadline_fd: int | None = None


class Acquire(msgspec.Struct, frozen=True):
    """Take or share a lock.  *wait* is how many seconds a conflict may last before it is refused.

    *node* is the number by which the kernel knows the file on the mount, 0 if it is not known.
    """

    mount_id: str
    image: Image
    mode: ModeName
    owner: Owner
    wait: float = 0.0
    lock_fd: int = 0
    node: int = 0


class Acquired(msgspec.Struct, frozen=True, omit_defaults=True):
    """`since` and `token` are those of the lock.

    Descriptors that ride along come with the first hold that a mount has on an image, and must be kept open
    until its last one is released: the lock lives in them too.  `first` says that this is such a hold; with `foreign`
    the first of the descriptors is the one that the lock was put on, without it that is the one of the call.
    """

    since: float
    token: int | None = None
    first: bool = False
    foreign: bool = False


class Release(msgspec.Struct, frozen=True):
    """Give back one hold: the same image, owner and mode as in one earlier `Acquire`."""

    mount_id: str
    dev: int
    ino: int
    mode: ModeName
    owner: str


class Released(msgspec.Struct, frozen=True):
    """Another owner, here or elsewhere, gets the image now unless there are other holds."""


class HeldBy(msgspec.Struct, frozen=True, omit_defaults=True):
    """That one owner holds an image through a mount, *count* times; *nodes* as `Acquire.node`, *since* for people."""

    owner: Owner
    mode: ModeName
    count: int = 1
    nodes: list[int] = []
    since: float = 0.0


class HeldImage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is held of one image through a mount.

    *lock_fd* is the descriptor that the lock was put on, *keep_fds* the others that came with it; -1 and none if the
    mount has none.  *token* is that of the lock.  *lost* says that the image was fenced.
    """

    image: Image
    holds: list[HeldBy]
    lock_fd: int = -1
    keep_fds: list[int] = []
    lost: bool = False
    token: int | None = None


class HandOver(msgspec.Struct, frozen=True, omit_defaults=True):
    """A mount that has come back says what it holds; the last one of these calls has *last*.

    What is listed in none of them it does not hold.
    """

    mount_id: str
    images: list[HeldImage] = []
    last: bool = False


class HandedOver(msgspec.Struct, frozen=True):
    """lockd has it.  What it finds lost is being fenced."""


class Inspect(msgspec.Struct, frozen=True):
    """Ask who holds an image; never takes a lock.

    *lock_fd* is open for writing where the storage allows it.
    """

    mount_id: str
    image: Image
    lock_fd: int = 0


class Inspected(msgspec.Struct, frozen=True):
    """`holders` is empty if nobody holds the image."""

    holders: list[HolderInfo]


class Attach(msgspec.Struct, frozen=True):
    """The mount serves.  Here is what lockd needs to fence its images, also when its daemon hangs or is dead.

    *root_fd* is the root directory, on a private clone of the mount; *fuse_fd* the connection to the kernel.  lockd
    keeps both until the mount is gone.  *resumable* says that there is a journal: if the daemon dies, lockd starts a
    successor.
    """

    mount_id: str
    dev: int
    data: DataPath
    root_fd: int = 0
    fuse_fd: int = 1
    resumable: bool = False


class Attached(msgspec.Struct, frozen=True):
    """The images of the mount can be fenced from now on."""


class Detach(msgspec.Struct, frozen=True):
    """The mount is mounted nowhere any more: lockd is to close what it keeps of it, which ends the mount."""

    mount_id: str


class Detached(msgspec.Struct, frozen=True):
    """Not `done` while images are held: they may have to be fenced yet."""

    done: bool


class Resume(msgspec.Struct, frozen=True):
    """A successor of a mount daemon that died, started by lockd, which has given it the *token*.

    The connection that makes this call is the mount's life line from now on.
    """

    mount_id: str
    token: str


class Resumed(msgspec.Struct, frozen=True):
    """The successor may claim what the daemon before has held.  *deadline_fd* is as in `Registered`."""

    mount: Mount
    deadline_fd: int | None = None


class Claimed(msgspec.Struct, frozen=True):
    """A hold: that of one owner on an image in one mode."""

    dev: int
    ino: int
    mode: ModeName
    owner: str


class Claim(msgspec.Struct, frozen=True):
    """What the daemon before has held, by its journal.  With the *last* call lockd takes away what was not claimed."""

    mount_id: str
    holds: list[Claimed]
    last: bool = True


class Claims(msgspec.Struct, frozen=True, omit_defaults=True):
    """`unsafe` are those of the claimed holds that there are not, or that were lost."""

    unsafe: list[Claimed] = []


class Reclaim(msgspec.Struct, frozen=True):
    """Ask for the descriptors that a mount has to keep with the lock on an image."""

    mount_id: str
    dev: int
    ino: int


class Reclaimed(msgspec.Struct, frozen=True, omit_defaults=True):
    """The descriptors ride along; none if the image is not held.  `token` is that of the lock."""

    token: int | None = None


class Entrust(msgspec.Struct, frozen=True):
    """Have lockd keep a descriptor of each of these nodes, which ride along in this order: they are open, and about to
    lose their last name, so that a successor finds them by it alone.
    """

    mount_id: str
    nodes: list[int]


class Entrusted(msgspec.Struct, frozen=True):
    """lockd has them, until `Dispose`, or until the mount is gone."""


class Dispose(msgspec.Struct, frozen=True):
    """The kernel knows these nodes no more: what lockd keeps of them is to be closed."""

    mount_id: str
    nodes: list[int]


class Fetch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask for what was entrusted, in the order of the nodes, or for what follows the node *after*."""

    mount_id: str
    after: int = 0


class Fetched(msgspec.Struct, frozen=True):
    """As many as fit into one message; the descriptors ride along.  None if there are no more."""

    nodes: list[int]


class Known(msgspec.Struct, frozen=True):
    """Ask which nodes of a mount the kernel knows, which its daemon itself cannot find out."""

    mount_id: str
    nodes: list[int]


class KnownNodes(msgspec.Struct, frozen=True):
    """Those of which it is not certain that the kernel does not know them."""

    nodes: list[int]


class TakeOver(msgspec.Struct, frozen=True):
    """The successor, which has called `Orders`, answers the kernel from now on; nobody else does."""

    mount_id: str


class TakenOver(msgspec.Struct, frozen=True, omit_defaults=True):
    """`fenced` are the numbers by which the kernel knows what has been fenced on the mount.

    With it comes the root of the mount, which the successor needs, as `dev` and `data`, to attach to a later lockd.
    """

    dev: int
    data: DataPath
    fenced: list[int] = []


class Orders(msgspec.Struct, frozen=True):
    """The mount daemon asks for what it has to do, for as long as it lives."""

    mount_id: str


class FencedImage(msgspec.Struct, frozen=True):
    """An image that lockd fences, with the numbers by which the kernel knows it on the mount."""

    dev: int
    ino: int
    nodes: list[int]


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the mount daemon has to do at once, and then to answer with `Obeyed`: to ``fence`` images, or nothing but to
    answer (``ping``).

    The first one of the stream, ``listening``, needs no answer: what is sent after it arrives.
    """

    serial: int
    kind: str
    images: list[FencedImage] = []
    reason: str = ""


class Obeyed(msgspec.Struct, frozen=True):
    """The order with this serial number is carried out."""

    mount_id: str
    serial: int


class Noted(msgspec.Struct, frozen=True):
    pass


class FenceTarget(msgspec.Struct, frozen=True, omit_defaults=True):
    """An image that this host holds, by its path when it was opened, on a mount or on the storage; or by device and
    inode number on the storage.
    """

    path: str = ""
    dev: int = 0
    ino: int = 0


class Fence(msgspec.Struct, frozen=True, omit_defaults=True):
    """Make every further I/O on what is open of these images fail, at once and for good."""

    images: list[FenceTarget]
    reason: str = ""


class Upgrade(msgspec.Struct, frozen=True):
    """Have lockd replaced by another version: the interpreter, and the directory that the package is in.

    It may be refused; then nothing has changed.  Else lockd ends all connections soon, and is back in a moment.
    """

    python: str
    path: str


class Upgrading(msgspec.Struct, frozen=True):
    """The new version can take over."""


class Replace(msgspec.Struct, frozen=True):
    """Have the daemon of a mount replaced by one of the version that lockd is of."""

    mount_id: str


class Replaced(msgspec.Struct, frozen=True):
    """`done` is false if there is no successor, and the daemon is the one it was."""

    done: bool


class KilledProcess(msgspec.Struct, frozen=True):
    """A process that could still write in a way that no error stops."""

    pid: int
    command: str
    why: str


class FenceResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the fence of one image on one mount went.

    `fenced` is true if nothing more can get to the storage; `problems` says what could not be stopped, or is not
    certain.  `drained` is true if what was being written at the time is known to have ended.
    """

    image: str
    mountpoint: str = ""
    fenced: bool = False
    drained: bool = False
    daemon_killed: bool = False
    killed: list[KilledProcess] = []
    problems: list[str] = []


class Fenced(msgspec.Struct, frozen=True):
    """One result for each image and mount; for an image that is not held here one without mount."""

    results: list[FenceResult]


class ListLocks(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask for the locks of this host, or for those that follow where an earlier answer ended."""

    after: str = ""


class Locks(msgspec.Struct, frozen=True, omit_defaults=True):
    """As many locks as fit into one message; `next` is the `after` of the call that asks for more, empty at
    the end.
    """

    locks: list[LockInfo]
    next: str = ""


class GetStatus(msgspec.Struct, frozen=True):
    pass


class Status(msgspec.Struct, frozen=True):
    host: str
    version: str
    pid: int
    run_dir: str
    since: float
    mounts: list[MountInfo]
    locks: int


class Hosts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask for the hosts that share locks with this one; of one source directory only, if it is named."""

    source: str = ""


class HostInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A host, and how it is judged: ``live``, ``failing``, ``dead``, ``free`` or ``unknown``.

    `number` is its host id, 0 where there are none.  `last_seen` is 0 if it is not known.  `holds` says what it holds,
    as far as this host can tell; `here` is true for this host.
    """

    name: str
    state: str
    number: int = 0
    last_seen: float = 0.0
    detail: str = ""
    holds: list[str] = []
    here: bool = False


class ShareHosts(msgspec.Struct, frozen=True, omit_defaults=True):
    """The hosts of one source directory.  With a `problem` they could not be asked for."""

    source: str
    backend: str
    hosts: list[HostInfo] = []
    problem: str = ""


class HostList(msgspec.Struct, frozen=True):
    shares: list[ShareHosts]


class ConfirmDead(msgspec.Struct, frozen=True, omit_defaults=True):
    """An admin answers for it that a host, by name or number, is dead: what it held is free at once.

    Without *source* it is meant wherever that host is known.
    """

    host: str
    source: str = ""
    reason: str = ""


class ConfirmedDead(msgspec.Struct, frozen=True):
    """Where it was done: source directories."""

    host: str
    sources: list[str]


class Watch(msgspec.Struct, frozen=True):
    """Ask for events from now on; one that reads them too slowly loses its connection."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened: ``acquired``, ``released``, ``refused``, ``lost``, ``fenced``, ``mounted``,
    ``unmounted``, ``daemon-restarted``, ``daemon-gone``, ``confirmed-dead``.

    The first one of a `Watch` is ``watching``: what happens after it will be told.
    """

    kind: str
    time: float
    mountpoint: str = ""
    image: str = ""
    mode: str = ""
    holder: HolderInfo | None = None
    owner: HolderInfo | None = None
    reason: str = ""


# Errors ------------------------------------------------------------------------------------------


class BusyError(msgspec.Struct, frozen=True):
    """Another owner, here or on another host, holds the image."""

    holder: HolderInfo


class UnavailableError(msgspec.Struct, frozen=True):
    """The lock service cannot say; nothing was granted."""

    reason: str


class RefusedError(msgspec.Struct, frozen=True):
    """A mount cannot be registered: what is wrong with it and what to do."""

    reason: str
    hint: str = ""


class DeniedError(msgspec.Struct, frozen=True):
    """What was asked for must not or cannot be done; nothing has changed."""

    reason: str
    hint: str = ""


class UnknownMountError(msgspec.Struct, frozen=True):
    """No such mount is registered, or another process registered it."""

    mount_id: str


class NotHeldError(msgspec.Struct, frozen=True):
    """What was to be released is not held; nothing has changed."""

    dev: int
    ino: int


METHODS: dict[str, tuple[type[msgspec.Struct], type[msgspec.Struct]]] = {
    "Register": (Register, Registered),
    "Acquire": (Acquire, Acquired),
    "Release": (Release, Released),
    "Inspect": (Inspect, Inspected),
    "ListLocks": (ListLocks, Locks),
    "GetStatus": (GetStatus, Status),
    "Watch": (Watch, Event),
    "Attach": (Attach, Attached),
    "Detach": (Detach, Detached),
    "Resume": (Resume, Resumed),
    "Claim": (Claim, Claims),
    "Reclaim": (Reclaim, Reclaimed),
    "Entrust": (Entrust, Entrusted),
    "Dispose": (Dispose, Noted),
    "Fetch": (Fetch, Fetched),
    "Known": (Known, KnownNodes),
    "TakeOver": (TakeOver, TakenOver),
    "Orders": (Orders, Order),
    "Obeyed": (Obeyed, Noted),
    "Fence": (Fence, Fenced),
    "Hosts": (Hosts, HostList),
    "ConfirmDead": (ConfirmDead, ConfirmedDead),
    "HandOver": (HandOver, HandedOver),
    "Upgrade": (Upgrade, Upgrading),
    "Replace": (Replace, Replaced),
}
"""Each method with the types of its call and its reply; the class of a call has the method's name."""

ERRORS: dict[str, type[msgspec.Struct]] = {
    "Busy": BusyError,
    "Unavailable": UnavailableError,
    "Refused": RefusedError,
    "Denied": DeniedError,
    "UnknownMount": UnknownMountError,
    "NotHeld": NotHeldError,
}
"""Each error of the interface with the type of its parameters."""
