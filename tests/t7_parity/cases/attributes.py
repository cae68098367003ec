"""Modes, owners, sizes and times: who may set them, and what else changes them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.syscalls import (
    AT_SYMLINK_NOFOLLOW,
    UTIME_NOW,
    UTIME_OMIT,
    chmod_nofollow,
    truncate,
    utimens,
)
from t7_parity.things import EXTRA_GROUP, GROUP, KINDS, OLD, OTHER, USER, aside, become, make, read, write

MODES = (0, 0o400, 0o644, 0o777, 0o1777, 0o2755, 0o2745, 0o4755, 0o4711, 0o6777, 0o7777, 0o10644)
WHO = {
    "root": (0, 0, ()),
    "owner": (USER, GROUP, ()),
    "owner-outside-group": (USER, OTHER, ()),
    "owner-with-extra": (USER, GROUP, (EXTRA_GROUP,)),
    "other": (OTHER, OTHER, ()),
}


def be(who: str) -> None:
    """Become one of `WHO`; root stays root with all capabilities."""
    if who != "root":
        become(*WHO[who])


@case(kind=(*KINDS, "socket", "device"), who=tuple(WHO))
def chmod(r: Recorder, kind: str, who: str) -> None:
    make(kind, "it")
    if kind != "missing":
        os.chown("it", USER, GROUP, follow_symlinks=False)
    be(who)
    for mode in MODES:
        r(f"chmod {mode:o}", os.chmod, "it", mode)
        r.stat(f"after {mode:o}", "it")
    r("nofollow", chmod_nofollow, "it", 0o640)
    r.stat("nofollow", "it")


@case(kind=("file", "dir", "symlink", "fifo"), who=tuple(WHO), mode=(0o644, 0o4755, 0o2755, 0o2745, 0o6777))
def chown(r: Recorder, kind: str, who: str, mode: int) -> None:
    for uid in (-1, 0, USER, OTHER):
        for gid in (-1, 0, GROUP, EXTRA_GROUP):
            make(kind, f"{uid}:{gid}")
            os.chown(f"{uid}:{gid}", USER, GROUP, follow_symlinks=False)
            if kind != "symlink":
                os.chmod(f"{uid}:{gid}", mode)
    be(who)
    for uid in (-1, 0, USER, OTHER):
        for gid in (-1, 0, GROUP, EXTRA_GROUP):
            r(f"{uid}:{gid}", os.chown, f"{uid}:{gid}", uid, gid, follow_symlinks=False)
            r.stat(f"{uid}:{gid} then", f"{uid}:{gid}")


@case(kind=("symlink", "dirlink", "dangling"), follow=(True, False))
def chown_of_links(r: Recorder, kind: str, follow: bool) -> None:
    make(kind, "it")
    r("chown", os.chown, "it", USER, GROUP, follow_symlinks=follow)
    r.stat("link", "it")
    r.stat("target", "it-target")


@case(uid=(0, 1, 65535, 65536, 2**31, 2**32 - 2))
def chown_large_ids(r: Recorder, uid: int) -> None:
    make("file", "it")
    r("chown", os.chown, "it", uid, uid)
    r.stat("then", "it")


def by_write(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    os.write(fd, b"y")
    os.close(fd)


def by_pwrite_nothing(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    os.write(fd, b"")
    os.close(fd)


def by_truncate(name: str) -> None:
    os.truncate(name, 3)


def by_same_truncate(name: str) -> None:
    os.truncate(name, 10)


def by_ftruncate(name: str) -> None:
    fd = os.open(name, os.O_RDWR)
    os.ftruncate(fd, 3)
    os.close(fd)


def by_open_truncate(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))


def by_chown_nothing(name: str) -> None:
    os.chown(name, -1, -1)


def by_chmod_same(name: str) -> None:
    os.chmod(name, os.stat(name).st_mode & 0o7777)


def by_utime(name: str) -> None:
    os.utime(name)


def by_xattr(name: str) -> None:
    os.setxattr(name, "user.x", b"y")


def by_link(name: str) -> None:
    os.link(name, name + "-second")


def by_rename(name: str) -> None:
    os.rename(name, name + "-renamed")
    os.rename(name + "-renamed", name)


def by_append(name: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"more")
    os.close(fd)


def by_read(name: str) -> None:
    read(name)


def by_copy(name: str) -> None:
    fd = os.open(name, os.O_RDWR)
    os.copy_file_range(fd, fd, 2, 0, 8)
    os.close(fd)


def by_nothing(name: str) -> None:
    os.close(os.open(name, os.O_RDWR))


CHANGES = (
    by_write, by_pwrite_nothing, by_truncate, by_same_truncate, by_ftruncate, by_open_truncate, by_chown_nothing,
    by_chmod_same, by_utime, by_xattr, by_link, by_rename, by_append, by_read, by_copy, by_nothing,
)  # fmt: skip


@case(change=CHANGES, uid=(0, USER))
def suid_and_sgid_after(r: Recorder, change: Callable[[str], None], uid: int) -> None:
    modes = (0o4777, 0o2777, 0o6777, 0o2767, 0o6767, 0o0777)
    os.chmod(".", 0o777)
    for mode in modes:
        write(f"{mode:o}", b"0123456789")
        os.chown(f"{mode:o}", OTHER if change is not by_chmod_same else uid, OTHER)
        os.chmod(f"{mode:o}", mode)
    if uid:
        become(uid)
    for mode in modes:
        r(f"{mode:o} by {change.__name__}", change, f"{mode:o}")
        r.stat(f"{mode:o} then", f"{mode:o}")


@case(change=CHANGES, size=(0, 10))
def times_after(r: Recorder, change: Callable[[str], None], size: int) -> None:
    with aside("d"):
        write("it", b"0123456789"[:size])
        utimens("it", (OLD, OLD))
    utimens("d", (OLD, OLD))
    before, before_dir = os.stat("d/it"), os.stat("d")
    r("change", change, "d/it")
    after, after_dir = os.stat("d/it"), os.stat("d")
    for which in ("st_mtime_ns", "st_ctime_ns"):
        r.note(f"{which} of the file changed", getattr(before, which) != getattr(after, which))
        r.note(f"{which} of the directory changed", getattr(before_dir, which) != getattr(after_dir, which))


@case(kind=("file", "dir", "symlink", "fifo"))
def times_of_directories(r: Recorder, kind: str) -> None:
    make("dir", "d", 0o755)
    make("dir", "e", 0o755)

    def step(label: str, function: Callable[..., object], *args: object) -> None:
        utimens("d", (OLD, OLD))
        utimens("e", (OLD, OLD))
        function(*args)
        r.note(label, [os.stat(name).st_mtime_ns == OLD[0] * 10**9 + OLD[1] for name in ("d", "e")])

    step("make", make, kind, "d/it")
    step("rename", os.rename, "d/it", "d/there")
    step("move", os.rename, "d/there", "e/it")
    step("stat", os.lstat, "e/it")
    step("list", os.listdir, "e")
    step("remove", os.rmdir if kind == "dir" else os.unlink, "e/it")


SIZES = (0, 1, 9, 10, 11, 4095, 4096, 4097, 1 << 20, (1 << 32) + 1, 1 << 43, (1 << 63) - 1, -1)


@case(size=SIZES, start=("empty", "file"))
def truncation(r: Recorder, size: int, start: str) -> None:
    make(start, "it")
    fd = os.open("it", os.O_RDWR)
    r("truncate", truncate, "it", size)
    r.stat("after truncate", "it")
    r("read", os.pread, fd, 5000, 0)
    r("ftruncate", os.ftruncate, fd, size)
    r("ftruncate to 20", os.ftruncate, fd, 20)
    r("read", os.pread, fd, 5000, 0)
    r("offset", os.lseek, fd, 0, os.SEEK_CUR)


@case(kind=KINDS)
def truncation_of(r: Recorder, kind: str) -> None:
    make(kind, "it")
    r("truncate", truncate, "it", 4)
    r.stat("it", "it")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_PATH):
        fd = r.open(f"open {flags:o}", "it", flags | os.O_NONBLOCK)
        if fd is not None:
            r(f"ftruncate {flags:o}", os.ftruncate, fd, 2)


@case(who=("owner", "other"), mode=(0o600, 0o400, 0o200, 0o666, 0o444))
def truncation_by(r: Recorder, who: str, mode: int) -> None:
    write("it", b"0123456789")
    os.chown("it", USER, GROUP)
    os.chmod("it", mode)
    be(who)
    r("truncate", truncate, "it", 4)
    r.stat("it", "it")


@case(limit=(0, 5, 15, 5000))
def size_limit(r: Recorder, limit: int) -> None:
    write("it", b"0123456789")
    fd = os.open("it", os.O_RDWR)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    r("write", os.pwrite, fd, b"x" * 8, 8)
    r("write far", os.pwrite, fd, b"x" * 8, 10000)
    r("ftruncate", os.ftruncate, fd, 4096)
    r("truncate", truncate, "it", 12)
    r("read", os.pread, fd, 100, 0)
    r.stat("it", fd)


NOW, OMIT = (0, UTIME_NOW), (0, UTIME_OMIT)
TIMES = (
    (OLD, OLD), (OLD, OMIT), (OMIT, OLD), (OMIT, OMIT), ((0, 0), (0, 1)), ((1, 999_999_999), (2, 500_000_001)),
    ((-1, 0), (-1, 999_999_999)), ((2**31 - 1, 0), (2**31, 0)), ((2**32, 7), (2**32 + 1, 8)),
    ((15_032_385_535, 0), (15_032_385_536, 0)), ((-(2**31), 0), (-(2**31) - 1, 0)), ((2**40, 0), (-(2**40), 0)),
    ((0, 1_000_000_000), (0, 0)), ((0, -1), (0, 0)),
)  # fmt: skip


@case(kind=(*KINDS, "socket"), follow=(True, False))
def utimensat(r: Recorder, kind: str, follow: bool) -> None:
    flags = 0 if follow else AT_SYMLINK_NOFOLLOW
    make(kind, "it")
    r("start", utimens, "it", ((5, 5), (6, 6)), flags)
    for number, times in enumerate(TIMES):
        r(f"set {number}", utimens, "it", times, flags)
        r(f"get {number}", lambda: (os.stat("it", follow_symlinks=follow).st_atime_ns, times_of("it", follow)))


def times_of(name: str, follow: bool) -> int:
    """Return the mtime in nanoseconds."""
    return os.stat(name, follow_symlinks=follow).st_mtime_ns


@case(who=tuple(WHO), mode=(0o600, 0o400, 0o666, 0o444))
def utimensat_by(r: Recorder, who: str, mode: int) -> None:
    names = ("now", "null", "explicit", "omit", "omit-both", "now-explicit")
    for name in names:
        write(name, b"x")
        os.chown(name, USER, GROUP)
        os.chmod(name, mode)
        utimens(name, ((7, 7), (8, 8)))
    be(who)
    for name, times in zip(
        names, ((NOW, NOW), None, (OLD, OLD), (NOW, OMIT), (OMIT, OMIT), (NOW, OLD)), strict=True
    ):
        r(name, utimens, name, times)
        status = os.stat(name)
        r.note(f"{name} then", [each if each < 1.6e18 else "now" for each in (status.st_atime_ns, status.st_mtime_ns)])


@case()
def times_through_a_descriptor(r: Recorder) -> None:
    write("it", b"x")
    for flags in (os.O_RDONLY, os.O_WRONLY):
        fd = os.open("it", flags)
        os.utime(fd, ns=(1, 2))
        r("times", lambda fd=fd: (os.fstat(fd).st_atime_ns, os.fstat(fd).st_mtime_ns))
    fd = os.open("it", os.O_RDWR)
    os.write(fd, b"dirty")
    os.utime(fd, ns=(3, 4))
    r("after a write", lambda: os.stat("it").st_mtime_ns)
    os.close(fd)
    r("after close", lambda: os.stat("it").st_mtime_ns)


@case()
def attributes_change_behind_the_mount(r: Recorder) -> None:
    write("it", b"0123456789")
    r.stat("before", "it")
    fd = os.open("it", os.O_RDWR, dir_fd=r.backing)
    os.fchmod(fd, 0o640)
    os.fchown(fd, USER, GROUP)
    os.ftruncate(fd, 5000)
    os.utime(fd, ns=(11, 12))
    r.stat("after", "it")
    r("times", lambda: (os.stat("it").st_atime_ns, os.stat("it").st_mtime_ns))
    os.setxattr(fd, "user.behind", b"yes")
    r("xattr", os.getxattr, "it", "user.behind")


@case(umask=(0, 0o077))
def statvfs(r: Recorder, umask: int) -> None:
    status = os.statvfs(".")
    for each in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        r.note(each, getattr(status, each))
    make("file", "it")
    r.note("of a file", os.statvfs("it").f_blocks)
    fd = os.open("it", os.O_RDONLY)
    r.note("of a descriptor", os.fstatvfs(fd).f_bsize)
    r("of nothing", os.statvfs, "missing")
