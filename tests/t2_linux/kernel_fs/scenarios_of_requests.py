"""Requests, and what comes of them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pyfuse3
import pytest
import trio
from fake_kernel import (
    COPY,
    COPY_64,
    CREATE,
    DIRECT_IO,
    FALLOCATE,
    INTERRUPT,
    KEEP_CACHE,
    LOG,
    LOOKUP,
    LSEEK,
    NONSEEKABLE,
    OPEN,
    OPENDIR,
    PASSTHROUGH,
    SETATTR,
    WRITE,
    Kernel,
    Operations,
    Reply,
    before_session,
    fallocate_body,
    open_out,
    scenario,
    serve_while,
)  # fmt: skip

from lockfs.errors import LockfsError
from lockfs.kernel import _shim, session
from lockfs.kernel.extra import Requests
from lockfs.kernel.wire import Attributes

GETATTR = 3


async def forever(*_args: object) -> None:
    await trio.sleep_forever()


# Opening ---------------------------------------------------------------------------------------------------------------


@scenario
async def backing_ids(k: Kernel) -> None:
    flagged = {"keep_cache": True, "direct_io": True, "nonseekable": True}
    create = struct.pack("=IIII", 0, 0o644, 0, 0) + b"name\0"
    for index, backing_id in ((1, 1), (0xFFFFFFFF, 0x7FFFFFFF)):
        for handler, opcode, body in (("open", OPEN, bytes(8)), ("create", CREATE, create)):
            k.operations.on[handler] = pyfuse3.FileInfo(fh=session.mint(index, backing_id), **flagged)
            assert open_out((await k.ask(opcode, body)).body) == (index, PASSTHROUGH, backing_id)
            k.operations.on[handler] = pyfuse3.FileInfo(fh=session.mint(index, 0), **flagged)
            plain = open_out((await k.ask(opcode, body)).body)
            assert plain == (index, DIRECT_IO | KEEP_CACHE | NONSEEKABLE, 0)


@scenario
async def opens_without_one(k: Kernel) -> None:
    k.operations.on["opendir"] = 5 | 7 << 32
    assert open_out((await k.ask(OPENDIR, bytes(8))).body)[0] == 5 | 7 << 32

    async def refuse(*_args: object) -> None:
        raise pyfuse3.FUSEError(errno.EBUSY)

    k.operations.on["open"] = refuse
    unique = k.post(OPEN, bytes(8))
    assert (await k.read()) == Reply(unique, errno.EBUSY, b"")
    for bad in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            session.mint(bad, 1)


@scenario
async def what_a_new_file_is_like(k: Kernel) -> None:
    """Our answer to CREATE tells of a file what libfuse's to LOOKUP does."""
    entry = k.operations.entry
    for name in ("size", "blocks", "nlink", "uid", "gid", "blksize"):
        setattr(entry, f"st_{name}", random.getrandbits(31))
    entry.st_ino, entry.generation = random.getrandbits(64), random.getrandbits(64)
    entry.st_mode = 0o100640
    entry.entry_timeout, entry.attr_timeout = 1.25, 0.0
    k.operations.on["create"] = pyfuse3.FileInfo(fh=1)
    for times in ((1_700_000_000_123_456_789, 0, 1), (-1, -1_000_000_001, 2**33 * 10**9)):
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = times
        looked_up = (await k.ask(LOOKUP, b"name\0")).body
        created = (await k.ask(CREATE, bytes(16) + b"name\0")).body
        assert len(looked_up) == 128 and looked_up == created[:-16]


@scenario
async def what_an_open_asks(k: Kernel) -> None:
    seen: list[tuple[object, ...]] = []

    async def see(*args: object) -> pyfuse3.FileInfo:
        seen.append(args)
        await trio.lowlevel.checkpoint()
        assert session.current().opcode in (OPEN, CREATE)  # also after an await
        return pyfuse3.FileInfo(fh=1)

    k.operations.on |= {"open": see, "create": see}
    await k.ask(OPEN, struct.pack("=II", os.O_RDWR, 0))
    assert seen[-1][:2] == (5, os.O_RDWR)
    await k.ask(CREATE, struct.pack("=IIII", os.O_WRONLY, 0o100644, 0o022, 0) + b"n\xc3\0")
    assert seen[-1][:4] == (5, b"n\xc3", 0o100644, os.O_WRONLY)
    contexts: list[Any] = [seen[0][2], seen[1][4]]
    assert [(ctx.uid, ctx.gid, ctx.pid, ctx.umask) for ctx in contexts] == [
        (1000, 1001, 1002, 0),
        (1000, 1001, 1002, 0o022),
    ]


