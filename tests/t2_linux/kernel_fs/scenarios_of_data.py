"""Reads, writes and syncs that the extension serves by itself, and what it leaves to pyfuse3."""

from __future__ import annotations

import errno
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3
import pytest
import trio
from fake_kernel import SETATTR, WRITE, Kernel, Reply, scenario

from lockfs.kernel.gates import Gates, Trust
from lockfs.linux.deadline import Deadline, now

GETATTR, READ, FSYNC = 3, 15, 20
IO = struct.Struct("=QQIIQII")
KILL_SUIDGID = 1 << 2
gates = Gates()


def read_body(fh: int, offset: int, size: int, flags: int = 0) -> bytes:
    return IO.pack(fh, offset, size, 0, 0, flags, 0)


def write_body(fh: int, offset: int, data: bytes, flags: int = 0, write_flags: int = 0) -> bytes:
    return IO.pack(fh, offset, len(data), write_flags, 0, flags, 0) + data


def written(reply: Reply) -> int:
    assert reply.error == 0
    count, padding = struct.unpack("=II", reply.body)
    assert padding == 0
    return int(count)


@contextmanager
def gate(number: int, *, guarded: bool = True, direct: bool = False) -> Iterator[int]:
    """An open file with its gate; the descriptor is closed only if it is ours again."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        fd = os.open(file.name, os.O_RDWR)
        second = os.open(file.name, os.O_RDWR | os.O_DIRECT) if direct else -1
        gates.add(number, fd, second, guarded=guarded)
        try:
            yield fd
        finally:
            assert gates.remove(number)
            for each in (fd, second) if direct else (fd,):
                os.close(each)


@scenario
async def data(k: Kernel) -> None:
    with gate(7) as fd:
        content = os.urandom(300_000)
        assert written(await k.ask(WRITE, write_body(7, 1000, content))) == len(content)
        assert os.pread(fd, 400_000, 0) == bytes(1000) + content
        assert (await k.ask(READ, read_body(7, 1000, 300_000))).body == content
        assert (await k.ask(READ, read_body(7, 300_900, 4096))).body == content[-100:], "to the end of the file"
        assert (await k.ask(READ, read_body(7, 400_000, 4096))).body == b""
        assert written(await k.ask(WRITE, write_body(7, 0, b""))) == 0
        for flags in (0, 1):
            assert await k.ask(FSYNC, struct.pack("=QII", 7, flags, 0)) == Reply(k._unique, 0, b"")
        assert not k.operations.current, "Python was asked"


async def _validity(k: Kernel, fh: int) -> tuple[int, int]:
    """Return the seconds, and nanoseconds, for which attributes of an open file may be trusted."""
    valid, nsec = struct.unpack_from("=QI", (await k.ask(GETATTR, struct.pack("=IIQ", 1, 0, fh))).body)
    return valid, nsec


@scenario
async def attributes(k: Kernel) -> None:
    """They say what fstat(2) says; a request that names no open file is pyfuse3's."""

    async def getattr_(_inode: int, _ctx: object) -> pyfuse3.EntryAttributes:
        return pyfuse3.EntryAttributes()

    k.operations.on["getattr"] = getattr_
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        os.truncate(file.name, 123_456)
        os.chown(file.name, 12, 34)
        os.utime(file.name, ns=(1_700_000_000_123_456_789, 1_600_000_000_987_654_321))
        gates.add(7, file.fileno(), guarded=True, trust=Trust(3))
        reply = await k.ask(GETATTR, struct.pack("=IIQ", 1, 0, 7), node=1234)
        valid, nsec, _, *found = struct.unpack("=QII6Q10I", reply.body)
        s = os.fstat(file.fileno())
        seconds = [each // 10**9 for each in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)]
        rest = [each % 10**9 for each in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)]
        assert (valid, nsec) == (3, 0)
        assert found == [
            1234, s.st_size, s.st_blocks, *seconds, *rest, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, s.st_blksize, 0,
        ]  # fmt: skip
        assert not k.operations.current
        for flags, fh in ((0, 7), (1, 8)):
            assert (await k.ask(GETATTR, struct.pack("=IIQ", flags, 0, fh))).error == 0
        assert len(k.operations.current) == 2
        gates.remove(7)
        gates.add(7, file.fileno(), guarded=False, trust=Trust(2.5, calm_only=True))
        assert await _validity(k, 7) == (0, 0)
        gates.remove(7)
    with open(os.__file__, "rb") as old:
        gates.add(7, old.fileno(), guarded=False, trust=Trust(2.5, calm_only=True))
        assert await _validity(k, 7) == (2, 500_000_000)
        gates.remove(7)
    with open("/dev/zero", "rb") as device:
        gates.add(8, device.fileno(), guarded=False)
        reply = await k.ask(GETATTR, struct.pack("=IIQ", 1, 0, 8))
        assert struct.unpack("=QII6Q10I", reply.body)[-3] == 1 << 8 | 5
        gates.remove(8)


