"""Whose new files are and what mode they get: umask, set-group-id directories, default ACLs, users."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.things import EXTRA_GROUP, GROUP, KINDS, USER, aside, become, make

MODES = (0, 0o400, 0o644, 0o666, 0o777, 0o4755, 0o2755, 0o2745, 0o6777, 0o1777)


def default_acl() -> bytes:
    """user::rwx user:1000:rwx group::r-x mask::rwx other::r-x, in the kernel's form."""
    entries = [(1, 7, 0xFFFFFFFF), (2, 7, USER), (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 5, 0xFFFFFFFF)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)


def by_open(name: str, mode: int) -> None:
    os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode))


def by_mknod(name: str, mode: int) -> None:
    os.mknod(name, 0o100000 | mode)


def by_mkfifo(name: str, mode: int) -> None:
    os.mkfifo(name, mode)


def by_mkdir(name: str, mode: int) -> None:
    os.mkdir(name, mode)


def by_bind(name: str, mode: int) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name)


def by_symlink(name: str, mode: int) -> None:
    os.symlink(oct(mode), name)


@case(
    how=(by_open, by_mknod, by_mkfifo, by_mkdir, by_bind, by_symlink),
    umask=(0, 0o022, 0o027, 0o077),
    where=("plain", "setgid", "acl", "setgid+acl"),
    uid=(0, USER),
)
def modes(r: Recorder, how: Callable[[str, int], None], umask: int, where: str, uid: int) -> None:
    os.chown(".", 0, EXTRA_GROUP)
    os.chmod(".", 0o777)
    if "acl" in where:
        os.setxattr(".", "system.posix_acl_default", default_acl())
    if "setgid" in where:
        os.chmod(".", 0o2777)
    os.umask(umask)
    if uid:
        become(uid)
    for mode in MODES:
        r(f"make {mode:o}", how, f"new-{mode:o}", mode)
        r.stat(f"stat {mode:o}", f"new-{mode:o}")


@case(kind=KINDS, how=(by_open, by_mknod, by_mkfifo, by_mkdir, by_bind, by_symlink))
def over_what_is_there(r: Recorder, kind: str, how: Callable[[str, int], None]) -> None:
    make(kind, "it")
    r("make", how, "it", 0o644)


@case(how=(by_open, by_mknod, by_mkfifo, by_mkdir, by_bind, by_symlink))
def in_odd_places(r: Recorder, how: Callable[[str, int], None]) -> None:
    make("file", "file")
    make("dir", "dir", 0o755)
    places = ("new/", "missing/new", "file/new", "dir/", "dir/.", "dir/..", ".", "..", "", "dir//new", "./dir/./new2")
    for name in places:
        r(f"make {name!r}", how, name, 0o755)


@case(
    kind=(0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000, 0, 0o170000),
    uid=(0, USER),
)
def nodes(r: Recorder, kind: int, uid: int) -> None:
    os.chmod(".", 0o777)
    if uid:
        become(uid)
    for number, device in enumerate((0, os.makedev(1, 3), os.makedev(8, 0), os.makedev(4095, 1048575))):
        r(f"mknod {number}", os.mknod, f"new-{number}", kind | 0o640, device)
        r.stat(f"stat {number}", f"new-{number}")


@case()
def a_device_works(r: Recorder) -> None:
    os.mknod("zero", 0o020666, os.makedev(1, 5))
    fd = r.open("open", "zero", os.O_RDWR)
    if fd is not None:
        r("read", os.read, fd, 8)


@case()
def a_fifo_works(r: Recorder) -> None:
    os.mkfifo("fifo")
    reading = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open("fifo", os.O_WRONLY)
    os.write(writing, b"through the fifo")
    r("read", os.read, reading, 100)


@case()
def a_socket_works(r: Recorder) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        r("bind", server.bind, "socket")
        r("listen", server.listen)
        r("connect", client.connect, "socket")
        r("open", os.open, "socket", os.O_RDONLY)
        r("bind again", client.bind, "socket")


@case(length=(0, 1, 59, 60, 61, 255, 1024, 4094, 4095, 4096))
def symlinks(r: Recorder, length: int) -> None:
    r("symlink", os.symlink, b"t" * length, b"link")
    r("readlink", os.readlink, b"link")
    r.stat("stat", "link")


@case(target=(b"a\nb", b"\xff\xfe", b"back\\slash", b"/dev/null", b".", b"..", b"a/../b", b" ", b"//x//"))
def symlink_targets(r: Recorder, target: bytes) -> None:
    with aside("d"):
        r("symlink", os.symlink, target, b"link")
        r("readlink", os.readlink, b"link")
        r("follow", os.stat, b"link")


@case(kind=KINDS)
def readlink(r: Recorder, kind: str) -> None:
    make(kind, "it")
    r("readlink", os.readlink, "it")


@case(depth=(1, 39, 40, 41))
def symlink_chain(r: Recorder, depth: int) -> None:
    make("file", "link-0")
    for index in range(depth):
        os.symlink(f"link-{index}", f"link-{index + 1}")
    r("follow", os.stat, f"link-{depth}")


@case()
def deep_tree(r: Recorder) -> None:
    for level in range(20):
        os.mkdir(f"level-{level}")
        os.chdir(f"level-{level}")
    make("file", "leaf")
    r("working directory", lambda: os.getcwd().count("level-"))
    for _ in range(20):
        os.chdir("..")
    r.stat("leaf", "/".join(f"level-{level}" for level in range(20)) + "/leaf")


@case()
def reused_names(r: Recorder) -> None:
    for kind in ("file", "dir", "symlink", "fifo", "file", "dir"):
        with aside(f"after-{kind}-{len(r.events)}"):
            make(kind, "it")
            r.stat(kind, "it")
            (os.rmdir if kind == "dir" else os.unlink)("it")
            r.stat("gone", "it")
            make("fifo", "it")
            r.stat("replaced", "it")


@case()
def umask_zero_group(r: Recorder) -> None:
    os.chmod(".", 0o777)
    become(USER, GROUP, (EXTRA_GROUP,))
    os.umask(0)
    os.mkdir("shared", 0o2770)
    r.stat("directory", "shared")
    r("give it to another group of ours", os.chown, "shared", -1, EXTRA_GROUP)
    r.stat("directory", "shared")
    by_open("shared/file", 0o660)
    r.stat("file", "shared/file")
