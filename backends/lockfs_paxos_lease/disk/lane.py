"""A bounded number of threads for the calls to one storage, with a time limit that holds although a thread may hang.

A thread in a system call cannot be stopped.  So who waits for one waits no longer than the limit; the thread goes on by
itself, keeps its place in the lane until it comes back, and undoes what nobody waits for any more.  A hung storage
costs a lane's threads and nothing else: another lane has others.  A thread that is at work for one lane may make a call
of another one in passing, as its guest; a lane has no more guests than threads, so what hangs there costs no other lane
more than that.

Whether an abandoned call had begun is known for certain: one that has not begun never will.

Each turn of a thread costs more than most calls: `Lane.series` makes several in one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import trio

if TYPE_CHECKING:
    from outcome import Outcome

LOOK = 0.25
"""Seconds between two looks at a series: a call in it may have less time than the one before had left."""

T = TypeVar("T")


class Overdue(Exception):
    """A call did not come back in time.  `begun`: it may still have its effect, at any later time."""

    def __init__(self, begun: bool, timeout: float) -> None:
        super().__init__(
            f"no answer within {timeout:g} s" if begun else f"no thread was free for {timeout:g} s: earlier calls hang"
        )
        self.begun = begun


class _Abandoned(Exception):
    """The thread came too late to begin."""


class _Call(Generic[T]):
    """One call: who comes first, the thread or the waiter that gives up."""

    def __init__(self, work: Callable[[], T], undo: Callable[[T], None] | None, ended: Callable[[], None]) -> None:
        self._work = work
        self._undo = undo
        self._ended = ended
        self._lock = threading.Lock()
        self._begun = False
        self._abandoned = False
        self._results: list[T] = []

    def body(self) -> None:
        """Do the work; in a thread."""
        with self._lock:
            if self._abandoned:
                raise _Abandoned
            self._begun = True
        try:
            result = self._work()
        finally:
            self._ended()
        if not self._hand_over(result) and self._undo is not None:
            self._undo(result)

    def _hand_over(self, result: T) -> bool:
        with self._lock:
            if not self._abandoned:
                self._results.append(result)
            return not self._abandoned

    def abandon(self) -> bool:
        """Return whether it has begun; if not, it never will."""
        with self._lock:
            self._abandoned = True
            begun = self._begun
        if not begun:
            self._ended()
        return begun

    def take(self) -> list[T]:
        """Return the result, if there is one, for whoever is the first to ask."""
        with self._lock:
            results, self._results = self._results, []
            return results

    def undo_late(self) -> None:
        """Undo a result that came while its waiter was being cancelled."""
        for result in self.take():
            if self._undo is not None:
                self._undo(result)


class Series(Protocol):
    """Several calls, one after the other in one thread.  All methods but `body` are called in the event loop."""

    def body(self) -> None:
        """Make the calls; in a thread."""

    def left(self) -> float:
        """Return for how many seconds the call that is under way may still take."""

    def abandon(self) -> bool:
        """If the call that is under way is overdue, give it up, so that no other follows, and return True."""


class Lane:
    """At most *threads* calls at once; others wait their turn, within their time limit."""

    def __init__(self, threads: int) -> None:
        self._limiter = trio.CapacityLimiter(threads)
        self._rooms = threading.BoundedSemaphore(threads)

    @property
    def busy(self) -> int:
        """How many threads are at work or hang."""
        return int(self._limiter.borrowed_tokens)

    async def call(
        self,
        work: Callable[[], T],
        timeout: float,
        *,
        undo: Callable[[T], None] | None = None,
        ended: Callable[[], None] | None = None,
    ) -> T:
        """Return what *work* returns, which runs in a thread, or raise what it raises, or `Overdue`.

        *undo* is called in the thread with a result that nobody waits for any more.  *ended* is called once, in some
        thread, when the call has no effect any more: it came back, or never began.
        """
        call = _Call(work, undo, ended or _nothing)
        try:
            with trio.move_on_after(timeout):
                await trio.to_thread.run_sync(call.body, abandon_on_cancel=True, limiter=self._limiter)
        except BaseException:
            call.abandon()
            trio.lowlevel.start_thread_soon(call.undo_late, lambda _: None)
            raise
        # It may have come back in the very moment in which the time was over.
        begun = call.abandon()
        for result in call.take():
            return result
        raise Overdue(begun, timeout)

    def let_in(self) -> bool:
        """Let the thread of another lane make a call here, until `let_out`; False if too many do.  In any thread."""
        return self._rooms.acquire(blocking=False)

    def let_out(self) -> None:
        """A guest has come back.  In any thread."""
        self._rooms.release()

    async def series(self, series: Series) -> bool:
        """Run a series in a thread, or raise what it raises.  Return False if a call in it was abandoned as overdue.

        Whoever is cancelled in it has to keep it from going on.
        """
        me, token, ended = object(), trio.lowlevel.current_trio_token(), trio.Event()
        results: list[Outcome[None]] = []
        try:
            self._limiter.acquire_on_behalf_of_nowait(me)
        except trio.WouldBlock:
            with trio.move_on_after(series.left()) as scope:
                await self._limiter.acquire_on_behalf_of(me)
            if scope.cancelled_caught:
                return not series.abandon()

        def end(result: Outcome[None]) -> None:
            self._limiter.release_on_behalf_of(me)
            results.append(result)
            ended.set()

        def deliver(result: Outcome[None]) -> None:
            try:
                token.run_sync_soon(end, result)
            except trio.RunFinishedError:
                pass  # nobody is left to wait for it

        try:
            trio.lowlevel.start_thread_soon(series.body, deliver)
        except BaseException:
            self._limiter.release_on_behalf_of(me)
            raise
        while not results:
            with trio.move_on_after(min(series.left(), LOOK)):
                await ended.wait()
            if not results and series.abandon():
                return False
        results[0].unwrap()
        return True


def _nothing() -> None:
    """What happens at the end of most calls."""
