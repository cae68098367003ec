"""Storage calls with a time limit that lockd itself enforces.

A thread that waits for a storage that hangs cannot be stopped, so each call runs in a task of its own and
the caller waits for that task no longer than the limit.  The task goes on, and undoes itself what nobody
waits for any more: its body sees that in `Job.given_up`.  A hung storage costs a bounded number of threads
(those of its backend) and of calls (`MAX_OVERDUE`); calls beyond those are refused at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import trio

from lockfs.errors import LockfsError, LockUnavailable
from lockfs.linux.closer import Closer

STORAGE_TIMEOUT = 10.0
"""Seconds.  Longer than a path failover of a SAN or a restart of a file server that comes back; short
enough that who opens an image gets an answer before people think that the host hangs."""
MAX_OVERDUE = 64
"""Calls of one share that may be overdue; more say nothing new and would only take memory."""

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job(Generic[T]):
    """One call under way."""

    abandoned: bool = False
    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    results: list[T] = field(default_factory=list)
    error: Exception | None = None

    def given_up(self) -> bool:
        """Say whether nobody waits for it any more; then it has to undo what it did."""
        return self.abandoned

    def result(self) -> T:
        """Return what the call returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        if not self.results:
            raise LockUnavailable("lockd is stopping")
        return self.results[0]


class Place(Protocol):
    """What calls belong to that must not overtake each other; `overdue` counts those that have not come
    back.
    """

    overdue: int

    def came_back(self) -> None:
        """Called when an overdue call has ended."""


class Storage:
    """The storage calls of one share.  *name* is the share's, for messages."""

    def __init__(self, nursery: trio.Nursery, name: str, timeout: float = STORAGE_TIMEOUT) -> None:
        self._nursery = nursery
        self._name = name
        self._timeout = timeout
        self.overdue = 0
        self.closer = Closer(name)

    async def run(self, place: Place, work: Callable[[Job[T]], Awaitable[T]]) -> T:
        """Do *work* and return what it returns.

        Raises what *work* raises as `LockfsError`, and `LockUnavailable` if it takes too long, if an
        earlier call for *place* still does, or for an error that nobody expected.  When it is given up, the
        work is cancelled where it has not begun to do something in a thread.
        """
        if place.overdue or self.overdue >= MAX_OVERDUE:
            raise LockUnavailable(f"the storage of {self._name} has not answered an earlier request yet")
        job = self._begin(place, work)
        if not await self._wait(job, place):
            job.scope.cancel()
            raise LockUnavailable(f"the storage of {self._name} did not answer within {self._timeout:g} s")
        return job.result()

    async def insist(self, place: Place, work: Callable[[Job[T]], Awaitable[T]]) -> T | None:
        """Do *work*, whatever happened before, and never give it up.

        Return what it returns, or None if that takes too long: it is going to be done all the same.
        """
        job = self._begin(place, work)
        return job.result() if await self._wait(job, place) else None

    async def finish(self, place: Place, work: Callable[[Job[T]], Awaitable[T]]) -> T:
        """Do *work* and wait as long as it takes."""
        job = self._begin(place, work)
        await job.done.wait()
        return job.result()

    def _begin(self, place: Place, work: Callable[[Job[T]], Awaitable[T]]) -> Job[T]:
        job = Job[T]()
        self._nursery.start_soon(self._do, job, place, work)
        return job

    async def _wait(self, job: Job[T], place: Place) -> bool:
        # Shielded: a caller that is gone needs the outcome all the same, to undo it.
        with trio.move_on_after(self._timeout, shield=True):
            await job.done.wait()
            return True
        if job.done.is_set():
            return True
        job.abandoned = True
        place.overdue += 1
        self.overdue += 1
        level = logging.WARNING if self.overdue == 1 else logging.INFO
        log.log(level, "the storage of %s has not answered for %g s", self._name, self._timeout)
        return False

    async def _do(self, job: Job[T], place: Place, work: Callable[[Job[T]], Awaitable[T]]) -> None:
        try:
            with job.scope:
                job.results.append(await work(job))
        except LockfsError as error:
            job.error = error
        except Exception as error:
            log.exception("a storage call of %s failed in an unexpected way", self._name)
            job.error = LockUnavailable(f"the storage of {self._name} failed: {error}")
        finally:
            job.done.set()
            if job.abandoned:
                place.overdue -= 1
                self.overdue -= 1
                place.came_back()
                if not self.overdue:
                    log.info("the storage of %s has answered all requests", self._name)
