"""Who answers the kernel when a mount daemon is dead.

While a successor is being started nobody answers, and callers wait for it; but if an image has to be fenced in this
time, a keeper that is `holding` answers what is about that image, and leaves the rest to be asked for again.  If there
is no successor, a keeper answers everything.

Without an answer everybody who uses the mount would hang; and a connection that nobody keeps open is aborted, after
which no inode can be fenced.  So every request fails as on a connection that has ended, but for one: the attributes of
a fenced inode, whose type is said to have changed, which makes the kernel declare it bad.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Container

import trio

from lockfs.kernel import device
from lockfs.lockd.attachment import Attachment

_LOOKUP, _FORGET, _GETATTR, _RELEASE, _RELEASEDIR = 1, 2, 3, 18, 29
_INTERRUPT, _DESTROY, _BATCH_FORGET = 36, 38, 42
_UNANSWERED = frozenset({_FORGET, _BATCH_FORGET, _INTERRUPT})
_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_ATTR_OUT = struct.Struct("=QII6Q3I7I")
_BUFFER = (1 << 20) + (1 << 12)
"""What libfuse agrees on: a write of 1 MiB, and the headers."""
_LARGEST_BUFFER = 1 << 28
_AT_ONCE = 64
"""Requests that are answered before others of this process get their turn."""

log = logging.getLogger(__name__)


def answer(request: bytes | memoryview, fenced: Container[int]) -> bytes | None:
    """Return the answer to a request, None for one that gets none.  Pure.  Raises struct.error for what is none."""
    _size, opcode, unique, node, *_ = _IN_HEADER.unpack_from(request)
    if opcode in _UNANSWERED:
        return None
    if opcode in (_RELEASE, _RELEASEDIR, _DESTROY):
        return _OUT_HEADER.pack(_OUT_HEADER.size, 0, unique)
    if opcode == _GETATTR and node in fenced:
        body = _ATTR_OUT.pack(0, 0, 0, node, *[0] * 8, stat.S_IFSOCK, 1, *[0] * 5)
        return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, unique) + body
    error = errno.EIO if node in fenced else errno.ENOTCONN
    if opcode == _LOOKUP and bytes(request[_IN_HEADER.size :]) == b".\0":
        error = errno.ESTALE  # it asks whether we know an inode that the kernel has forgotten
    return _OUT_HEADER.pack(_OUT_HEADER.size, -error, unique)


class Keeper:
    """Serves the connection of one mount whose daemon is dead.  *fenced* has the node ids that are fenced."""

    def __init__(self, attachment: Attachment, mountpoint: str, fenced: Container[int]) -> None:
        self.holding = False
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._attachment = attachment
        self._mountpoint = mountpoint
        self._fenced = fenced
        self.closed = trio.Event()
        """Set when a file of the mount was closed, or forgotten; whoever waits puts a new one in its place."""

    async def run(self) -> None:
        """Answer until the attachment is closed or the connection has ended.  The daemon must not read any more."""
        try:
            with self._attachment.until_closed(), self._scope, self._attachment.fuse.in_use():
                await self._run()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """Read nothing more from now on; return when that is so."""
        self._scope.cancel()
        await self._ended.wait()

    async def _run(self) -> None:
        fd = self._attachment.fuse.number
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)
        buffer = bytearray(_BUFFER)
        while True:
            await trio.lowlevel.wait_readable(fd)
            try:
                for _ in range(_AT_ONCE):
                    self._serve(fd, buffer)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and len(buffer) < _LARGEST_BUFFER:
                    buffer = bytearray(2 * len(buffer))  # larger writes were agreed on
                elif error.errno == errno.ENODEV:
                    log.info("the connection of %s has ended", self._mountpoint)
                    return
                elif error.errno not in (errno.EINTR, errno.ENOENT):
                    log.error("cannot serve %s, whose daemon is dead: %s", self._mountpoint, error)
                    return

    def _serve(self, fd: int, buffer: bytearray) -> None:
        request = memoryview(buffer)[: os.readv(fd, [buffer])]
        if _IN_HEADER.unpack_from(request)[1] in (_RELEASE, _FORGET, _BATCH_FORGET):
            self.closed.set()
        reply = answer(request, self._fenced)
        if reply is None or (self.holding and not self._is_for_fence(request)):
            return
        try:
            os.write(fd, reply)
        except OSError as error:
            if error.errno != errno.ENOENT:  # who asked has gone meanwhile
                raise

    def _is_for_fence(self, request: memoryview) -> bool:
        _size, opcode, _unique, node, *_ = _IN_HEADER.unpack_from(request)
        return node in self._fenced and opcode not in (_RELEASE, _RELEASEDIR)

    def ask_again(self) -> None:
        """Make the kernel send what the dead daemon had in its hands: else who waits for it does so for good."""
        try:
            device.notify_resend(self._attachment.fuse.number)
        except OSError as error:
            if error.errno == errno.EINVAL:
                log.warning("requests that the daemon of %s had begun stay without an answer; Linux 6.9 has a remedy",
                            self._mountpoint)  # fmt: skip
            elif error.errno != errno.ENODEV:
                log.error("cannot have requests of %s sent again: %s", self._mountpoint, error)
