"""A filesystem of one directory of files, with everything that `lockfs.kernel` offers and nothing else.

Run as a program: ``minifs.py SOURCE FUSE_FD OPTIONS``, where FUSE_FD is mounted already.  Writes one line of JSON to
standard output when it serves, or failed to, and one with its statistics when it was unmounted.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shim

if "early" in sys.argv[3:]:
    import pyfuse3  # the wrong order: what it calls is bound to libfuse now

    shim.take_other_build()
else:
    shim.load()

import pyfuse3
import trio

from lockfs import kernel
from lockfs.errors import LockfsError
from lockfs.kernel import backing, device, session
from lockfs.kernel.extra import Requests

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
STATISTICS = b"user.statistics"


def checked(result: int) -> None:
    if result < 0:
        raise pyfuse3.FUSEError(ctypes.get_errno())


def somebody_waited(record: logging.LogRecord) -> bool:
    """Tell whether pyfuse3 has anything to say but that a request was dropped before it was answered."""
    return record.args != (os.strerror(errno.ENOENT),)


logging.getLogger("pyfuse3").addFilter(somebody_waited)


class MiniFS(pyfuse3.Operations):
    """Counts what it is asked.  Node ids are the inode numbers of the source, so that a successor knows them too."""

    enable_acl = True

    def __init__(self, source: str, options: dict[str, object]) -> None:
        self.source = source
        self.options = options
        self.counts: Counter[str] = Counter()
        self.files: dict[int, int] = {}
        self.nodes: dict[int, str] = {}
        self.backing: backing.Backing
        self.fuse_fd = -1
        self.next_index = 0
        self.handle_node: dict[int, int] = {}

    def path(self, node: int) -> str:
        if node == pyfuse3.ROOT_INODE:
            return self.source
        if node not in self.nodes:
            self.nodes |= {entry.inode(): entry.name for entry in os.scandir(self.source)}
        try:
            return os.path.join(self.source, self.nodes[node])
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    def entry(self, node: int, path: str | int) -> pyfuse3.EntryAttributes:
        found = os.stat(path)
        entry = pyfuse3.EntryAttributes()
        for name in ("mode", "nlink", "uid", "gid", "size", "blocks", "atime_ns", "mtime_ns", "ctime_ns"):
            setattr(entry, f"st_{name}", getattr(found, f"st_{name}"))
        entry.st_ino = node
        entry.entry_timeout = 0
        entry.attr_timeout = 0
        return entry

    async def lookup(self, parent_inode, name, ctx=None):
        self.counts["lookup"] += 1
        path = os.path.join(self.source, os.fsdecode(name))
        try:
            node = os.stat(path).st_ino
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        self.nodes[node] = os.fsdecode(name)
        return self.entry(node, path)

    async def getattr(self, inode, ctx=None):
        self.counts["getattr"] += 1
        return self.entry(inode, self.path(inode))

    async def setattr(self, inode, attr, fields, fh, ctx):
        current = session.current()
        self.counts["setattr"] += 1
        path = self.path(inode)
        if current.kill_suidgid:
            self.clear_suidgid(path)
        if fields.update_size:
            os.truncate(path, attr.st_size)
        if fields.update_mode:
            os.chmod(path, stat.S_IMODE(attr.st_mode))
        if fields.update_atime or fields.update_mtime:
            os.utime(path, ns=(attr.st_atime_ns, attr.st_mtime_ns))
        return self.entry(inode, path)

    def clear_suidgid(self, path: str) -> None:
        self.counts["kill"] += 1
        mode = stat.S_IMODE(os.stat(path).st_mode)
        drop = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
        if mode & drop:
            os.chmod(path, mode & ~drop)

    async def open(self, inode, flags, ctx):
        current = session.current()
        self.counts["open"] += 1
        path = self.path(inode)
        if current.kill_suidgid:
            self.clear_suidgid(path)
        return self.opened(inode, os.open(path, flags & (os.O_ACCMODE | os.O_TRUNC)))

    async def create(self, parent_inode, name, mode, flags, ctx):
        self.counts["create"] += 1
        path = os.path.join(self.source, os.fsdecode(name))
        before = os.umask(ctx.umask)  # heeded by the storage where there is no default ACL
        fd = os.open(path, os.O_CREAT | flags & (os.O_ACCMODE | os.O_TRUNC), mode)
        os.umask(before)
        node = os.fstat(fd).st_ino
        self.nodes[node] = os.fsdecode(name)
        return self.opened(node, fd), self.entry(node, fd)

    def opened(self, node: int, fd: int) -> pyfuse3.FileInfo:
        backing_id = self.backing.open(node, fd, wanted=not self.options.get("plain"))
        self.next_index += 1
        self.files[self.next_index] = fd
        self.handle_node[self.next_index] = node
        fh = session.mint(self.next_index, backing_id)
        # Flags that must not reach the kernel together with a backing id.
        return pyfuse3.FileInfo(fh=fh, keep_cache=True, nonseekable=bool(backing_id))

    async def release(self, fh):
        self.counts["release"] += 1
        if fh in self.files:  # not one of a predecessor
            os.close(self.files.pop(fh))
            self.backing.close(self.handle_node.pop(fh))

    async def read(self, fh, off, size):
        self.counts["read"] += 1
        return os.pread(self.files[fh], size, off)

    async def write(self, fh, off, buf):
        current = session.current()
        self.counts["write"] += 1
        if current.kill_suidgid:
            self.clear_suidgid(self.path(self.handle_node[fh]))
        return os.pwrite(self.files[fh], buf, off)

    async def fsync(self, fh, datasync):
        os.fsync(self.files[fh])

    async def forget(self, inode_list):
        self.counts["forget"] += len(inode_list)

    async def unlink(self, parent_inode, name, ctx):
        os.unlink(os.path.join(self.source, os.fsdecode(name)))

    async def opendir(self, inode, ctx):
        return 0

    async def readdir(self, fh, start_id, token):
        for number, name in enumerate(sorted(os.listdir(self.source)), 1):
            if number > start_id:
                path = os.path.join(self.source, name)
                node = os.stat(path).st_ino
                self.nodes[node] = name
                if not pyfuse3.readdir_reply(token, os.fsencode(name), self.entry(node, path), number):
                    break

    async def getxattr(self, inode, name, ctx):
        self.counts["getxattr"] += 1
        if name == STATISTICS:
            return json.dumps(self.counts).encode()
        try:
            return os.getxattr(self.path(inode), name)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def setxattr(self, inode, name, value, ctx):
        if name == b"user.plain":
            self.options["plain"] = value == b"1"
        elif name == b"user.prune":
            await trio.to_thread.run_sync(device.notify_prune, self.fuse_fd, [int(value)])
        elif name == b"user.invalidate":
            known = await trio.to_thread.run_sync(device.notify_inval_inode, self.fuse_fd, int(value), 0)
            self.counts["invalidated"] += known
        else:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def fallocate(self, fh, mode, offset, length, ctx):
        self.counts["fallocate"] += 1
        assert ctx.pid > 0
        checked(libc.fallocate(self.files[fh], mode, offset, length))

    async def lseek(self, fh, offset, whence):
        self.counts["lseek"] += 1
        try:
            return os.lseek(self.files[fh], offset, whence)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def copy_file_range(self, fh_in, off_in, fh_out, off_out, length, flags):
        self.counts["copy_file_range"] += 1
        await trio.sleep(float(self.options.get("slow", 0)))
        if self.options.get("broken"):
            raise RuntimeError("this handler is broken on purpose")
        if fh_in not in self.files:  # a predecessor's
            return 0
        return os.copy_file_range(self.files[fh_in], self.files[fh_out], length, off_in, off_out)


def count_calls(operations: MiniFS) -> None:
    """Count the calls of backing_open and backing_close that did something."""

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(device, name)

        def call(*args: int) -> Any:
            result = real(*args)
            operations.counts[name] += 1
            return result

        return call

    for name in ("backing_open", "backing_close"):
        setattr(device, name, counted(name))


def tick(operations: MiniFS) -> None:
    """Count the hundredths of a second in which threads of this process could run."""
    while True:
        time.sleep(0.01)
        operations.counts["ticks"] += 1


def lie_about_readability() -> None:
    """Make every other wait for the device return at once, as if the request had gone between poll and read."""
    real = trio.lowlevel.wait_readable
    calls = 0

    async def wait_readable(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            await trio.lowlevel.checkpoint()
        else:
            await real(fd)

    trio.lowlevel.wait_readable = wait_readable


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def main(source: str, fuse_fd: int, options: dict[str, object]) -> None:
    operations = MiniFS(source, options)
    count_calls(operations)
    async with trio.open_nursery() as nursery:
        try:
            requests = Requests(operations, nursery)
            resume = bytes.fromhex(str(options.get("resume", "")))
            settings = session.Settings()
            if "flags" in options:
                settings = session.Settings(flags=int(str(options["flags"])))
            agreed = session.begin(operations, fuse_fd, requests, settings, resume)
        except LockfsError as error:
            say(error=str(error), why_not=kernel.why_not())
            return
        operations.fuse_fd = fuse_fd
        operations.backing = backing.Backing(fuse_fd, enabled=agreed.passthrough)
        if options.get("lie"):
            lie_about_readability()
            threading.Thread(target=tick, args=[operations], daemon=True).start()
        say(
            version=[agreed.major, agreed.minor], offered=agreed.offered, granted=agreed.granted,
            init=agreed.init.hex(),
        )  # fmt: skip
        if resume:
            nursery.start_soon(trio.to_thread.run_sync, device.notify_resend, fuse_fd)
        await pyfuse3.main(max_tasks=1000)
        nursery.cancel_scope.cancel()
    pyfuse3.close(unmount=False)
    say(**operations.counts)


if __name__ == "__main__":
    given = json.loads(sys.argv[3])
    kernel.load()
    if given.get("force"):
        kernel._why_not = None  # so that only the last check is left
        from lockfs.kernel import _shim

        _shim.bind(pyfuse3.__file__)
    os.umask(0)
    trio.run(main, str(Path(sys.argv[1])), int(sys.argv[2]), given)
