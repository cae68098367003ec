"""One area of a file, in the engine's terms: reads, writes that are not issued too late, and knowing what is under way.

Invariants:
* The file is closed only when no call has to do with it any more: a thread that is about to make its system call must
  not find another file under the same number.
* A write counts as under way from before it is handed to a thread until that thread has come back from the kernel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from lockfs_paxos_lease.disk.file import RawFile, Storage
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.actions import Clock, DiskError, IOFailed, IOTimeout, NotIssued

CLOSE_TIMEOUT = 1.0
"""Seconds to wait for a thread that closes a file."""

T = TypeVar("T")


class _Use:
    """How many calls have to do with a file, and how many of them write; safe to use from all threads."""

    def __init__(self, close: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._close = close
        self._calls = 0
        self._writes = 0
        self._closing = False
        self._token = trio.lowlevel.current_trio_token()
        self._waiting: list[trio.Event] = []

    def begin(self, writes: bool) -> bool:
        """Count a call; return False if the file is closed.  In any thread."""
        with self._lock:
            if self._closing:
                return False
            self._calls += 1
            self._writes += writes
            return True

    def end(self, writes: bool) -> None:
        """A call has come back.  In any thread."""
        with self._lock:
            self._calls -= 1
            self._writes -= writes
            waiting: list[trio.Event] = []
            if not self._writes:
                waiting, self._waiting = self._waiting, waiting
            last = self._closing and not self._calls
        for each in waiting:
            try:
                self._token.run_sync_soon(each.set)
            except trio.RunFinishedError:
                pass  # nobody is left to wait for it
        if last:
            self._close()

    def close(self) -> bool:
        """Let no call begin any more.  Return True if the file can be closed now; else the last call does it."""
        with self._lock:
            first, self._closing = not self._closing, True
            return first and not self._calls

    async def settled(self) -> None:
        """Wait until no write is under way."""
        while True:
            with self._lock:
                if not self._writes:
                    return
                event = trio.Event()
                self._waiting.append(event)
            await event.wait()


class AreaIO:
    """An area that begins at *start* of an open file.  *where* names it in messages."""

    def __init__(self, file: RawFile, lane: Lane, clock: Clock, where: str, start: int = 0) -> None:
        self.where = where
        self.lane = lane
        self._file = file
        self._clock = clock
        self._start = start
        self._use = _Use(file.close)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode number of the file that it lies in."""
        return self._file.identity

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        """Return *length* bytes.  Raises `IOFailed` and `IOTimeout`."""
        return await self._call("read", lambda: self._file.read(self._start + offset, length), timeout, writes=False)

    def read_now(self, offset: int, length: int) -> bytes:
        """Return *length* bytes, however long that takes; in a thread, after `begin`.  Raises `IOFailed`."""
        return self._now("read", lambda: self._file.read(self._start + offset, length), writes=False)

    async def write(self, offset: int, data: bytes, timeout: float, not_after: float) -> None:
        """Write whole sectors, unless the clock has passed *not_after*.  Raises what reads do, and `NotIssued`."""
        await self._call("write", lambda: self._write(offset, data, not_after), timeout, writes=True)

    def write_now(self, offset: int, data: bytes, not_after: float) -> None:
        """Do what `write` does, however long it takes; in a thread, after `begin`.  Raises `IOFailed`, `NotIssued`."""
        self._now("write", lambda: self._write(offset, data, not_after), writes=True)

    def _write(self, offset: int, data: bytes, not_after: float) -> None:
        now = self._clock()
        if now > not_after:
            raise NotIssued(f"{self.where}: a write was {now - not_after:.3f} s too late, and not issued")
        self._file.write(self._start + offset, data)

    async def settle(self, timeout: float) -> None:
        """Wait until no write to this area is under way.  Raises `IOTimeout`."""
        with trio.move_on_after(timeout):
            await self._use.settled()
            return
        raise IOTimeout(f"{self.where}: an earlier write still hangs")

    async def close(self) -> None:
        """Close the file as soon as nothing hangs in it.  The area is used no more."""
        if self._use.close():
            try:
                await self.lane.soon(self._file.close, CLOSE_TIMEOUT)
            except BaseException as error:
                trio.lowlevel.start_thread_soon(self._file.close, lambda _: None)
                if not isinstance(error, Overdue):
                    raise

    async def _call(self, what: str, work: Callable[[], T], timeout: float, *, writes: bool) -> T:
        self.begin(what, writes=writes)
        try:
            return await self.lane.call(work, timeout, ended=lambda: self._use.end(writes))
        except Overdue as error:
            raise self.overdue(what, error) from error
        except OSError as error:
            raise self._failed(what, error) from error

    def _now(self, what: str, work: Callable[[], T], *, writes: bool) -> T:
        try:
            return work()
        except OSError as error:
            raise self._failed(what, error) from error
        finally:
            self._use.end(writes)

    def begin(self, what: str, *, writes: bool) -> None:
        """Count a call that is about to be made with `read_now` or `write_now`.  Raises `IOFailed`: it must not be."""
        if not self._use.begin(writes):
            raise IOFailed(f"{self.where}: cannot {what}: it was closed")

    def overdue(self, what: str, error: Overdue) -> DiskError:
        """Return what it means that a call did not come back: a write that has not begun is over."""
        kind = IOFailed if what == "write" and not error.begun else IOTimeout
        return kind(f"{self.where}: cannot {what}: {error}")

    def _failed(self, what: str, error: OSError) -> IOFailed:
        return IOFailed(f"{self.where}: cannot {what}: {error.strerror}")


async def open_area(
    storage: Storage, lane: Lane, clock: Clock, path: str, *, dir_fd: int | None = None, start: int = 0, timeout: float
) -> AreaIO:
    """Open the file that an area lies in.  Raises OSError, and `IOTimeout`."""
    where = os.fsdecode(path)
    try:
        file = await lane.call(lambda: storage.open(path, dir_fd), timeout, undo=lambda file: file.close())
    except Overdue as error:
        raise IOTimeout(f"{where}: cannot open it: {error}") from error
    return AreaIO(file, lane, clock, where, start)
