"""Areas of the simulator: as many sectors as can be written in it, since those behind would only take time to compare.

Everything but the size is as in a real area; those of all real sizes are in the tests of `tests/t1_pure`.
"""

from __future__ import annotations

from lockfs_paxos_lease.format.size import Geometry

from sim.world import HOSTS, SECTOR, SECTORS

_SAID = Geometry()


class Small(Geometry):
    """An area for `HOSTS` hosts; its records say that it has the least size that there is."""

    __slots__ = ()

    def __init__(self) -> None:
        object.__setattr__(self, "sector", SECTOR)
        object.__setattr__(self, "align", SECTORS * SECTOR)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Small) or other == _SAID

    def __hash__(self) -> int:
        return hash(_SAID)

    @property
    def max_hosts(self) -> int:
        """The highest host id."""
        return HOSTS

    @property
    def flag(self) -> int:
        """What the records say."""
        return _SAID.flag