# The missing requests --------------------------------------------------------------------------------------------------


@scenario
async def bodies_and_answers(k: Kernel) -> None:
    seen: list[tuple[object, ...]] = []

    async def see(*args: object) -> int:
        seen.append(args)
        return 7

    k.operations.on |= {"fallocate": see, "lseek": see, "copy_file_range": see}
    assert (await k.ask(FALLOCATE, fallocate_body(1))).body == b""
    assert seen[-1][:4] == (1, 4, 2, 3)
    ctx: Any = seen[-1][4]
    assert (ctx.uid, ctx.gid, ctx.pid) == (1000, 1001, 1002)
    assert (await k.ask(LSEEK, struct.pack("=QQII", 1, 2, os.SEEK_HOLE, 0))).body == struct.pack("=Q", 7)
    assert seen[-1] == (1, 2, os.SEEK_HOLE)
    assert (await k.ask(LSEEK, struct.pack("=QQII", 1, 2, os.SEEK_SET, 0))).error == errno.EINVAL
    huge = struct.pack("=QQQQQQQ", 1, 2, 99, 3, 4, 1 << 40, 0)
    assert (await k.ask(COPY, huge)).body == struct.pack("=II", 7, 0)
    assert seen[-1] == (1, 2, 3, 4, 0xFFFFF000, 0)  # what its answer can report
    assert (await k.ask(COPY_64, huge)).body == struct.pack("=Q", 7)
    assert seen[-1] == (1, 2, 3, 4, 1 << 40, 0)


@scenario
async def handlers_that_fail(k: Kernel) -> None:
    async def refuse(*_args: object) -> None:
        raise pyfuse3.FUSEError(errno.ENOSPC)

    async def break_down(*_args: object) -> None:
        raise ValueError("on purpose")

    k.operations.on["fallocate"] = refuse
    assert (await k.ask(FALLOCATE, fallocate_body())).error == errno.ENOSPC
    k.operations.on["fallocate"] = break_down
    assert (await k.ask(FALLOCATE, fallocate_body())).error == errno.EIO
    k.operations.on["copy_file_range"] = 8
    assert (await k.ask(COPY, struct.pack("=QQQQQQQ", 1, 2, 99, 3, 4, 7, 0))).error == errno.EIO
    k.operations.on["open"] = "no FileInfo"
    assert (await k.ask(OPEN, bytes(8))).error == errno.EIO
    for short in range(0, 32, 3):
        assert (await k.ask(FALLOCATE, bytes(short))).error == errno.EIO
    logged = [record.getMessage() for record in LOG.records]
    assert len(logged) == 14 and all("FUSE opcode" in line for line in logged), logged


@before_session
async def cancelled_and_closed(k: Kernel) -> None:
    async with trio.open_nursery() as k.nursery:
        k.post_init()
        k.begin()
        await k.read()
        await serve_while(k, cancel_handlers)


async def cancel_handlers(k: Kernel) -> None:
    k.operations.on["fallocate"] = forever
    unique = k.post(FALLOCATE, fallocate_body())
    await k.settle()
    k.nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        assert await k.read() == Reply(unique, errno.EIO, b"")


@before_session
async def nobody_to_serve(k: Kernel) -> None:
    async with trio.open_nursery() as k.nursery:
        k.post_init()
        k.begin()
        await k.read()
    await serve_while(k, ask_in_vain)


async def ask_in_vain(k: Kernel) -> None:
    with unraisable() as found:
        assert (await k.ask(FALLOCATE, fallocate_body())).error == errno.EIO
    assert found == ["Nursery is closed to new arrivals"]


@contextlib.contextmanager
def unraisable() -> Iterator[list[str]]:
    found: list[str] = []
    sys.unraisablehook, before = lambda args: found.append(str(args.exc_value)), sys.unraisablehook
    yield found
    sys.unraisablehook = before


@before_session
async def missing_handlers(k: Kernel) -> None:
    k.operations = pyfuse3.Operations()  # type: ignore[assignment]
    k.post_init()
    k.begin()
    await k.read()
    assert k.requests.opcodes == 1 << OPEN | 1 << CREATE  # pyfuse3's own, which refuse
    await serve_while(k, all_unknown)


