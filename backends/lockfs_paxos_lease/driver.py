"""Runs operations of the engine on real disks, with trio's threads and the clock of the kernel."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypeVar

import trio

from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.engine.actions import Action, Area, DiskError, Operation, Read, Settle, Sleep, Write

T = TypeVar("T")


def boottime() -> float:
    """Return CLOCK_BOOTTIME in seconds: the one clock of the engine.  It goes on while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def run(operation: Operation[T], areas: Mapping[Area, AreaIO]) -> T:
    """Return what *operation* ends with, or raise what it raises.

    Whoever is cancelled in it has given it up: see `engine.actions` for what there is to do then.
    """
    try:
        action = next(operation)
        while True:
            try:
                result = await _do(action, areas)
            except DiskError as error:
                action = operation.throw(error)
            else:
                action = operation.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        operation.close()


async def _do(action: Action, areas: Mapping[Area, AreaIO]) -> bytes | None:
    match action:
        case Read(area, offset, length, timeout):
            return await areas[area].read(offset, length, timeout)
        case Write(area, offset, data, timeout, not_after):
            await areas[area].write(offset, data, timeout, not_after)
        case Settle(area, timeout):
            await areas[area].settle(timeout)
        case Sleep(seconds):
            await trio.sleep(seconds)
    return None
