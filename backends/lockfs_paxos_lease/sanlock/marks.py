"""Marks that the daemon leaves when a lease has to go: a file in the run directory, which its killpath program makes.

A signal to lockd, which is what the daemon would send otherwise, says neither which lease is meant nor waits until
somebody is there to take it; a mark does, also for the next lockd.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable

from lockfs.errors import MountError
from lockfs_paxos_lease.sanlock.wire import KILLPATH_BYTES, ProtocolError, killpath_body

DIRECTORY = "sanlock"


class Marks:
    """The marks of one host in one lockspace."""

    def __init__(self, run_dir: str, lockspace: bytes) -> None:
        self._directory = os.path.join(run_dir, DIRECTORY)
        self._lockspace = lockspace
        self.program = os.fsencode(shutil.which("touch") or "/usr/bin/touch")

    def open(self) -> None:
        """Make the directory.  Raises `MountError`."""
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            killpath_body(self.program, [self.argument("")])
        except OSError as error:
            raise MountError(f"cannot make {self._directory}: {error.strerror}") from error
        except ProtocolError as error:
            hint = f"sanlock takes no longer path than {KILLPATH_BYTES} bytes: use a shorter LOCKFS_RUN_DIR."
            raise MountError(f"{self._directory} is too long a path for engine=sanlock", hint=hint) from error

    def argument(self, lease: str) -> bytes:
        """Return the path of the mark of a lease."""
        return os.fsencode(os.path.join(self._directory, self._name(lease)))

    def clear(self, lease: str) -> None:
        """Remove the mark of a lease that is to be taken anew, or was given back."""
        try:
            os.unlink(self.argument(lease))
        except FileNotFoundError:
            pass

    def seen(self, leases: Iterable[str]) -> list[str]:
        """Return those of *leases* that have a mark."""
        there = set(os.listdir(self._directory))
        return [lease for lease in leases if self._name(lease) in there] if there else []

    def _name(self, lease: str) -> str:
        return hashlib.sha256(self._lockspace + b"\0" + lease.encode()).hexdigest()[:24]
