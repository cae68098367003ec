"""What this host holds by its leases, as far as it is known: to this process, and to one that succeeds it.

Invariants:
* A lease is written down in the run directory from before it is taken until after it was given back on the disk.
* What the last lockd had is `left` until a member has taken it up, or has given it back.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from lockfs.backend import Image
from lockfs_paxos_lease import identity
from lockfs_paxos_lease.engine.errors import StorageTrouble
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.state import State, StateFile


class Holdings:
    """Those in the lockspace *space*.  For `Lockspace` and its members."""

    def __init__(self, run_dir: str, space: bytes) -> None:
        self.in_use: set[str] = set()
        """The names of leases that members have in use: one lease serves one image of this host."""
        self.left: set[str] = set()
        """What the last lockd of this incarnation had, and nobody has taken up; and what could not be given back."""
        self.unfenced: set[str] = set()
        """What was to be adopted and is lost, while those who went by it are yet to be fenced."""
        self.unwritten = 0
        """Grants that were lost, and of which something may still be in this host's memory; counted with a watchdog."""
        self.inherited = False
        """True from when all that the last lockd had, and is still in use, has been taken up."""
        self._state = StateFile(run_dir, space)
        self._boot = ""
        self._names: dict[tuple[int, int], str] = {}

    def begin(self) -> bool:
        """Be the only one to use this host id on this host; False if another process does.  In a thread; OSError."""
        self._boot = identity.boot_id()
        if not self._state.lock():
            return False
        self._names = self._state.names()
        return True

    def end(self) -> None:
        """Let another process use it."""
        self._state.unlock()

    async def before(self) -> tuple[State | None, set[str]]:
        """Return who the last lockd of this boot was, and which leases it had.  Raises OSError."""
        state = await trio.to_thread.run_sync(self._state.load, self._boot)
        return state, await trio.to_thread.run_sync(self._state.held)

    def name_noted(self, image: Image) -> str | None:
        """Return how the last lockd called the lease of an image that it held; None if that is not known."""
        return self._names.get((image.dev, image.ino))

    def is_idle(self) -> bool:
        """Say whether nobody can write any more by what this host was granted under the incarnations of this process.

        What is in use counts until it is released, and not only until it is fenced: before that, I/O that had begun
        when the fence came may still be on its way to the storage.
        """
        return not self.in_use and not self.unanswered

    @property
    def unanswered(self) -> bool:
        """True while something may be written by what this lockd has not granted, or has lost, and cannot fence."""
        return bool(self.unfenced or self.unwritten) or bool(self.left and not self.inherited)

    async def save(self, membership: Membership) -> None:
        """Write down who this host is now, and forget what an earlier incarnation held.  Raises `StorageTrouble`."""

        def save() -> None:
            self._state.save(
                self._boot, membership.host_id, membership.generation, membership.name, membership.last_success
            )
            for name in self._state.held() - self.left - self.in_use:
                self._state.drop(name)

        await self._written(save)

    def forget(self) -> None:
        """Have nothing written down: the host id was given back.  Raises OSError."""
        for name in self.left:
            self._state.drop(name)
        self._state.forget()

    async def note(self, name: str, image: Image, first: Callable[[], None]) -> None:
        """Write down that a lease is about to be taken, after *first*.  Raises `StorageTrouble`."""

        def note() -> None:
            first()
            self._state.note(name, (image.dev, image.ino))

        await self._written(note)

    async def drop(self, name: str) -> None:
        """Write down that a lease was given back.  Raises `StorageTrouble`."""
        await self._written(lambda: self._state.drop(name))

    async def _written(self, work: Callable[[], None]) -> None:
        # Not in a thread: the run directory lies in memory, and a thread's turn takes longer than that.
        try:
            work()
        except OSError as error:
            raise StorageTrouble(-(error.errno or 0), f"cannot note what this host holds: {error}") from error
