"""A lockd that does not answer, as one that was stopped: it is killed, for the next one takes up all that it had.

Nobody can reach it over its socket, so it is found by the lock on its run directory, which it alone has.
"""

from __future__ import annotations

import os

from lockfs.linux import flocks
from lockfs.protocol.start import LOCKD_LOCK

HANG = float(os.environ.get("LOCKFS_HANG") or 5)
"""Seconds for a lockd to answer what it does not have to ask anybody for."""


def end(run_dir: str, lock: str = LOCKD_LOCK) -> int:
    """Kill the lockd of a run directory, or who else has the flock on *lock* there; return its process id, 0 if there
    is none.  Raises OSError.
    """
    return flocks.end_holder(os.path.join(run_dir, lock))
