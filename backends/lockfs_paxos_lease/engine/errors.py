"""How an operation of the engine ends when it does not succeed.  `code` is sanlock's, or a negative errno.

None of them means that something was granted.  Texts are for people, without the name of the image or lease, which the
caller knows better.
"""

from __future__ import annotations

import errno

from lockfs_paxos_lease.format.errors import BadRecord

AGAIN = -errno.EAGAIN
NO_LOCKSPACE = -errno.ENOSPC
ALREADY = -errno.EALREADY
NOT_FOUND = -errno.ENOENT


class EngineError(Exception):
    """The base of them all."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({int(code)})")
        self.code = int(code)
        self.message = message


class Held(EngineError):
    """Another host has the lease in a mode that excludes ours, or is about to.  `host_id` says which one."""

    def __init__(self, code: int, message: str, host_id: int, generation: int) -> None:
        super().__init__(code, message)
        self.host_id = host_id
        self.generation = generation


class Clash(EngineError):
    """Another host uses the host id that we wanted; `name` is what it calls itself."""

    def __init__(self, code: int, message: str, name: bytes) -> None:
        super().__init__(code, message)
        self.name = name


class Lost(EngineError):
    """This host's own lease is not valid any more, for good: everything held under it must be fenced."""


class BadArea(EngineError):
    """A record on the disk must not be believed; `offset` is where in its area it lies."""

    def __init__(self, record: BadRecord, offset: int) -> None:
        super().__init__(record.code, f"at byte {offset} of the area: {record.what}")
        self.offset = offset


class StorageTrouble(EngineError):
    """The storage failed or did not answer in time; `Lease.untidy` says whether something is left to do."""
