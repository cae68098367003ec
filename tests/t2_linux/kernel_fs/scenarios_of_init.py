"""What INIT agrees on, and sessions that do not start or start again."""

from __future__ import annotations

import errno
import os
import struct

import pyfuse3
import pytest
from fake_kernel import INIT, LOOKUP, NEW, OLD, OPEN, PASSTHROUGH, SETATTR, Kernel, before_session, serve_while

from lockfs.errors import MountError
from lockfs.kernel import _shim, session, wire


@before_session
async def init_of_a_new_kernel(k: Kernel) -> None:
    unique = k.post_init()
    agreed = k.begin()
    reply = await k.read()
    assert (reply.unique, reply.error) == (unique, 0)
    (flags,) = struct.unpack_from("=I", reply.body, 12)
    background, congestion = struct.unpack_from("=HH", reply.body, 16)
    flags2, depth = struct.unpack_from("=II", reply.body, 32)
    assert (background, congestion, depth) == (1000, 750, 1)
    assert flags & wire.INIT_EXT and flags & wire.DONT_MASK and flags & wire.HANDLE_KILLPRIV_V2
    assert flags | flags2 << 32 == agreed.granted
    assert (agreed.major, agreed.minor, agreed.offered) == (7, 45, NEW)
    assert agreed.passthrough and agreed.dont_mask and agreed.kill_suidgid
    assert agreed == session.negotiated()


@before_session
async def init_of_an_old_kernel(k: Kernel) -> None:
    k.post_init(OLD & ~wire.HANDLE_KILLPRIV_V2, minor=31)
    agreed = k.begin()
    reply = await k.read()
    assert (agreed.passthrough, agreed.kill_suidgid, agreed.dont_mask) == (False, False, True)
    assert struct.unpack_from("=II", reply.body, 32) == (0, 0)  # flags2, max_stack_depth
    assert agreed.granted & ~agreed.offered == 0


@before_session
async def init_of_a_very_old_kernel(k: Kernel) -> None:
    """Before 5.17 its INIT ended with the first 32 flags."""
    k.post(INIT, struct.pack("=IIII", 7, 31, 1 << 17, OLD & ~wire.INIT_EXT), node=0)
    agreed = k.begin()
    assert (await k.read()).error == 0
    assert (agreed.offered, agreed.passthrough) == (OLD & ~wire.INIT_EXT, False)


@before_session
async def init_without_wishes(k: Kernel) -> None:
    k.post_init()
    agreed = k.begin(session.Settings(flags=0, max_background=0, congestion_threshold=0))
    reply = await k.read()
    assert not (agreed.passthrough or agreed.kill_suidgid or agreed.dont_mask)
    assert struct.unpack_from("=HH", reply.body, 16) == (0, 0)


@before_session
async def no_init(k: Kernel) -> None:
    assert "has sent no INIT" in refused(k)


@before_session
async def init_of_another_protocol(k: Kernel) -> None:
    k.post_init(major=6)
    assert "do not agree" in refused(k)
    assert (await k.read()).error == errno.EPROTO


@before_session
async def another_request_first(k: Kernel) -> None:
    k.post(LOOKUP, b"name".ljust(64, b"\0"))
    assert "do not agree" in refused(k)
    assert (await k.read()).error == errno.EIO


@before_session
async def a_shorter_request_first(k: Kernel) -> None:
    k.post(LOOKUP, b"name\0")
    assert "is no INIT request" in refused(k)


@before_session
async def the_descriptor_is_itself_again(k: Kernel) -> None:
    """While libfuse answers INIT its descriptor is another; then it is what it was, flags and all."""
    before = os.fstat(k.fuse_fd)
    open_files = len(os.listdir("/proc/self/fd"))
    for inheritable in (True, False):
        os.set_inheritable(k.fuse_fd, inheritable)
        k.post_init(major=6)
        refused(k)
        assert os.get_inheritable(k.fuse_fd) is inheritable
        assert os.path.samestat(os.fstat(k.fuse_fd), before)
        await k.read()
    assert len(os.listdir("/proc/self/fd")) == open_files


def refused(k: Kernel) -> str:
    with pytest.raises(MountError) as refusal:
        k.begin()
    assert os.fstat(k.fuse_fd)  # still ours
    assert _shim.session() is None
    return str(refusal.value)


@before_session
async def resume(k: Kernel) -> None:
    k.post_init()
    saved = k.begin().init
    await k.read()
    pyfuse3.close(unmount=False)
    again = Kernel()
    again.nursery = k.nursery
    agreed = again.begin(resume=saved)
    assert again.read_now() is None, "the kernel got a second answer to INIT"
    assert agreed == k.agreed
    k.fuse_fd, k.operations = again.fuse_fd, again.operations
    k.socket.close()
    k.socket = again.socket
    await serve_while(k, numbers_of_requests_sent_again)


async def numbers_of_requests_sent_again(k: Kernel) -> None:
    k.operations.on |= {"setattr": pyfuse3.EntryAttributes(), "open": pyfuse3.FileInfo(fh=3 | 9 << 32)}
    unique = 1 << 63 | 77
    assert (await k.ask(OPEN, bytes(8), unique)).body[8:] == struct.pack("=Ii", PASSTHROUGH, 9)
    assert (await k.ask(SETATTR, bytes(88), unique)).error == 0
    assert [each.unique for each in k.operations.current] == [unique, unique]
