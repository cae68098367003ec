"""What is said on lockd's socket, as types.  `io.lockfs.Lockd.varlink` is the same for any varlink client.

Paths and names are in the text form of `lockfs.text`.  Times are seconds since 1970, for people.
A parameter named ``fd`` or ``*_fd`` is the index of a descriptor that was sent with the message.
`METHODS` and `ERRORS` list what the interface has; their names on the wire are those of the interface, a
dot, and the key.
"""

from __future__ import annotations

import msgspec

from lockfs.protocol.messages.errors import (
    BusyError,
    DeniedError,
    NotHeldError,
    RefusedError,
    UnavailableError,
    UnknownMountError,
)
from lockfs.protocol.messages.fence import Fence, Fenced, FenceResult, FenceTarget, KilledProcess
from lockfs.protocol.messages.handover import HandedOver, HandOver, HeldBy, HeldImage
from lockfs.protocol.messages.hosts import ConfirmDead, ConfirmedDead, HostInfo, HostList, Hosts, ShareHosts
from lockfs.protocol.messages.locks import Acquire, Acquired, Inspect, Inspected, Release, Released
from lockfs.protocol.messages.mounts import (
    Attach,
    Attached,
    Detach,
    Detached,
    Dispose,
    Entrust,
    Entrusted,
    Register,
    Registered,
)
from lockfs.protocol.messages.orders import FencedImage, Obeyed, Order, Orders
from lockfs.protocol.messages.status import Event, GetStatus, ListLocks, LockInfo, Locks, MountInfo, Status, Watch
from lockfs.protocol.messages.succession import (
    Claim,
    Claimed,
    Claims,
    Fetch,
    Fetched,
    Known,
    KnownNodes,
    Reclaim,
    Reclaimed,
    Replace,
    Replaced,
    Resume,
    Resumed,
    TakenOver,
    TakeOver,
    Upgrade,
    Upgrading,
)
from lockfs.protocol.messages.terms import DataPath, HolderInfo, Image, ModeName, Mount, Noted, Owner

INTERFACE = "io.lockfs.Lockd"

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

__all__ = [
    "ERRORS", "INTERFACE", "METHODS", "Acquire", "Acquired", "Attach", "Attached", "BusyError", "Claim", "Claimed",
    "Claims", "ConfirmDead", "ConfirmedDead", "DataPath", "DeniedError", "Detach", "Detached", "Dispose", "Entrust",
    "Entrusted", "Event", "Fence", "FenceResult", "FenceTarget", "Fenced", "FencedImage", "Fetch", "Fetched",
    "GetStatus", "HandOver", "HandedOver", "HeldBy", "HeldImage", "HolderInfo", "HostInfo", "HostList", "Hosts",
    "Image", "Inspect", "Inspected", "KilledProcess", "Known", "KnownNodes", "ListLocks", "LockInfo", "Locks",
    "ModeName", "Mount", "MountInfo", "NotHeldError", "Noted", "Obeyed", "Order", "Orders", "Owner", "Reclaim",
    "Reclaimed", "RefusedError", "Register", "Registered", "Release", "Released", "Replace", "Replaced", "Resume",
    "Resumed", "ShareHosts", "Status", "TakeOver", "TakenOver", "UnavailableError", "UnknownMountError", "Upgrade",
    "Upgrading", "Watch",
]  # fmt: skip
