"""Who can still write to an image that is fenced, by a way that no error stops; they are killed.

* A shared mapping of the file belongs to the file of the storage where data bypasses the mount daemon; elsewhere what
  is written to it would be dropped without a word.  So who has one that may be written is killed at once.
* splice(2), sendfile(2) and copy_file_range(2) into a descriptor, which the kernel lets pass where data bypasses the
  mount daemon.  For `WATCH` seconds all who have one are watched.  Who is seen inside of such a call is killed.  If the
  file on the storage changes and nobody was seen, those are killed who have run meanwhile, or the only one there is.
  Network filesystems change the times of a file long after it was written; there only those are killed who are seen.
* Where the kernel could not be made to refuse I/O, everybody who has the file open for writing is killed.

Who only calls write(2) gets EIO, and lives.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from lockfs.linux import fuseinode, holders, splicing
from lockfs.linux.holders import Use
from lockfs.lockd.attachment import Attachment
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.target import Target
from lockfs.lockd.threads import Threads, TooSlow

WATCH = 1.0
"""Seconds for which those are watched who could splice: who is about to does it within that, or gets its next error."""
FIRST_PAUSE, LAST_PAUSE = 0.01, 0.1
"""Seconds between two looks."""
LOOK_SHARE = 4
"""The pauses are at least so many times as long as a look, so that watching thousands is no load."""
SCAN_TIMEOUT = 10.0
"""Seconds for a look through all processes; it takes milliseconds, unless the host is in trouble."""
STORAGE_TIMEOUT = 0.5
"""Seconds for a file on the storage to say whether it has changed; one that hangs is not changed either."""

_NETWORK = ("nfs", "cifs", "smb", "ceph", "9p", "afs", "lustre", "beegfs", "gluster", "fuse", "virtiofs")
"""What the names of network filesystems begin with."""

Stamp = tuple[int, int]
log = logging.getLogger(__name__)


class Stragglers:
    """Stops them.  Its threads live in *nursery*."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._scans = Threads(nursery, 4)
        self._stats = Threads(nursery, 8)

    async def stop(self, attachment: Attachment, targets: Sequence[Target]) -> None:
        """Stop all who can still write to *targets*, which are on the mount of *attachment*."""
        deadline = trio.current_time() + WATCH
        bypassed = attachment.data == "passthrough"
        uses = await self._uses(attachment, targets, mappings_only=not bypassed and all(t.stopped for t in targets))
        for target in targets:
            for use in uses:
                if use.writable and use.ino in target.nodes and (use.how == "mapping" or not target.stopped):
                    target.kill(use, "has it mapped" if use.how == "mapping" else "has it open")
                elif use.how == "ring" and not target.stopped:
                    target.kill(use, "may have it open in an io_uring")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain, attachment, targets)
            if bypassed:
                watch = _Watch(self, attachment, targets, [use for use in uses if use.how == "fd" and use.writable])
                nursery.start_soon(watch.run, deadline)
        await self._see_them_gone(attachment, targets)

    async def _drain(self, attachment: Attachment, targets: Sequence[Target]) -> None:
        nodes = sorted({node for target in targets if target.stopped for node in target.nodes})
        root = attachment.root.number
        done = await attachment.drains.for_each(WATCH, partial(fuseinode.drain, root), nodes, [attachment.root])
        for target in targets:
            target.drained = target.stopped and all(done.get(node, False) for node in target.nodes)

    async def uses(self, dev: int, nodes: Iterable[int], *, mappings_only: bool = False) -> list[Use]:
        """Return who uses these files.  Raises `Incomplete`, OSError, `TooSlow`."""
        wanted = set(nodes)
        return await self._scans.run(
            SCAN_TIMEOUT, lambda: holders.uses(dev, wanted, mappings_only=mappings_only)
        )

    async def _uses(self, attachment: Attachment, targets: Sequence[Target], *, mappings_only: bool) -> list[Use]:
        try:
            return await self.uses(
                attachment.dev, (node for target in targets for node in target.nodes), mappings_only=mappings_only
            )
        except (holders.Incomplete, OSError, TooSlow) as error:
            for target in targets:
                target.problems.append(f"not all who may have it open or mapped are known: {error or 'too slow'}")
            return error.found if isinstance(error, holders.Incomplete) else []

    async def splicing(self, dev: int, nodes: set[int], pids: set[int]) -> tuple[dict[int, set[int]], dict[int, int]]:
        """Return into which files processes are splicing, and how long each has run.  Raises `TooSlow`."""
        return await self._scans.run(
            SCAN_TIMEOUT, lambda: (splicing.into(dev, nodes, pids), splicing.run_times(pids))
        )

    async def stamps(self, targets: Sequence[Target]) -> dict[Target, Stamp]:
        """Return by what the files on the storage can be seen to have changed; some may be missing, if it hangs."""
        by_share: dict[int, list[tuple[Target, Descriptor]]] = defaultdict(list)
        for target in targets:
            if target.lock.fd is not None and not target.mounted.mount.fstype.startswith(_NETWORK):
                by_share[target.lock.share.number].append((target, target.lock.fd))
        found: dict[Target, Stamp] = {}

        async def ask(files: list[tuple[Target, Descriptor]]) -> None:
            try:
                call = partial(_stamps, [fd.number for _, fd in files])
                stamps = await self._stats.run(STORAGE_TIMEOUT, call, [fd for _, fd in files])
            except (TooSlow, OSError):
                return
            found.update(zip((target for target, _ in files), stamps, strict=True))

        async with trio.open_nursery() as nursery:
            for files in by_share.values():
                nursery.start_soon(ask, files)
        return found

    async def _see_them_gone(self, attachment: Attachment, targets: Sequence[Target]) -> None:
        """Say of whom it is not certain that he can write no more."""
        killed = {pid for target in targets for pid in target.killed}
        alive = killed
        with trio.move_on_after(WATCH):
            while True:
                alive = await self._still_writing(attachment, targets, alive)
                if not alive:
                    break
                await trio.sleep(FIRST_PAUSE)
        for target in targets:
            for pid in alive & target.killed.keys():
                target.problems.append(f"process {pid} was killed and does not end: it may be stuck in the storage")
            if not target.nodes:
                target.problems.append("the number by which the kernel knows it is not known")

    async def _still_writing(
        self, attachment: Attachment, targets: Sequence[Target], pids: set[int]
    ) -> set[int]:
        if not pids:
            return set()
        nodes = {node for target in targets for node in target.nodes}
        try:
            uses = await self._scans.run(
                SCAN_TIMEOUT, lambda: holders.uses(attachment.dev, nodes, pids=pids)
            )
        except (holders.Incomplete, OSError, TooSlow):
            return pids
        return {use.pid for use in uses if use.writable and use.how != "ring"}


