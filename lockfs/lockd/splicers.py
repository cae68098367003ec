"""Who splices into an image that is fenced: the kernel lets that pass where data bypasses the mount daemon.

For `WATCH` seconds all are watched who have the image open for writing.  Who is seen inside of splice(2), sendfile(2)
or copy_file_range(2) is killed.  If the file on the storage changes and nobody was seen, those are killed who have run
meanwhile, or the only one there is.  Network filesystems change the times of a file long after it was written; there
only those are killed who are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from lockfs.linux.holders import Incomplete, Use
from lockfs.lockd.scans import Scans, Stamp
from lockfs.lockd.target import Target
from lockfs.lockd.threads import TooSlow

WATCH = 1.0
"""Seconds, from when what was under way has ended: who is in the middle of it splices again, or gets an error."""
FIRST_PAUSE, LAST_PAUSE = 0.01, 0.1
"""Seconds between two looks."""
LOOK_SHARE = 4
"""The pauses are at least so many times as long as a look, so that watching thousands is no load."""


@dataclass(slots=True)
class Watch:
    """Watches *targets* on the mount *dev*: `uses` are the descriptors, `drains` says which nodes are drained."""

    scans: Scans
    dev: int
    targets: Sequence[Target]
    drains: Mapping[int, bool]
    uses: list[Use] = field(default_factory=list)
    stamps: dict[Target, Stamp] = field(default_factory=dict)
    ran: dict[int, int] = field(default_factory=dict)

    def add(self, uses: Iterable[Use]) -> bool:
        """Watch these, too, if they are descriptors open for writing.  Return whether there was a new one."""
        known = {(use.pid, use.ino) for use in self.uses}
        fresh = [use for use in uses if use.how == "fd" and use.writable and (use.pid, use.ino) not in known]
        self.uses += fresh
        return bool(fresh)

    async def run(self) -> None:
        """Watch until nobody is left, or long enough."""
        pause = FIRST_PAUSE
        until = trio.current_time() + WATCH
        while self.uses and trio.current_time() < until:
            begin = trio.current_time()
            if note_drained(self.targets, self.drains):
                until = begin + WATCH
            try:
                await self._look()
            except (Incomplete, OSError, TooSlow) as error:
                for target in self.targets:
                    target.problems.append(f"who may splice into it could not be watched: {error or 'too slow'}")
                return
            pause = min(2 * pause, LAST_PAUSE)
            await trio.sleep(max(pause, LOOK_SHARE * (trio.current_time() - begin)))

    async def _look(self) -> None:
        pids = {use.pid for use in self.uses}
        nodes = {node for target in self.targets for node in target.nodes}
        inside = await self.scans.splicing(self.dev, nodes, pids)
        ran = await self.scans.run_times(pids)
        caught = {use.pid for use in self.uses if use.ino in inside.get(use.pid, ())}
        self._kill([use for use in self.uses if use.pid in caught], "splices into it")
        # What is still under way from before the fence may change the file: only after that it tells something.
        stamps = await self.scans.stamps([target for target in self.targets if target.drained])
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
        uses = await self.scans.glance(self.dev, target.nodes)
        suspects = [use for use in uses if use.how == "fd" and use.writable and not self._is_killed(use)]
        self.add(suspects)
        if len({use.pid for use in suspects}) > 1:
            ran = await self.scans.run_times({use.pid for use in suspects})
            suspects = [use for use in suspects if self.ran.get(use.pid) != ran.get(use.pid)]
        self._kill(suspects, "went on to write to it")

    def _kill(self, uses: Iterable[Use], why: str) -> None:
        for use in uses:
            for target in self.targets:
                if use.ino in target.nodes:
                    target.kill(use, why)

    def _is_killed(self, use: Use) -> bool:
        return any(use.pid in target.killed for target in self.targets)


def note_drained(targets: Iterable[Target], drains: Mapping[int, bool]) -> bool:
    """Note which targets are drained, and return whether there are new ones."""
    fresh = [
        target
        for target in targets
        if not target.drained
        and not target.undrainable
        and target.nodes
        and all(drains.get(node, False) for node in target.nodes)
    ]
    for target in fresh:
        target.drained = True
    return bool(fresh)