async def all_unknown(k: Kernel) -> None:
    for opcode in (FALLOCATE, LSEEK, COPY, COPY_64, 52, 63, 64, 99, 107, 0xFFFFFFFF):
        assert (await k.ask(opcode, bytes(64))).error == errno.ENOSYS


@before_session
async def handlers_that_answer_at_once(k: Kernel) -> None:
    """They are called with the request, before pyfuse3 gets any that came later, and take no task."""
    a_time = 1_700_000_000_123_456_789
    found = Attributes(7, 3, 1.5, 2, 99, 8, a_time, -1, 0, 0o100644, 2, 12, 34, 56, 4096)

    class AtOnce(Operations):
        answers_at_once = True

        def lookup_at_once(self, parent: int, name: bytes) -> Attributes:
            assert (parent, name) == (5, b"a name")
            return found

        def getattr_at_once(self, node: int) -> Attributes:
            if node == 6:
                raise pyfuse3.FUSEError(errno.ESTALE)
            if node == 7:
                raise ValueError("seven")
            return found

    k.operations = AtOnce()
    k.post_init()
    k.begin()
    await k.read()
    await serve_while(k, ask_at_once)
    for answers in (False, True):
        AtOnce.answers_at_once = answers
        opcodes = Requests(k.operations, k.nursery).opcodes
        assert bool(opcodes >> LOOKUP & 1) == bool(opcodes >> GETATTR & 1) == answers


async def ask_at_once(k: Kernel) -> None:
    second, nanosecond = 1_700_000_000, 123_456_789
    attr = [7, 99, 8, second, (1 << 64) - 1, 0, nanosecond, 999_999_999, 0, 0o100644, 2, 12, 34, 56, 4096, 0]
    tasks = len(k.nursery.child_tasks)
    entry = (await k.ask(LOOKUP, b"a name\0")).body
    assert [*struct.unpack("=QQQQII6Q10I", entry)] == [7, 3, 1, 2, 500_000_000, 0, *attr]
    assert [*struct.unpack("=QII6Q10I", (await k.ask(GETATTR, bytes(16))).body)] == [2, 0, 0, *attr]
    assert (await k.ask(GETATTR, bytes(16), node=6)).error == errno.ESTALE
    assert (await k.ask(GETATTR, bytes(16), node=7)).error == errno.EIO
    assert len(k.nursery.child_tasks) == tasks
    assert "seven" in [str(each.exc_info[1]) for each in LOG.records if each.exc_info]


@scenario
async def interrupts(k: Kernel) -> None:
    go_on = trio.Event()

    async def wait(*_args: object) -> None:
        await go_on.wait()

    k.operations.on["fallocate"] = wait
    unique = k.post(FALLOCATE, fallocate_body())
    for _ in range(1000):
        k.post(INTERRUPT, struct.pack("=Q", unique), unique=unique | 1)
    k.operations.on["opendir"] = 1
    for _ in range(3):
        await k.ask(OPENDIR, bytes(8))  # with it libfuse would answer an interrupt that it was left with
    go_on.set()
    assert await k.read() == Reply(unique, 0, b"")
    # Nor does it get those for requests that nobody knows, or such as are too short.
    k.post(INTERRUPT, struct.pack("=Q", unique), unique=unique | 1)
    k.post(INTERRUPT, b"", unique=5)
    for _ in range(3):
        await k.ask(OPENDIR, bytes(8))


@scenario
async def each_is_answered_once(k: Kernel) -> None:
    async def later(*_args: object) -> pyfuse3.FileInfo:
        for _ in range(random.randrange(5)):
            await trio.lowlevel.checkpoint()
        return pyfuse3.FileInfo(fh=1 | 2 << 32)

    k.operations.on |= {"fallocate": later, "open": later, "lseek": 9}
    kinds: dict[int, int] = {}
    seen: set[int] = set()

    async def collect() -> None:
        while len(seen) < 3000:
            reply = await k.read()
            assert reply.error == 0
            assert reply.unique not in seen
            seen.add(reply.unique)
            size = {FALLOCATE: 0, OPEN: 16, LSEEK: 8}[kinds[reply.unique]]
            assert len(reply.body) == size
            if size == 16:
                assert open_out(reply.body) == (1, PASSTHROUGH, 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect)
        for number in range(3000):
            opcode = random.choice((FALLOCATE, OPEN, LSEEK))
            body = struct.pack("=QQII", 1, 2, os.SEEK_DATA, 0) if opcode == LSEEK else bytes(32)
            kinds[number * 2 + 100] = opcode
            k.post(opcode, body, unique=number * 2 + 100)
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()
    assert k.read_now() is None
    assert seen == set(kinds)


