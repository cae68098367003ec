"""A backend whose locks expire when a test says so: it grants all that lockd asks for, with a deadline in shared memory.

The memory is found by its name in lockd's descriptors.
"""

from __future__ import annotations

import math

from lockfs_nop.backend import NopBackend

from lockfs.backend import Spec
from lockfs.linux.deadline import Deadline

SPEC = Spec("expiring", "for tests: locks that expire when a test says so", "lockfs_tests_expiring:ExpiringBackend")


class ExpiringBackend(NopBackend):
    """See the module."""

    excludes = True
    deadline: Deadline | None = None

    async def start(self) -> None:
        self.deadline = Deadline.create()
        self.deadline.set(math.inf, math.inf)

    async def stop(self) -> None:
        await super().stop()
        if self.deadline is not None:
            self.deadline.close()
