"""Open files whose data the extension serves by itself (gate.c), as the mount daemon sees them.

Each has a gate.  While it is open, reads, writes and syncs, and requests for attributes that name the open file, never
come to a handler, and writes of a guarded file stop at the deadline of its lock.  While it is shut, or the lock is
late, or set-id bits are to be cleared, they come to the handlers of Operations as ever, which may wait, or refuse.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trust:
    """For how long the kernel may trust attributes of a file, and, as long, what it has cached of its data.

    With `calm_only` not at all while the file has changed within the last second.
    """

    seconds: float
    calm_only: bool = False


NO_TRUST = Trust(0)


class Gates:
    """The gates of the session of this process, which must have begun."""

    def add(self, number: int, fd: int, direct: int = -1, *, guarded: bool, trust: Trust = NO_TRUST) -> None:
        """Open a gate for an open file.

        *fd* serves its data, and *direct*, if there is one, what is aligned and asked for with O_DIRECT.  Both must
        stay open until `remove`.  Raises OSError.
        """
        from lockfs.kernel import _shim

        _shim.add(number, fd, direct, guarded, round(trust.seconds * 1e9), trust.calm_only)

    def shut(self, number: int) -> None:
        """Shut a gate for good."""
        from lockfs.kernel import _shim

        _shim.shut(number)

    def remove(self, number: int) -> bool:
        """Forget a file.  Return False if its descriptors are in use still: then they will be closed, and not by us."""
        from lockfs.kernel import _shim

        return _shim.remove(number)

    def heed(self, deadline_fd: int) -> None:
        """Heed a deadline (`lockfs.linux.deadline`) with all guarded files from now on.  Raises OSError."""
        from lockfs.kernel import _shim

        _shim.heed(deadline_fd)
