"""What tests of the engine look at on a bench: the records on its disks."""

from __future__ import annotations

from lockfs_paxos_lease.engine.actions import Area
from lockfs_paxos_lease.engine.lease import Mode
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import dblock, delta
from lockfs_paxos_lease.format.dblock import ModeBlock, decode_host_sector
from lockfs_paxos_lease.format.leader import Leader
from sim.bench import Bench

EX, SH = Mode.EXCLUSIVE, Mode.SHARED
TIMINGS = {"sanlock": Timing.sanlock(1), "own": Timing.own(16)}


def leader(bench: Bench) -> Leader:
    return Leader.decode(bytes(bench.areas[Area.LEASE][:512]))


def block(bench: Bench, host_id: int) -> tuple[dblock.Dblock, ModeBlock]:
    start = bench.geometry.host_offset(host_id)
    return decode_host_sector(bytes(bench.areas[Area.LEASE][start : start + bench.geometry.sector]))


def put_leader(bench: Bench, record: Leader) -> None:
    bench.areas[Area.LEASE][:200] = record.encode()


def record(bench: Bench, host_id: int) -> Leader:
    start = bench.geometry.delta_offset(host_id)
    return Leader.decode(bytes(bench.areas[Area.LOCKSPACE][start : start + 512]))


def put_record(bench: Bench, host_id: int, leader: Leader) -> None:
    start = bench.geometry.delta_offset(host_id)
    bench.areas[Area.LOCKSPACE][start : start + 512] = delta.encode(leader, b"", 512)