@scenario
async def errors_of_data(k: Kernel) -> None:
    with gate(7):
        assert (await k.ask(READ, read_body(7, 1 << 63, 10))).error == errno.EINVAL
        assert (await k.ask(WRITE, write_body(7, (1 << 63) - 1, b"12"))).error in (errno.EFBIG, errno.EINVAL)
    with open("/dev/full", "rb+", buffering=0) as full:
        gates.add(8, full.fileno(), guarded=False)
        assert (await k.ask(WRITE, write_body(8, 0, b"12"))).error == errno.ENOSPC
        gates.remove(8)
    reading = os.open("/dev/null", os.O_RDONLY)
    gates.add(9, reading, guarded=False)
    assert (await k.ask(WRITE, write_body(9, 0, b"12"))).error == errno.EBADF
    gates.remove(9)
    os.close(reading)


@scenario
async def data_for_python(k: Kernel) -> None:
    """What has no gate, or one that is shut, or clears set-id bits, or has not the form that we know."""

    async def write(_fh: int, _offset: int, buf: bytes) -> int:
        return len(buf)

    k.operations.on |= {"write": write, "setattr": pyfuse3.EntryAttributes()}
    with gate(7) as fd:
        for body in (
            write_body(6, 0, b"12"),
            write_body(1 << 40, 0, b"12"),
            write_body(7, 0, b"12", write_flags=KILL_SUIDGID),
        ):
            before = len(k.operations.current)
            assert written(await k.ask(WRITE, body)) == 2
            assert len(k.operations.current) == before + 1
        assert k.operations.current[-1].kill_suidgid
        gates.shut(7)
        gates.shut(6)  # there is none
        assert written(await k.ask(WRITE, write_body(7, 0, b"12"))) == 2
        assert len(k.operations.current) == 4
        assert os.fstat(fd).st_size == 0, "a request for Python was carried out"
        # The body of the last request is its own, whatever was read since.
        assert (await k.ask(SETATTR, bytes(88))).error == 0


@scenario
async def direct_data(k: Kernel) -> None:
    """What is aligned goes past the cache, anything else through it; the bytes are the same."""
    with gate(7, direct=True) as fd:
        content = os.urandom(1 << 16)
        assert written(await k.ask(WRITE, write_body(7, 0, content, os.O_DIRECT))) == len(content)
        assert written(await k.ask(WRITE, write_body(7, 1 << 16, b"unaligned", os.O_DIRECT))) == 9
        content += b"unaligned"
        assert written(await k.ask(WRITE, write_body(7, 512, b"x" * 512, os.O_DIRECT))) == 512
        content = content[:512] + b"x" * 512 + content[1024:]
        assert os.pread(fd, 1 << 20, 0) == content
        for offset, size in ((0, 1 << 17), (512, 1024), (3, 10), (1 << 16, 4096), (0, 512)):
            reply = await k.ask(READ, read_body(7, offset, size, os.O_DIRECT))
            assert reply.body == content[offset : offset + size]


@scenario
async def deadlines(k: Kernel) -> None:
    async def write(_fh: int, _offset: int, _buf: bytes) -> int:
        raise pyfuse3.FUSEError(errno.EUCLEAN)  # late: it came to Python

    k.operations.on["write"] = write
    deadline = Deadline.create()
    with gate(7), gate(8, guarded=False):
        gates.heed(deadline.fd)
        assert (await k.ask(WRITE, write_body(7, 0, b"12"))).error == errno.EUCLEAN, "nothing was said of when it ends"
        assert written(await k.ask(WRITE, write_body(8, 0, b"12"))) == 2, "this one needs no lock"
        assert (await k.ask(READ, read_body(7, 0, 10))).error == 0
        deadline.set(now() + 1000, now() + 2000)
        assert written(await k.ask(WRITE, write_body(7, 0, b"12"))) == 2
        deadline.set(now() - 1, now() + 1000)
        assert (await k.ask(WRITE, write_body(7, 0, b"12"))).error == errno.EUCLEAN
        deadline.set(math.inf, math.inf)
        assert written(await k.ask(WRITE, write_body(7, 0, b"12"))) == 2
        gates.heed(-1)
        deadline.set(0, 0)
        assert written(await k.ask(WRITE, write_body(7, 0, b"12"))) == 2
    deadline.close()


@scenario
async def much_data_at_once(k: Kernel) -> None:
    """Each is answered once, and with its own data, however many threads there are."""
    size, count = 4096, 500
    with gate(7) as fd, gate(8, direct=True) as other:
        for each in (fd, other):
            os.pwrite(each, b"".join(bytes([number % 251]) * size for number in range(count)), 0)
        wanted: dict[int, bytes] = {}
        for number in range(count):
            flags = os.O_DIRECT if number % 2 else 0
            unique = k.post(READ, read_body(7 + number % 2, number * size, size, flags))
            wanted[unique] = bytes([number % 251]) * size
            if number % 50 == 0:
                await trio.lowlevel.checkpoint()
        for _ in range(count):
            reply = await k.read()
            assert reply.body == wanted.pop(reply.unique)
        assert not wanted and k.read_now() is None


@scenario
async def gates_that_must_not_be(k: Kernel) -> None:
    with gate(7) as fd, pytest.raises(FileExistsError):
        gates.add(7, fd, guarded=False)
    assert gates.remove(7), "there is none"
    with pytest.raises(OSError) as failure:
        gates.heed(10_000)
    assert failure.value.errno == errno.EBADF
