"""What is ours of one lease on the disk: our host sector, and the leader record as we have written or found it.

For `engine.lease` only.  A leader that another host has written is not ours to touch.
"""

from __future__ import annotations

from dataclasses import replace

from lockfs_paxos_lease.engine.actions import Operation
from lockfs_paxos_lease.engine.area import LeaseArea
from lockfs_paxos_lease.format.dblock import NEVER, NONE, Dblock, ModeBlock
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.format.leader import CLEARED_MAGIC, SHORT_HOLD, Leader


class Own:
    """See the module.  `block` and `mode` are what our sector says, `leader` what the leader said last."""

    def __init__(self, area: LeaseArea) -> None:
        self.leader = Leader(0, 0)
        self.block = NEVER
        self.mode = NONE
        self._area = area
        self._membership = area.membership

    def write(self, block: Dblock, mode: ModeBlock) -> Operation[None]:
        """Write our sector."""
        self.block, self.mode = block, mode
        yield from self._area.write_blocks(self._membership.host_id, block, mode)

    def is_named_by(self, leader: Leader) -> bool:
        """Say whether a leader names this incarnation of us as the owner."""
        return (leader.owner_id, leader.owner_generation) == (self._membership.host_id, self._membership.generation)

    def free_leader(self) -> Operation[int]:
        """Free the leader that names us the owner, if we wrote it.  Return 0 or sanlock's code."""
        there = yield from self._area.read_leader()
        ours = self.leader
        if there != ours and there.lver >= ours.lver:
            if there.write_id != self._membership.host_id:
                return 0  # our block says that it is free, and the leader is not ours to touch
            return Code.RELEASE_LVER if there.lver != ours.lver else Code.RELEASE_OWNER
        if ours.write_id != self._membership.host_id and there == ours:
            return 0
        # A leader that is older than what we hold was set back by a write that came late: put it right.
        yield from self._write_freed(ours)
        return 0

    def take_back(self) -> Operation[None]:
        """Free the leader if it names us the owner and was written by us, whatever we know of it."""
        leader = yield from self._area.read_leader()
        if leader.timestamp and self.is_named_by(leader) and leader.write_id == self._membership.host_id:
            yield from self._write_freed(leader)

    def clear_leader(self) -> Operation[None]:
        """Mark the lease as deleted, under the leader that names us the owner."""
        cleared = replace(self._released(self.leader), magic=CLEARED_MAGIC).sealed()
        yield from self._area.write_leader(cleared, self._membership.valid_until)

    def _write_freed(self, leader: Leader) -> Operation[None]:
        yield from self._area.write_leader(self._released(leader).sealed(), self._membership.valid_until)

    def _released(self, leader: Leader) -> Leader:
        membership = self._membership
        return replace(
            leader, timestamp=0, flags=leader.flags & ~SHORT_HOLD,
            write_id=membership.host_id, write_generation=membership.generation,
            write_timestamp=membership.timing.stamp(membership.clock()),
        )  # fmt: skip
