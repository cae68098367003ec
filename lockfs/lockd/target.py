"""One image on one mount that is fenced, and how that goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockfs.linux import process
from lockfs.linux.holders import Use, kill
from lockfs.lockd.lock import Lock
from lockfs.lockd.share import Mounted
from lockfs.protocol.messages import FenceResult, KilledProcess


@dataclass(slots=True, eq=False)
class Target:
    """`stopped`: the kernel refuses all I/O on what is open of it; `drained`: what was under way has ended.

    `undrainable`: there is no way to wait for that.
    """

    lock: Lock
    mounted: Mounted
    nodes: set[int]
    path: str
    stopped: bool = False
    drained: bool = False
    undrainable: bool = False
    daemon_killed: bool = False
    killed: dict[int, KilledProcess] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, lock: Lock, mounted: Mounted) -> Target:
        """Make one for what is held of a lock through a mount."""
        path = next(hold.holder.path for hold in lock.holds.values() if hold.mounted is mounted)
        return cls(lock, mounted, lock.nodes(mounted), path)

    def kill(self, use: Use, why: str) -> None:
        """End a process that no error stops."""
        if use.pid in self.killed:
            return
        command = process.command(use.pid)
        try:
            if kill(use):
                self.killed[use.pid] = KilledProcess(use.pid, command, why)
        except PermissionError:
            self.problems.append(f"process {use.pid} ({command}), which {why}, cannot be killed")

    def result(self) -> FenceResult:
        """Return how it went."""
        return FenceResult(
            image=self.path,
            mountpoint=self.mounted.mount.mountpoint,
            fenced=not self.problems,
            drained=self.drained,
            daemon_killed=self.daemon_killed,
            killed=list(self.killed.values()),
            problems=self.problems,
        )

    def summary(self) -> str:
        """Return how it went in one line."""
        done = ["its handles fail"] if self.stopped else []
        if self.daemon_killed:
            done.append("the mount daemon was killed")
        done += [f"process {each.pid} ({each.command}) was killed, which {each.why}" for each in self.killed.values()]
        return "; ".join([*done, *self.problems])
