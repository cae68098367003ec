"""Calls that may hang, in threads whose number is bounded, with a limit to how long anybody waits for them.

Nothing is lost when a wait is given up: the call goes on, and what it works with stays open.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Generic, TypeVar

import trio

from lockfs.lockd.descriptor import Descriptor

Item = TypeVar("Item")
T = TypeVar("T")
log = logging.getLogger(__name__)


class TooSlow(Exception):
    """A call did not come back in time."""


class Call(Generic[T]):
    """One call under way.  Cancelling its `scope` helps only while it waits for a thread."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.results: list[T] = []
        self.error: Exception | None = None

    def result(self) -> T:
        """Return what it returned, or raise what it raised; `TooSlow` if it was cancelled."""
        if self.error is not None:
            raise self.error
        if not self.results:
            raise TooSlow
        return self.results[0]


class Threads:
    """At most *count* threads; calls beyond that wait for their turn.  Their tasks live in *nursery*."""

    def __init__(self, nursery: trio.Nursery, count: int) -> None:
        self._nursery = nursery
        self._count = count
        self._limiter = trio.CapacityLimiter(count)

    def start(self, function: Callable[[], T], using: Iterable[Descriptor] = ()) -> Call[T]:
        """Begin a call of *function*, which works with the descriptors *using*."""
        call = Call[T]()
        kept = ExitStack()
        for each in using:
            kept.enter_context(each.in_use())
        self._nursery.start_soon(self._do, call, kept, function)
        return call

    async def run(self, seconds: float, function: Callable[[], T], using: Iterable[Descriptor] = ()) -> T:
        """Call *function* and return what it returns.  Raises what it raises, or `TooSlow`."""
        call = self.start(function, using)
        with trio.move_on_after(seconds):
            await call.done.wait()
        if not call.done.is_set():
            call.scope.cancel()
            raise TooSlow
        return call.result()

    async def for_each(
        self,
        seconds: float,
        function: Callable[[Item], T],
        items: Sequence[Item],
        results: dict[Item, T],
        using: Iterable[Descriptor] = (),
    ) -> None:
        """Call *function* for each item, and put into *results* what it returns, unless it raises OSError.

        Give up when none has come back for so many seconds; those that are missing then may be done all the same.
        """
        todo, finished = deque(items), list[Item]()

        def work() -> None:
            while todo:
                try:
                    item = todo.popleft()
                except IndexError:
                    return  # another thread was faster
                try:
                    results[item] = function(item)
                except OSError as error:
                    log.warning("a look at %s failed: %s", item, error)
                finished.append(item)

        using = list(using)
        calls = [self.start(work, using) for _ in range(min(self._count, len(todo)))]
        before = -1
        while not all(call.done.is_set() for call in calls) and len(finished) > before:
            before = len(finished)
            with trio.move_on_after(seconds):
                for call in calls:
                    await call.done.wait()
        todo.clear()
        for call in calls:
            call.scope.cancel()

    async def _do(self, call: Call[T], kept: ExitStack, function: Callable[[], T]) -> None:
        with kept:
            try:
                with call.scope:
                    call.results.append(await trio.to_thread.run_sync(function, limiter=self._limiter))
            except Exception as error:
                call.error = error
            finally:
                call.done.set()
