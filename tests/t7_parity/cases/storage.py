"""Storage that is full or read-only: the caller gets the storage's own errno, and nothing is half done."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct

from harness.waiting import wait_until
from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.things import become, make, read, write

CHUNK = 1 << 16
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
IMMUTABLE, APPEND_ONLY = 0x10, 0x20


def fill(name: str) -> int:
    """Write until nothing fits any more; return the errno that said so."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (CHUNK, 512):
            while True:
                try:
                    os.write(fd, b"f" * size)
                    os.fsync(fd)
                except OSError as error:
                    code = error.errno or 0
                    break
        return code
    finally:
        os.close(fd)


def when_full(r: Recorder, step: str) -> None:
    """Do one thing on a full filesystem that holds the files small and large."""
    fd, large = os.open("small", os.O_RDWR), os.open("large", os.O_RDWR)
    if step == "create":
        fill_names(r)
    elif step == "mkdir":
        r("mkdir", os.mkdir, "d")
    elif step == "symlink":
        r("symlink", os.symlink, "t" * 1000, "link")
    elif step == "grow":
        r("write", os.pwrite, fd, b"x" * (1 << 20), 0)
        r("fsync", os.fsync, fd)
        r("overwrite", os.pwrite, large, b"x" * 1000, 0)
        r("fsync", os.fsync, large)
    elif step == "xattr":
        r("set", os.setxattr, "small", "user.x", b"v" * 3000)
    elif step == "mapping":
        with mmap.mmap(large, 1 << 20) as mapping:
            mapping[100:105] = b"hello"
            r("flush", mapping.flush)
    elif step == "copy":
        r("copy", os.copy_file_range, large, fd, 1 << 20)
    elif step == "rename":
        r("rename", os.rename, "small", "moved")
        r("unlink", os.unlink, "large")
        r("write", os.write, fd, b"fits again")
        r("fsync", os.fsync, fd)
    elif step == "truncate":
        r("truncate up", os.ftruncate, fd, 1 << 20)
        r("truncate down", os.ftruncate, large, 10)
        r("write in the hole", os.pwrite, fd, b"x", 1 << 19)
    elif step == "read":
        r("read", os.pread, fd, 100, 0)
        r("list", lambda: sorted(os.listdir(".")))
    os.close(fd)
    os.close(large)


@case(
    on="small",
    step=("create", "mkdir", "symlink", "grow", "xattr", "mapping", "copy", "rename", "truncate", "read"),
)
def full(r: Recorder, step: str) -> None:
    before = os.fstatvfs(r.backing)
    write("small", b"0123456789")
    write("large", bytes(range(256)) * 4096)
    try:
        r.note("filled", errno.errorcode[fill("filling")])
        when_full(r, step)
    finally:
        for name in os.listdir("."):
            if not os.path.isdir(name):
                os.unlink(name)

    def is_free_again() -> bool:
        now = os.fstatvfs(r.backing)
        return now.f_bfree >= before.f_bfree - 8 and now.f_ffree >= before.f_ffree - 1

    # The daemon hears of a close a little later than the caller.
    r.note("all space is free again", wait_until(is_free_again, 10, "the space of removed files"))


def fill_names(r: Recorder) -> None:
    """Make files until the inodes run out too, then see that removing one makes room for one."""
    made = 0
    while not r.refuses(os.mknod, f"name-{made}", 0o100644):
        made += 1
    r("one more", os.mknod, "one-more", 0o100644)
    r("open one more", os.open, "one-more", os.O_CREAT | os.O_RDWR)
    os.unlink("name-0")
    r("now it fits", os.mknod, "one-more", 0o100644)


def make_behind(r: Recorder, kind: str) -> None:
    """Make something where the storage can be written."""
    here = os.open(".", os.O_RDONLY)
    os.fchdir(r.backing)
    make(kind, "it", 0o666)
    os.fchdir(here)
    os.close(here)


@case(on="readonly", kind=("file", "dir", "symlink", "fifo", "missing"), user=(False, True))
def read_only(r: Recorder, kind: str, user: bool) -> None:
    make_behind(r, kind)
    if user:
        become(65534)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC):
        r.open(f"open {flags:o}", "it", flags | os.O_NONBLOCK)
    for flags in (os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_RDWR):
        r.open(f"open existing {flags:o}", "it", flags | os.O_NONBLOCK)
        r.open(f"open new {flags:o}", "new", flags)
    r("mkdir", os.mkdir, "new")
    r("mkdir existing", os.mkdir, "it")
    r("mkfifo", os.mkfifo, "new")
    r("symlink", os.symlink, "x", "new")
    r("link", os.link, "it", "new")
    r("rename", os.rename, "it", "new")
    r("unlink", os.unlink, "it")
    r("rmdir", os.rmdir, "it")
    r("chmod", os.chmod, "it", 0o600)
    r("chown", os.chown, "it", 0, 0)
    r("utime", os.utime, "it")
    r("truncate", os.truncate, "it", 0)
    r("setxattr", os.setxattr, "it", "user.x", b"y")
    r("removexattr", os.removexattr, "it", "user.x")
    r.note("access for writing", os.access("it", os.W_OK))
    r.stat("stat", "it")
    r("list", lambda: sorted(os.listdir(".")))


@case(flag=(IMMUTABLE, APPEND_ONLY), kind=("file", "dir"))
def protected(r: Recorder, flag: int, kind: str) -> None:
    make(kind, "it")
    make("file", "other")
    if kind == "dir":
        write("it/inside", b"x")
    before = os.open("it", os.O_RDONLY if kind == "dir" else os.O_RDWR)
    fd = os.open("it", os.O_RDONLY, dir_fd=r.backing)
    flags = struct.unpack("<I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4)))[0]
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<I", flags | flag))
    try:
        for access in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC):
            opened = r.open(f"open {access:o}", "it", access)
            if opened is not None and access & os.O_ACCMODE:
                r("write", os.write, opened, b"appended")
                r("ftruncate", os.ftruncate, opened, 0)
        r("write to one opened before", os.write, before, b"w")
        r("chmod", os.chmod, "it", 0o600)
        r("chown", os.chown, "it", 1, 1)
        r("utime", os.utime, "it", ns=(1, 1))
        r("truncate", os.truncate, "it", 1)
        r("setxattr", os.setxattr, "it", "user.x", b"y")
        r("link", os.link, "it", "new")
        r("rename", os.rename, "it", "new")
        r("replace", os.rename, "other", "it")
        r("unlink", os.unlink, "it")
        r("rmdir", os.rmdir, "it")
        r("create inside", os.mkdir, "it/new")
        r("remove inside", os.unlink, "it/inside")
        r("rename inside", os.rename, "it/inside", "it/renamed")
    finally:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<I", flags))
    if kind == "file":
        r("content", read, "it")
