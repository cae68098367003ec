"""What an operation of the engine asks of the world: the only seam between the protocol and disks, time and threads.

An operation is a generator.  It yields one action at a time and is resumed with that action's result:

=============================  ===================  ==========================================================
action                         resumed with         meaning
=============================  ===================  ==========================================================
``Read(area, offset, ...)``    ``bytes``            exactly `length` bytes, read in one I/O
``Write(area, offset, ...)``   ``None``             `data` is on the disk (a sector is atomic, several are not)
``Settle(area, timeout)``      ``None``             no write of this process to this area is under way any more
``Sleep(seconds)``             ``None``             at least that much time has passed
=============================  ===================  ==========================================================

Instead of a result, the driver may throw in

* `IOFailed`: the I/O ended with an error.  What a failed write left on the disk is unknown, but it is over.
* `IOTimeout`: nothing was heard for `timeout` seconds.  A write that timed out **may land at any later time**: the
  engine sends nothing more to an area that could be harmed by it before `Settle` has succeeded there.
* `NotIssued`: the clock had passed `Write.not_after` when the write would have been handed to the kernel; it was not.

The rules for a driver:

* One action of an operation is under way at a time; operations on different leases and the renewal run side by side.
  Operations on one `Lease` object never overlap.
* `Write.not_after` is compared with the clock (the same `Clock` that the engine was given) in the thread that calls
  pwrite, directly before it.  A host that was paused in between must not write with rights that have run out since.
* `Settle` waits until the driver knows that every write it ever abandoned on this area has ended, and raises
  `IOTimeout` if that is not so in `timeout` seconds.  Writes of a process that died are over when the process is wholly
  gone (its thread group has been reaped): a successor starts no earlier.
* `Area.LOCKSPACE` is the lockspace of the operation's membership, `Area.LEASE` the area of the lease that the operation
  is for.  Offsets are relative to the start of the area, multiples of the sector size.
* To give an operation up, close the generator, and run `Lease.tidy` if `Lease.untidy` is then true.
* Any other exception that leaves the generator is the result of the operation: `engine.errors`.

Time is a function without arguments that returns CLOCK_BOOTTIME in seconds, given to the engine's objects as `clock`;
random numbers come from a `random.Random` given to them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

Clock: TypeAlias = Callable[[], float]


class Area(enum.Enum):
    """Which area on the disk an action is for."""

    LOCKSPACE = "lockspace"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Read:
    """Read *length* bytes at *offset*, in one I/O.  Resumed with bytes."""

    area: Area
    offset: int
    length: int
    timeout: float


@dataclass(frozen=True, slots=True)
class Write:
    """Write *data* (whole sectors) at *offset*, in one I/O, unless the clock has passed *not_after*."""

    area: Area
    offset: int
    data: bytes
    timeout: float
    not_after: float


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until no write that this process sent to *area* is under way."""

    area: Area
    timeout: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let time pass."""

    seconds: float


Action: TypeAlias = Read | Write | Settle | Sleep

T = TypeVar("T")
Operation: TypeAlias = Generator[Action, Any, T]
"""An operation of the engine that ends with a T, or with an exception of `engine.errors`."""


class DiskError(Exception):
    """An I/O that did not end well.  Drivers raise the subclasses."""


class IOFailed(DiskError):
    """The I/O ended with an error; a write may or may not be on the disk."""


class IOTimeout(DiskError):
    """Nothing was heard of the I/O in time; a write may land at any later time."""


class NotIssued(DiskError):
    """The time to issue this write had passed; it was not issued."""


def read(area: Area, offset: int, length: int, timeout: float) -> Operation[bytes]:
    """Read, with the type of the result."""
    return (yield Read(area, offset, length, timeout))  # type: ignore[no-any-return]
