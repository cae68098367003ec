"""What is done in a thread between the I/Os of an operation, and not for the engine to know: opening files, say.

An operation that has such calls (`Steps`) is an engine's operation with one action more.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from lockfs_paxos_lease.disk.lane import Lane
from lockfs_paxos_lease.engine.actions import Action

T = TypeVar("T")


def _nothing(_: object) -> None:
    """What is to be undone of most calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """Call *work* in a thread of *lane*, or in one that is there already, as a guest of that lane.

    Resumed with what it returns.  Thrown in are the `Exception` that it raises, and `Overdue` after *timeout* seconds;
    what it returns when nobody waits for it any more is given to *undo*, in the thread.
    """

    work: Callable[[], Any]
    timeout: float
    lane: Lane
    undo: Callable[[Any], None] = _nothing


Steps: TypeAlias = Generator[Action | Call, Any, T]
"""An operation of the engine, or one with calls between."""


def call(
    work: Callable[[], T], timeout: float, lane: Lane, undo: Callable[[T], None] = _nothing
) -> Steps[T]:
    """Call, with the type of the result."""
    return (yield Call(work, timeout, lane, undo))  # type: ignore[no-any-return]
