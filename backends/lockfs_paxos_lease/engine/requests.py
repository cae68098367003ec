"""Asking the owner of a lease to let go, and seeing who has it, without taking anything."""

from __future__ import annotations

from dataclasses import dataclass

from lockfs_paxos_lease.engine.actions import Operation
from lockfs_paxos_lease.engine.area import LeaseArea
from lockfs_paxos_lease.engine.blocks import host_blocks
from lockfs_paxos_lease.engine.errors import EngineError
from lockfs_paxos_lease.engine.lease import Lease, Mode
from lockfs_paxos_lease.engine.owner import is_gone
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.request import Request


@dataclass(frozen=True, slots=True)
class Holding:
    """A host that holds a lease, as the disk says.  `name` is empty for a host that shares it and was not seen yet."""

    host_id: int
    generation: int
    shared: bool
    name: bytes


def make(area: LeaseArea, force_mode: int, version: int | None = None) -> Operation[bool]:
    """Ask for *version* of a lease (None: the next one): `request.FORCE`, `request.GRACEFUL`, or 0 to take it back.

    Return whether somebody was asked; the owner of a free lease is not.  Raises `EngineError`, `BadArea`,
    `StorageTrouble`.
    """
    owner: Leader | None = None
    wanted = version or 0
    if version is None or version or force_mode:
        owner = yield from area.read_leader()
        if owner.timestamp == 0:
            return False
        wanted = owner.lver + 1 if version is None else version
        if owner.lver >= wanted:
            raise EngineError(Code.REQUEST_OLD, f"the lease has version {owner.lver} already, {wanted} was asked for")
    there = yield from area.read_request()
    if force_mode and there.lver > wanted:
        raise EngineError(Code.REQUEST_LVER, f"version {there.lver} was asked for already, a newer one than {wanted}")
    yield from area.quiet()
    yield from area.write_request(Request(wanted, force_mode))
    if owner is None or not force_mode:
        return False
    area.membership.call(owner.owner_id)
    return True


def pending(lease: Lease) -> Operation[Request | None]:
    """Return what others ask of a lease that we hold; None if nothing, as always of one that is shared.

    To be asked when `Renewal.callers` has any.
    """
    request = yield from lease.area.read_request()
    if lease.mode is not Mode.EXCLUSIVE or not request.force_mode or request.lver <= lease.version:
        return None
    return request


def inspect(area: LeaseArea) -> Operation[tuple[Leader, list[Holding]]]:
    """Return the leader record and who holds the lease now, this host included.  Raises `BadArea`, `StorageTrouble`.

    An owner that may be dead, but is not known to be, is named; so are sharers in doubt.
    """
    leader, data = yield from area.read_all()
    hosts = area.membership.hosts
    held = []
    for host_id, block, mode in host_blocks(data, area.geometry, leader.num_hosts):
        if mode.is_shared and hosts.holds_on(host_id, mode.generation):
            slot = hosts.slot(host_id)
            held.append(Holding(host_id, mode.generation, True, slot.name if slot else b""))
        released = block.is_released and leader.write_id != leader.owner_id and block.lver >= leader.lver
        if leader.timestamp and host_id == leader.owner_id and not released:
            record = yield from area.membership.read_host(host_id)
            if not is_gone(record, leader):
                held.append(Holding(host_id, leader.owner_generation, False, record.resource_name))
    return leader, held
