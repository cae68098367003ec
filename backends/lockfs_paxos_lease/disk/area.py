"""One area of a file, in the engine's terms: reads, writes that are not issued too late, and knowing what is under way.

Invariants:
* The file is closed only when no call has to do with it any more: a thread that is about to make its system call must
  not find another file under the same number.
* A write counts as under way from before it is handed to a thread until that thread has come back from the kernel.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from lockfs_paxos_lease.disk.file import RawFile, Storage
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.actions import Clock, DiskError, IOFailed, IOTimeout, NotIssued

CLOSE_TIMEOUT = 1.0
"""Seconds to wait for a thread that closes a file."""
CALL_PATIENCE = 0.25
"""Seconds to wait, before that, for calls that nobody waits for any more: on a storage that does not hang a moment."""

T = TypeVar("T")


class _Use:
    """A file, from when it is open; how many calls have to do with it, and how many of them write.

    Safe to use from all threads.
    """

    __slots__ = ("_calls", "_closed", "_closing", "_file", "_lock", "_waiting", "_writes")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: RawFile | None = None
        self._calls = 0
        self._writes = 0
        self._closing = False
        self._closed = False
        self._waiting: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []

    def opened(self, file: RawFile) -> None:
        """Take a file that was just opened; close it if it is too late for that.  In a thread; OSError."""
        with self._lock:
            taken = not self._closing and self._file is None
            if taken:
                self._file = file
        if not taken:
            file.close()

    @property
    def file(self) -> RawFile | None:
        """The file; None before it is open."""
        return self._file

    def begin(self, writes: bool) -> bool:
        """Count a call; return False if the file is not open.  In any thread."""
        with self._lock:
            if self._closing or self._file is None:
                return False
            self._calls += 1
            self._writes += writes
            return True

    def end(self, writes: bool) -> None:
        """A call has come back.  In any thread."""
        with self._lock:
            self._calls -= 1
            self._writes -= writes
            last = self._closing and not self._calls
        self._tell()
        if last:
            self.shut()

    def close(self) -> bool:
        """Let no call begin any more.  Return True if the caller has to `shut` the file; else the last call does."""
        with self._lock:
            first, self._closing = not self._closing, True
            if first and self._file is None:
                self._closed = True  # it is not open yet, and will not be
            return first and not self._calls and not self._closed

    def shut(self) -> None:
        """Close the file, once.  In a thread; OSError."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            finally:
                with self._lock:
                    self._closed = True
                self._tell()

    def is_quiet(self) -> bool:
        """Say whether no write is under way.  In any thread."""
        return not self._writes

    def is_closed(self) -> bool:
        """Say whether the file is closed.  In any thread."""
        return self._closed

    async def wait(self, until: Callable[[], bool]) -> None:
        """Wait until `is_quiet` or `is_closed`."""
        token = trio.lowlevel.current_trio_token()
        while True:
            with self._lock:
                if until():
                    return
                event = trio.Event()
                self._waiting.append((token, event))
            await event.wait()

    def _tell(self) -> None:
        with self._lock:
            if not self._waiting or (self._writes and not self._closed):
                return
            waiting, self._waiting = self._waiting, []
        for token, event in waiting:
            try:
                token.run_sync_soon(event.set)
            except trio.RunFinishedError:
                pass  # nobody is left to wait for it


class AreaIO:
    """An area that begins at *start* of a file, which *opener* opens.  *where* names it in messages."""

    def __init__(self, opener: Callable[[], RawFile], lane: Lane, clock: Clock, where: str, start: int = 0) -> None:
        self.where = where
        self.lane = lane
        self._opener = opener
        self._clock = clock
        self._start = start
        self._use = _Use()

    def open_now(self) -> None:
        """Open the file, however long that takes; in a thread.  Raises what *opener* does.

        One that is open only after `close` is closed again.
        """
        self._use.opened(self._opener())

    async def open(self, timeout: float) -> None:
        """Open the file.  Raises what *opener* does, and `IOTimeout`: the area must be closed then."""
        try:
            await self.lane.call(self.open_now, timeout)
        except Overdue as error:
            raise IOTimeout(f"{self.where}: cannot open it: {error}") from error

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode number of the file that it lies in; zeros where that is not open."""
        file = self._use.file
        return (0, 0) if file is None else file.identity

    @property
    def _file(self) -> RawFile:
        """The file, for a call that was counted."""
        file = self._use.file
        if file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return file

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

    @property
    def is_quiet(self) -> bool:
        """True while no write to this area is under way."""
        return self._use.is_quiet()

    async def settle(self, timeout: float) -> None:
        """Wait until no write to this area is under way.  Raises `IOTimeout`."""
        with trio.move_on_after(timeout):
            await self._use.wait(self._use.is_quiet)
            return
        raise IOTimeout(f"{self.where}: an earlier write still hangs")

    async def close(self) -> None:
        """Close the file, at the latest when nothing hangs in it any more.  The area is used no more.

        On return it is closed, or it hangs.
        """
        if self._use.close():
            try:
                await self.lane.call(self._use.shut, CLOSE_TIMEOUT)
            except BaseException as error:
                # Where it did not find a thread within the lane; if it did, this does nothing.
                trio.lowlevel.start_thread_soon(self._use.shut, _nothing)
                if not isinstance(error, Overdue | OSError):
                    raise
        elif not self._use.is_closed():
            with trio.move_on_after(CALL_PATIENCE):
                await self._use.wait(self._use.is_closed)

    def give_up(self) -> None:
        """Do what `close` does where the file was not opened, or may be later."""
        if self._use.close():
            trio.lowlevel.start_thread_soon(self._use.shut, _nothing)

    def close_now(self) -> None:
        """Do what `close` does, however long it takes; in a thread.  Raises OSError."""
        if self._use.close():
            self._use.shut()

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
            raise IOFailed(f"{self.where}: cannot {what}: it is not open")

    def overdue(self, what: str, error: Overdue) -> DiskError:
        """Return what it means that a call did not come back: a write that has not begun is over."""
        kind = IOFailed if what == "write" and not error.begun else IOTimeout
        return kind(f"{self.where}: cannot {what}: {error}")

    def _failed(self, what: str, error: OSError) -> IOFailed:
        return IOFailed(f"{self.where}: cannot {what}: {error.strerror}")


def _nothing(_: object) -> None:
    """What is done about the end of a thread that nobody waits for."""


async def open_area(
    storage: Storage, lane: Lane, clock: Clock, path: str, *, dir_fd: int | None = None, start: int = 0, timeout: float
) -> AreaIO:
    """Open the file that an area lies in.  Raises OSError, and `IOTimeout`."""
    area = AreaIO(partial(storage.open, path, dir_fd), lane, clock, os.fsdecode(path), start)
    try:
        await area.open(timeout)
    except BaseException:
        area.give_up()
        raise
    return area
