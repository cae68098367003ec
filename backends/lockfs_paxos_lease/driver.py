"""Runs operations of the engine on real disks, with trio's threads and the clock of the kernel.

The I/Os of an operation that follow each other are made by one thread, which runs the engine's code between them: a
turn of a thread for each would cost more than the I/O.  The engine knows nothing of that, since

* at any time one thread at most runs code of the engine, of whatever operation: who has `_engine`;
* an operation goes on in one thread only: who finds that it was given up, or has gone on without it, leaves it alone.

What a thread does is given up by the event loop when an I/O is overdue; the operation then goes on in another one.

Operations may have calls between their I/Os (`disk.call`).  Such a call is made by the thread that is there, as a guest
of the call's own lane; only where too many hang in that already, the call waits for a thread of its own there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Generic, TypeVar

import trio

from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.disk.call import Call, Steps
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.actions import Action, Area, DiskError, Read, Settle, Sleep, Write

T = TypeVar("T")
_STEP = 0.02
"""Seconds after which the event loop looks again where the engine is at work between two I/Os."""
_engine = threading.Lock()


def boottime() -> float:
    """Return CLOCK_BOOTTIME in seconds: the one clock of the engine.  It goes on while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def run(operation: Steps[T], areas: Mapping[Area, AreaIO], home: Lane | None = None) -> T:
    """Return what *operation* ends with, or raise what it raises.

    *home* is the lane in whose threads its calls are made, if it may be; without it each is in its own.  Whoever is
    cancelled in it has given it up: see `engine.actions` for what there is to do then.
    """
    course = _Course(operation, areas)
    try:
        course.go_on()
        while not course.results:
            match course.action:
                case Settle(area, timeout):
                    await _settle(course, areas[area], timeout)
                case Sleep(seconds):
                    await trio.sleep(seconds)
                    course.go_on()
                case Read(area) | Write(area):
                    lane = areas[area].lane
                    await lane.series(_Series(course, lane))
                case Call(lane=lane):
                    lane = lane if home is None or course.turned_away else home
                    await lane.series(_Series(course, lane))
    except trio.Cancelled:
        course.close()
        if not course.results:
            raise
        # A thread has ended it before it could be given up.
    finally:
        course.close()
    return course.results[0]


async def _settle(course: _Course[T], area: AreaIO, timeout: float) -> None:
    try:
        await area.settle(timeout)
    except DiskError as error:
        course.go_on(error=error)
    else:
        course.go_on()


class _Course(Generic[T]):
    """An operation on its way: `action` is what it waits for, `results` has what it has ended with."""

    def __init__(self, operation: Steps[T], areas: Mapping[Area, AreaIO]) -> None:
        self.action: Action | Call
        self.results: list[T] = []
        self.areas = areas
        self.turn = 0
        """Grows when the operation goes on elsewhere."""
        self.turned_away = False
        """True if the call that `action` is found no room as a guest."""
        self._operation = operation

    def go_on(self, result: object = None, error: Exception | None = None) -> None:
        """Resume the operation.  Raises what it raises."""
        with _engine:
            self.step(result, error)

    def step(self, result: object, error: Exception | None) -> None:
        """Resume the operation; by who has `_engine`."""
        self.turned_away = False
        try:
            self.action = self._operation.send(result) if error is None else self._operation.throw(error)
            while isinstance(self.action, Settle) and self.areas[self.action.area].is_quiet:
                self.action = self._operation.send(None)
        except StopIteration as stop:
            self.results.append(stop.value)

    def close(self) -> None:
        """Let it go on nowhere."""
        with _engine:
            self.turn += 1
            self._operation.close()


class _Series(Generic[T]):
    """The I/Os and calls that follow each other in one lane: see `disk.lane.Series`."""

    def __init__(self, course: _Course[T], lane: Lane) -> None:
        self._course = course
        self._turn = course.turn
        self._lane = lane
        self._action: Read | Write | Call | None = None
        """What is under way, or waits for a thread; None while the engine is at work."""
        self._begun = False
        self._until = 0.0
        self._expect(course.action)

    def _expect(self, action: Action | Call) -> bool:
        """Take the next I/O or call; return False if it is none for this lane.  A call is, if only as a guest."""
        elsewhere = isinstance(action, Read | Write) and self._course.areas[action.area].lane is not self._lane
        if elsewhere or isinstance(action, Settle | Sleep):
            self._action = None
            return False
        self._action, self._until = action, time.monotonic() + action.timeout
        return True

    def left(self) -> float:
        """Return for how long it may still take."""
        return _STEP if self._action is None else max(self._until - time.monotonic(), 0.0)

    def body(self) -> None:
        """Make I/Os and calls until something else is to be done; in a thread.  Raises what the operation raises."""
        course, more = self._course, True
        while more:
            with _engine:
                action = self._action
                if course.turn != self._turn or action is None:
                    return
                guest = isinstance(action, Call) and action.lane is not self._lane
                if isinstance(action, Call) and guest and not action.lane.let_in():
                    self._action, course.turned_away = None, True
                    return
                # In one step with the look at the turn: who gives it up must see that it is under way.
                self._begun, refusal = True, self._begin(action)
            try:
                result, failure = (None, refusal) if refusal else self._do(action)
                with _engine:
                    late = course.turn != self._turn
                    if not late:
                        self._action = None
                        course.step(result, failure)
                        more = not course.results and self._expect(course.action)
                if late:
                    if isinstance(action, Call) and failure is None:
                        action.undo(result)
                    return
            finally:
                if isinstance(action, Call) and guest:
                    action.lane.let_out()

    def _begin(self, action: Read | Write | Call) -> DiskError | None:
        if isinstance(action, Call):
            return None
        try:
            self._course.areas[action.area].begin(_what(action), writes=isinstance(action, Write))
        except DiskError as error:
            return error
        return None

    def _do(self, action: Read | Write | Call) -> tuple[object, Exception | None]:
        try:
            match action:
                case Call():
                    return action.work(), None
                case Read():
                    return self._course.areas[action.area].read_now(action.offset, action.length), None
                case Write():
                    self._course.areas[action.area].write_now(action.offset, action.data, action.not_after)
        except DiskError as error:
            return None, error
        except Exception as error:
            if not isinstance(action, Call):
                raise
            return None, error
        return None, None

    def abandon(self) -> bool:
        """Give up what is overdue, and have the operation go on with that.  Return False if nothing is."""
        course = self._course
        with _engine:
            action = self._action
            if course.turn != self._turn or action is None or time.monotonic() < self._until:
                return False
            course.turn += 1
            overdue = Overdue(self._begun, action.timeout)
            if isinstance(action, Call):
                course.step(None, overdue)
                return True
            error = course.areas[action.area].overdue(_what(action), overdue)
            error.__cause__ = overdue
            course.step(None, error)
            return True


def _what(action: Read | Write) -> str:
    return "read" if isinstance(action, Read) else "write"
