"""Areas as plain data: the JSON form of ``lockfs lease``, and what its text is made from.

Names that are not UTF-8 are in the text form of `lockfs.text`.  Times are seconds, by the clock of the host that wrote
them; only whether they change means something to others.
"""

from __future__ import annotations

from typing import Any

from lockfs.text import from_bytes
from lockfs_paxos_lease.check import index
from lockfs_paxos_lease.check import lease as lease_check
from lockfs_paxos_lease.check import lockspace as lockspace_check
from lockfs_paxos_lease.check.area import Kind
from lockfs_paxos_lease.cli.places import Area
from lockfs_paxos_lease.format import delta, rindex, version
from lockfs_paxos_lease.format.leader import SHORT_HOLD, Leader
from lockfs_paxos_lease.format.request import Request

FORCE_MODES = {0: "", 1: "force", 2: "graceful"}

Document = dict[str, Any]


def area(found: Area) -> Document:
    """Return what is in an area."""
    head: Document = {"path": from_bytes(found.path), "offset": found.offset, "kind": found.kind.value}
    if found.kind in (Kind.EMPTY, Kind.UNKNOWN):
        return head
    head |= {"sector_size": found.geometry.sector, "align_size": found.geometry.align}
    match found.kind:
        case Kind.LOCKSPACE:
            return head | _lockspace(found)
        case Kind.INDEX:
            return head | _index(found)
        case _:
            return head | _lease(found)


def _lockspace(found: Area) -> Document:
    records = lockspace_check.records(found.data, found.geometry)
    common = lockspace_check.consensus(records)
    own = version.takeover_of(common.version)
    hosts = [
        _host(number + 1, record, bitmap)
        for number, (record, bitmap) in enumerate(records)
        if record.owner_generation or record.timestamp or any(bitmap) or record.magic != common.magic
    ]
    return {
        "lockspace": from_bytes(common.space_name),
        "takeover": "sanlock" if own is None else own,
        "max_hosts": found.geometry.max_hosts,
        "hosts": hosts,
    }


def _host(host_id: int, record: Leader, bitmap: bytes) -> Document:
    own = version.takeover_of(record.version) is not None
    return {
        "host_id": host_id,
        "name": from_bytes(record.resource_name),
        "generation": record.owner_generation,
        "timestamp": record.timestamp / 1000 if own else record.timestamp,
        "free": not record.timestamp,
        "io_timeout": record.timeout,
        "event": {"generation": record.write_id, "event": record.write_generation, "data": record.write_timestamp},
        "calls": delta.called(bitmap),
    }


def _lease(found: Area) -> Document:
    leader = Leader.decode(found.data)
    own = version.takeover_of(leader.version)
    units = 1 if own is None else 1000
    request = Request.decode(found.data[found.geometry.sector :])
    blocks = lease_check.blocks(found.data, found.geometry)
    return {
        "lockspace": from_bytes(leader.space_name),
        "name": from_bytes(leader.resource_name),
        "takeover": "sanlock" if own is None else own,
        "num_hosts": leader.num_hosts,
        "version": leader.lver,
        "held": bool(leader.timestamp) and not leader.flags & SHORT_HOLD,
        "owner": {"host_id": leader.owner_id, "generation": leader.owner_generation},
        "timestamp": leader.timestamp / units,
        "written": {
            "host_id": leader.write_id,
            "generation": leader.write_generation,
            "timestamp": leader.write_timestamp / units,
        },
        "shared_by": [
            {"host_id": host_id, "generation": mode.generation}
            for host_id, (_, mode) in blocks.items()
            if mode.is_shared
        ],
        "request": {"version": request.lver, "how": FORCE_MODES.get(request.force_mode, str(request.force_mode))},
        "ballots": [
            {
                "host_id": host_id,
                "mbal": dblock.mbal,
                "bal": dblock.bal,
                "inp": dblock.inp,
                "inp2": dblock.inp2,
                "inp3": dblock.inp3,
                "lver": dblock.lver,
                "checksum": dblock.checksum,
                "valid": dblock.is_valid,
                "released": dblock.is_released,
            }
            for host_id, (dblock, _) in blocks.items()
        ],
    }


def _index(found: Area) -> Document:
    header = rindex.Header.decode(found.data)
    return {
        "lockspace": from_bytes(header.space_name),
        "max_leases": header.max_resources,
        "leases": [
            {"number": number, "name": from_bytes(entry.name), "offset": entry.offset}
            for number, entry in index.entries(found.data, header)
        ],
    }