@scenario
async def replies_that_must_not_be(k: Kernel) -> None:
    def reply(unique: int, error: int = 0) -> int | None:
        with pytest.raises(OSError) as failure:
            _shim.reply(unique, error, b"")
        return failure.value.errno

    k.operations.on |= {"fallocate": forever, "setattr": forever}
    mine, theirs = k.post(FALLOCATE, fallocate_body()), k.post(SETATTR, bytes(88))
    await k.settle()
    assert reply(12345) == errno.ESRCH
    assert reply(theirs) == errno.ESRCH
    assert reply(mine, -1) == reply(mine, 512) == errno.EINVAL
    _shim.reply(mine, errno.ENOSPC, b"not sent with an error")
    assert reply(mine) == errno.ESRCH
    assert await k.read() == Reply(mine, errno.ENOSPC, b"")
    assert k.read_now() is None


@before_session
async def a_reply_after_the_end(k: Kernel) -> None:
    k.post_init()
    k.begin()
    await k.read()
    k.operations.on["fallocate"] = forever
    k.post(FALLOCATE, fallocate_body(), unique=50)
    await serve_while(k, Kernel.settle)
    pyfuse3.close(unmount=False)
    other, written = os.memfd_create("other"), k.fuse_fd
    if other != written:
        os.dup2(other, written)  # the number is another file's now
    with pytest.raises(OSError) as failure:
        _shim.reply(50, 0, b"")
    assert failure.value.errno == errno.ENODEV
    assert os.fstat(other).st_size == 0
    with pytest.raises(LockfsError, match="not ours"):
        session.negotiated()
    k.fuse_fd = -1


# What handlers are told ------------------------------------------------------------------------------------------------


@scenario
async def suid_must_go(k: Kernel) -> None:
    k.operations.on |= {
        "setattr": pyfuse3.EntryAttributes(), "open": pyfuse3.FileInfo(fh=1), "create": pyfuse3.FileInfo(fh=1),
        "write": 3,
    }  # fmt: skip
    for kill in (True, False):
        setattr_in = struct.pack("=I", 1 << 3 | kill << 11) + bytes(84)
        write_in = struct.pack("=QQIIQII", 1, 0, 3, kill << 2, 0, 0, 0) + b"abc"
        for opcode, body in (
            (SETATTR, setattr_in),
            (OPEN, struct.pack("=II", 0, kill)),
            (CREATE, struct.pack("=IIII", 0, 0o644, 0, kill) + b"name\0"),
            (WRITE, write_in),
        ):
            reply = await k.ask(opcode, body)
            assert reply.error == 0
            assert k.operations.current[-1] == session.Current(opcode, reply.unique, kill)
    # A SETATTR that sets nothing, whatever it says about handle and lock owner, is for the bits alone.
    for valid in (0, 1 << 6, 1 << 6 | 1 << 9):
        await k.ask(SETATTR, struct.pack("=I", valid) + bytes(84))
        assert k.operations.current[-1].kill_suidgid


@scenario
async def the_largest_write(k: Kernel) -> None:
    (max_write,) = struct.unpack_from("=I", k.answer_to_init.body, 20)
    assert max_write >= 1 << 17
    data = os.urandom(max_write)

    async def see(fh: int, offset: int, got: bytes) -> int:
        assert (fh, offset, got) == (1, 7, data)
        return len(got)

    k.operations.on["write"] = see
    write_in = struct.pack("=QQIIQII", 1, 7, max_write, 0, 0, 0, 0)
    assert (await k.ask(WRITE, write_in + data)).body == struct.pack("=II", max_write, 0)


@scenario
async def notifications_from_a_thread(k: Kernel) -> None:
    await trio.to_thread.run_sync(pyfuse3.invalidate_inode, 5, True)
    reply = await k.read()
    assert (reply.unique, reply.error) == (0, 2)
