"""A sanlock host, written from the description of its algorithms, with its weaknesses; shares nothing with the engine
but the names of the actions by which the simulator is asked for I/O.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from sim.world import Machine


class Reference(Machine):
    """To come."""

    busy = True

    def boot(self) -> None: ...

    def crash(self, downtime: float, fabric: float) -> None: ...
