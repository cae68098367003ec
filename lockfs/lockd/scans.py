"""Looking at processes and files for the fence, in threads, with a limit to how long that may take."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Container, Sequence
from functools import partial

import trio

from lockfs.linux import holders, splicing
from lockfs.linux.holders import Use
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.target import Target
from lockfs.lockd.threads import Threads, TooSlow

SCAN_TIMEOUT = 10.0
"""Seconds for a look through all processes; it takes milliseconds, unless the host is in trouble."""
STORAGE_TIMEOUT = 0.5
"""Seconds for the files on the storage to say whether they have changed; what hangs is not changed either."""
_NETWORK = ("nfs", "cifs", "smb", "ceph", "9p", "afs", "lustre", "beegfs", "gluster", "fuse", "virtiofs")
"""What the names of filesystems begin with that change the times of a file long after it was written."""

Stamp = tuple[int, int]


class Scans:
    """The threads for it, which live in *nursery*."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._processes = Threads(nursery, 4)
        self._files = Threads(nursery, 8)

    async def uses(
        self, dev: int, nodes: Container[int], *, mappings_only: bool = False, pids: Sequence[int] | None = None
    ) -> list[Use]:
        """Return who uses these files, of all processes or of *pids*.

        Raises `Incomplete`, OSError, `TooSlow`.
        """
        call = partial(holders.uses, dev, nodes, mappings_only=mappings_only, pids=pids)
        return await self._processes.run(SCAN_TIMEOUT, call)

    async def glance(self, dev: int, nodes: Container[int], *, mappings_only: bool = False) -> list[Use]:
        """Do as `uses`, but look at each process only once.

        It misses those that are born meanwhile, but is as fast on a host where that never stops.
        """
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return await self.uses(dev, nodes, mappings_only=mappings_only, pids=pids)

    async def splicing(self, dev: int, nodes: Container[int], pids: set[int]) -> dict[int, set[int]]:
        """Return which processes are splicing into which of these files.  Raises `TooSlow`."""
        return await self._processes.run(SCAN_TIMEOUT, partial(splicing.into, dev, nodes, pids))

    async def run_times(self, pids: set[int]) -> dict[int, int]:
        """Return how long each process has run; those that have gone are missing.  Raises `TooSlow`."""
        return await self._processes.run(SCAN_TIMEOUT, partial(splicing.run_times, pids))

    async def stamps(self, targets: Sequence[Target]) -> dict[Target, Stamp]:
        """Return by what the files on the storage can be seen to have changed.

        Missing are those on storage that hangs, and on filesystems that tell too late.
        """
        by_share: dict[int, list[tuple[Target, Descriptor]]] = defaultdict(list)
        for target in targets:
            if target.lock.fd is not None and not target.mounted.mount.fstype.startswith(_NETWORK):
                by_share[target.lock.share.number].append((target, target.lock.fd))
        found: dict[Target, Stamp] = {}

        async def ask(files: list[tuple[Target, Descriptor]]) -> None:
            call = partial(_stamps, [fd.number for _, fd in files])
            try:
                stamps = await self._files.run(STORAGE_TIMEOUT, call, [fd for _, fd in files])
            except (TooSlow, OSError):
                return
            found.update(zip((target for target, _ in files), stamps, strict=True))

        async with trio.open_nursery() as nursery:
            for files in by_share.values():
                nursery.start_soon(ask, files)
        return found


def _stamps(fds: Sequence[int]) -> list[Stamp]:
    found = [os.fstat(fd) for fd in fds]
    return [(each.st_mtime_ns, each.st_size) for each in found]