@dataclass(slots=True)
class _Watch:
    """Watches those who could splice into *targets*; `uses` are their descriptors."""

    stragglers: Stragglers
    attachment: Attachment
    targets: Sequence[Target]
    uses: list[Use]
    stamps: dict[Target, Stamp] = field(default_factory=dict)
    ran: dict[int, int] = field(default_factory=dict)

    async def run(self, deadline: float) -> None:
        """Watch until *deadline*, or until nobody is left."""
        pause = FIRST_PAUSE
        while self.uses and trio.current_time() < deadline:
            begin = trio.current_time()
            try:
                await self._look()
            except (holders.Incomplete, OSError, TooSlow) as error:
                for target in self.targets:
                    target.problems.append(f"who may splice into it could not be watched: {error or 'too slow'}")
                return
            pause = min(2 * pause, LAST_PAUSE)
            await trio.sleep(max(pause, LOOK_SHARE * (trio.current_time() - begin)))

    async def _look(self) -> None:
        pids = {use.pid for use in self.uses}
        inside, ran = await self.stragglers.splicing(self.attachment.dev, self._nodes(), pids)
        caught = {use.pid for use in self.uses if use.ino in inside.get(use.pid, ())}
        self._kill([use for use in self.uses if use.pid in caught], "splices into it")
        # What is still under way from before the fence may change the file: only after that it tells something.
        stamps = await self.stragglers.stamps([target for target in self.targets if target.drained])
        for target, stamp in stamps.items():
            if self.stamps.get(target, stamp) != stamp:
                await self._blame(target, caught)
        self.stamps.update(stamps)
        self.ran = ran
        self.uses = [use for use in self.uses if use.pid in ran and not self._is_killed(use)]

    async def _blame(self, target: Target, caught: set[int]) -> None:
        """Kill who has changed the file of *target*; those who were seen at it have been."""
        if any(use.pid in caught and use.ino in target.nodes for use in self.uses):
            return
        uses = await self.stragglers.uses(self.attachment.dev, target.nodes)
        uses = [use for use in uses if use.how == "fd" and use.writable and not self._is_killed(use)]
        suspects = uses
        if len({use.pid for use in uses}) > 1:
            _, ran = await self.stragglers.splicing(self.attachment.dev, set(), {use.pid for use in uses})
            suspects = [use for use in uses if self.ran.get(use.pid) != ran.get(use.pid)]
        self._kill(suspects, "went on to write to it")
        known = {(use.pid, use.ino) for use in self.uses}
        self.uses += [use for use in uses if (use.pid, use.ino) not in known]

    def _kill(self, uses: Iterable[Use], why: str) -> None:
        for use in uses:
            for target in self.targets:
                if use.ino in target.nodes:
                    target.kill(use, why)

    def _is_killed(self, use: Use) -> bool:
        return any(use.pid in target.killed for target in self.targets)

    def _nodes(self) -> set[int]:
        return {node for target in self.targets for node in target.nodes}


def _stamps(fds: Sequence[int]) -> list[Stamp]:
    found = [os.fstat(fd) for fd in fds]
    return [(each.st_mtime_ns, each.st_size) for each in found]
