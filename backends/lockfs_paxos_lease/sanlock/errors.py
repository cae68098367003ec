"""What a sanlock daemon answers when it does not do what it is asked for."""

from __future__ import annotations

import os

from lockfs.errors import LockUnavailable
from lockfs_paxos_lease.format.errors import Code

_MEANING = {
    Code.IO_TIMEOUT: "the storage did not answer in time",
    Code.WATCHDOG: "it cannot use the watchdog (wdmd)",
    Code.DBLOCK_READ: "a ballot block cannot be read",
    Code.DBLOCK_WRITE: "a ballot block cannot be written",
    Code.DBLOCK_CHECKSUM: "a ballot block has a wrong checksum",
    Code.LEADER_READ: "the lease record cannot be read",
    Code.LEADER_WRITE: "the lease record cannot be written",
    Code.LEADER_DIFF: "the copies of the lease record differ",
    Code.LEADER_MAGIC: "there is no lease at that place",
    Code.LEADER_VERSION: "the lease is of another version of the format",
    Code.LEADER_SECTOR_SIZE: "the lease has a wrong sector size",
    Code.LEADER_LOCKSPACE: "the lease belongs to another lockspace",
    Code.LEADER_RESOURCE: "the lease has another name",
    Code.LEADER_NUM_HOSTS: "the lease is not made for as many hosts",
    Code.LEADER_CHECKSUM: "the lease record has a wrong checksum",
    Code.SIZES: "sector and area size do not go together",
    Code.HOST_ID: "the lockspace has no such host id",
    Code.ACQUIRE_LVER: "the lease has another version by now",
    Code.ACQUIRE_LOCKSPACE: "this host is not in the lockspace",
    Code.ACQUIRE_ID_DISK: "the lockspace cannot be opened",
    Code.ACQUIRE_ID_LIVE: "another host has the lease",
    Code.ACQUIRE_OWNED: "another host was faster",
    Code.ACQUIRE_OTHER: "another host was faster",
    Code.ACQUIRE_SHARED_RETRY: "too many hosts wanted to share the lease at once",
    Code.ACQUIRE_OWNED_NOWAIT: "another host has the lease, and may be dead",
    Code.RELEASE_LVER: "the lease has another version by now",
    Code.RELEASE_OWNER: "the lease has another owner by now",
    Code.RENEW_OWNER: "another host has overwritten this host's lease",
    Code.RENEW_DIFF: "this host's lease was overwritten",
    Code.HOST_ID_BUSY: "another host has this host id",
    Code.RINDEX_MAGIC: "there is no index of leases at that place",
    Code.RINDEX_LOCKSPACE: "the index of leases belongs to another lockspace",
    Code.RINDEX_OFFSET: "the index of leases is at a wrong place",
}


def meaning(code: int) -> str:
    """Return what a result says, for people."""
    known = Code(code) if code in _MEANING else None
    if known is not None:
        return _MEANING[known]
    return f"error {code}" if code <= Code.GENERAL else os.strerror(-code)


class SanlockError(LockUnavailable):
    """The daemon has refused a command.  `code` is its result: a `Code` of the formats or a negative errno."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"sanlock refuses '{command}': {meaning(code)} ({code})")
        self.command = command
        self.code = code


class DaemonGone(LockUnavailable):
    """No daemon answers, or its connection broke: what became of the command is not known."""
