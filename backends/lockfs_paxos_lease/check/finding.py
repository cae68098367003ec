"""One thing that is wrong with an area."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How bad it is."""

    ERROR = "error"
    """Hosts refuse the lease or lockspace, or could be misled about who holds it."""
    WARNING = "warning"
    """Not as it should be, but nobody gets a lock by it that he should not have."""


class Remedy(enum.Enum):
    """What can be done about it without any doubt."""

    NONE = ""
    REQUEST = "write an empty request record"
    BALLOT = "write a ballot block that takes part in no ballot"
    HOST = "write a free host record"


@dataclass(frozen=True, slots=True)
class Finding:
    """*offset* is that of the record, in bytes from the start of its area; `host_id` 0 if it is not about one.

    `code` is what sanlock answers because of it, 0 if nothing.
    """

    level: Level
    record: str
    offset: int
    what: str
    code: int = 0
    host_id: int = 0
    remedy: Remedy = Remedy.NONE


class Findings(list[Finding]):
    """Findings about one area."""

    def error(self, record: str, offset: int, what: str, *, code: int = 0, host_id: int = 0,
              remedy: Remedy = Remedy.NONE) -> None:  # fmt: skip
        """Note an error."""
        self.append(Finding(Level.ERROR, record, offset, what, code, host_id, remedy))

    def warn(self, record: str, offset: int, what: str, *, host_id: int = 0, remedy: Remedy = Remedy.NONE) -> None:
        """Note a warning."""
        self.append(Finding(Level.WARNING, record, offset, what, 0, host_id, remedy))
