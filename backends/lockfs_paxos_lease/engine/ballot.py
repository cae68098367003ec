"""One ballot of disk paxos: it settles who owns the next version of a lease.

The words are the paper's and sanlock's.  A host that wants version `lver` writes its block with a ballot number `mbal`
that is its own (phase 1), reads everybody's, takes over the value of the block with the highest `bal` if there is one
and its own wish otherwise, writes that with ``bal = mbal`` (phase 2), and reads everybody's again.  If none of them
shows a higher `mbal` or a later `lver`, the value is settled, whoever finds it.

Four things are done that sanlock does not do.  Each only makes a ballot fail, or keeps what sanlock throws away, so
hosts of both kinds mix:

* Phase 1 keeps what this host proposed for this version before (sanlock erases it).  An earlier proposal may have been
  adopted by somebody already, and the paper needs it to stay.
* The own block must read back as it was written.  If it does not, somebody else uses our host id, or an old write of
  ours came late, or the disk lied; the ballot is void.
* The leader record, which lies in what is read anyway, must still be the one that the ballot began with.  Where a host
  has zeroed its block, as sanlocks do, nothing else may tell who was too slow that the version is settled long since.
* A block with a bad checksum makes the ballot fail (sanlock skips it): it may be the one whose value counts.

All blocks of host ids 1 to `num_hosts` count, whoever has them.  Not read are those of which it is certain that they
say nothing, as nobody has had such an id long enough to have proposed anything: `engine.census`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lockfs_paxos_lease.engine.blocks import Blocks
from lockfs_paxos_lease.format.dblock import NEVER, NONE, Dblock, ModeBlock, encode_host_sector
from lockfs_paxos_lease.format.size import Geometry


class Outrun(Exception):
    """The ballot failed: somebody is ahead of us, with the ballot number *mbal* or with a later version (*newer*)."""

    def __init__(self, mbal: int, *, newer: bool = False) -> None:
        super().__init__("newer version" if newer else "higher ballot")
        self.mbal = mbal
        self.newer = newer


@dataclass(frozen=True, slots=True)
class Value:
    """A proposed owner: host id, generation, time of the proposal."""

    host_id: int
    generation: int
    time: int

    @classmethod
    def of(cls, block: Dblock) -> Value:
        """Return what a block proposes."""
        return cls(block.inp, block.inp2, block.inp3)


@dataclass(slots=True)
class Ballot:
    """The state of one ballot for version *lver*, as host *host_id*, of *num_hosts*.

    Pure: `phase1` and `phase2` return the sector to be written, `promised` and `settled` judge what is read after it.
    `mode` is our mode block, that a conversion must not lose.
    """

    geometry: Geometry
    leader: bytes
    """The leader record, as it was read before."""
    blocks: Blocks
    """The blocks of all hosts, as they were read before."""
    host_id: int
    num_hosts: int
    lver: int
    mbal: int
    wish: Value
    mode: ModeBlock = NONE
    block: Dblock = NEVER
    shared: dict[int, int] = field(default_factory=dict)
    """Other hosts that were seen to hold the lease shared, with their generations."""

    def phase1(self, earlier: Dblock) -> bytes:
        """Return our sector for phase 1; *earlier* is our block as it is on the disk."""
        kept = Dblock(lver=self.lver)
        if earlier.lver == self.lver and earlier.bal and earlier.inp:
            kept = replace(earlier, flags=0)
        self.block = replace(kept, mbal=self.mbal).sealed()
        return self._sector()

    def promised(self, area: bytes) -> bytes:
        """Judge what was read after phase 1, choose, return our sector for phase 2.  Raises `Outrun`, `BadArea`."""
        best = Dblock()
        for _, block in self._blocks(area):
            if block.inp and block.bal > best.bal:
                best = block
        value = Value.of(best) if best.bal else self.wish
        self.block = replace(
            self.block, bal=self.mbal, inp=value.host_id, inp2=value.generation, inp3=value.time
        ).sealed()
        return self._sector()

    def settled(self, area: bytes) -> Value:
        """Judge what was read after phase 2, and return the value that is settled.  Raises `Outrun`, `BadArea`."""
        for _ in self._blocks(area):
            pass
        return Value.of(self.block)

    def _sector(self) -> bytes:
        return encode_host_sector(self.block, self.mode, self.geometry.sector)

    def _blocks(self, area: bytes) -> Iterator[tuple[int, Dblock]]:
        """Yield all blocks for this version, checked; note shared holders.  Raises `Outrun`, `BadArea`."""
        if area[: len(self.leader)] != self.leader:
            raise Outrun(self.mbal)
        own = NEVER
        for host_id, (block, mode) in self.blocks.look(area).items():
            if host_id == self.host_id:
                own = block
            elif mode.is_shared:
                self.shared[host_id] = mode.generation
            if block.lver > self.lver:
                raise Outrun(block.mbal, newer=True)
            if block.lver == self.lver:
                if block.mbal > self.mbal:
                    raise Outrun(block.mbal)
                yield host_id, block
        if own != self.block:
            raise Outrun(own.mbal)


def next_mbal(highest: int, host_id: int, stride: int) -> int:
    """Return a ballot number of this host's own that is higher than *highest*."""
    return highest - highest % stride + stride + host_id if highest else host_id
