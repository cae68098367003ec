"""What one attempt to get a lease wishes, and what it has seen.  For `engine.lease` only."""

from __future__ import annotations

from dataclasses import dataclass

from lockfs_paxos_lease.engine.ballot import Value
from lockfs_paxos_lease.engine.blocks import Blocks


@dataclass(slots=True)
class Attempt:
    """One attempt to get the lease: what it wishes, and how."""

    wish: Value
    short: bool
    wait: bool
    version: int
    num_hosts: int
    shared: dict[int, int]
    """Other hosts that were seen to hold it shared."""


@dataclass(slots=True)
class Seen:
    """What the blocks of all hosts say.

    `version` is the one to run ballots for.  That is the one after the leader's, unless a block is for a later one: a
    host begins a version only when it has seen the one before in the leader, and its owner gone.  If the leader does
    not say so, it was set back by a write that came late, and what the block says still holds.
    """

    leader: bytes
    blocks: Blocks
    version: int
    fresh: bool = True
    """The leader was read just now, and names no owner that had to be judged."""
