"""Extended attributes of every namespace, and POSIX ACLs, which are two of them."""

from __future__ import annotations

import os
import struct

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.syscalls import getxattr_size, listxattr_size
from t7_parity.things import EXTRA_GROUP, GROUP, OTHER, USER, aside, become, make, write

KINDS = ("file", "dir", "symlink", "dangling", "fifo", "socket", "device", "missing")
NAMES = (
    "user.x", "user.", "user", "trusted.x", "security.x", "security.capability", "system.x", "system.posix_acl_access",
    "unknown.x", "x", "", "user." + "n" * 250, "user." + "n" * 251, "user.ü", "user.a b", "user.lockfs",
)  # fmt: skip


@case(kind=KINDS, name=NAMES, follow=(True, False))
def by_name(r: Recorder, kind: str, name: str, follow: bool) -> None:
    make(kind, "it")
    r("get absent", os.getxattr, "it", name, follow_symlinks=follow)
    r("remove absent", os.removexattr, "it", name, follow_symlinks=follow)
    r("replace absent", os.setxattr, "it", name, b"1", os.XATTR_REPLACE, follow_symlinks=follow)
    r("create", os.setxattr, "it", name, b"2", os.XATTR_CREATE, follow_symlinks=follow)
    r("create again", os.setxattr, "it", name, b"3", os.XATTR_CREATE, follow_symlinks=follow)
    r("replace", os.setxattr, "it", name, b"4", os.XATTR_REPLACE, follow_symlinks=follow)
    r("set", os.setxattr, "it", name, b"5", follow_symlinks=follow)
    r("set empty", os.setxattr, "it", name, b"", follow_symlinks=follow)
    r("get", os.getxattr, "it", name, follow_symlinks=follow)
    r("list", lambda: sorted(os.listxattr("it", follow_symlinks=follow)))
    r("remove", os.removexattr, "it", name, follow_symlinks=follow)
    r("list again", lambda: sorted(os.listxattr("it", follow_symlinks=follow)))


@case(size=(0, 1, 100, 255, 256, 1000, 3000, 4000, 4096, 8192, 65535, 65536, 65537), kind=("file", "dir"))
def values(r: Recorder, size: int, kind: str) -> None:
    make(kind, "it")
    r("set", os.setxattr, "it", "user.v", bytes(index % 251 for index in range(size)))
    r("get", os.getxattr, "it", "user.v")
    r("size of it", getxattr_size, "it", "user.v", 0)
    for room in (1, size - 1, size, size + 1):
        if room > 0:
            r(f"into {room}", getxattr_size, "it", "user.v", room)


@case(value=(b"\0", b"\0\0binary\xff", b"text", b"new\nline"))
def binary_values(r: Recorder, value: bytes) -> None:
    make("file", "it")
    os.setxattr("it", "user.v", value)
    r("get", os.getxattr, "it", "user.v")


@case(count=(0, 1, 20, 60))
def lists(r: Recorder, count: int) -> None:
    make("file", "it")
    for index in range(count):
        r(f"set {index}", os.setxattr, "it", f"user.name-{index:03}", b"v" * (index % 7))
    r("list", lambda: sorted(os.listxattr("it")))
    r("size of the list", listxattr_size, "it", 0)
    for room in (1, 10, 10000):
        r(f"into {room}", listxattr_size, "it", room)


@case(who=("owner", "other"), mode=(0o600, 0o666, 0o644, 0o444, 0o222, 0))
def rights(r: Recorder, who: str, mode: int) -> None:
    write("it", b"x")
    for name in ("user.x", "trusted.x", "security.x"):
        os.setxattr("it", name, b"before")
    os.chown("it", USER, GROUP)
    os.chmod("it", mode)
    become(USER if who == "owner" else OTHER)
    r("list", lambda: sorted(os.listxattr("it")))
    for name in ("user.x", "trusted.x", "security.x"):
        r(f"get {name}", os.getxattr, "it", name)
        r(f"set {name}", os.setxattr, "it", name, b"after")
        r(f"remove {name}", os.removexattr, "it", name)


@case(who=("owner", "other"))
def rights_in_a_sticky_directory(r: Recorder, who: str) -> None:
    os.mkdir("d")
    os.chown("d", USER, GROUP)
    os.chmod("d", 0o1777)
    become(USER if who == "owner" else OTHER)
    r("set", os.setxattr, "d", "user.x", b"1")
    r("list", os.listxattr, "d")


@case(flags=(os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH))
def through_descriptors(r: Recorder, flags: int) -> None:
    make("file", "it")
    fd = os.open("it", flags)
    r("set", os.setxattr, fd, "user.x", b"1")
    r("get", os.getxattr, fd, "user.x")
    r("list", os.listxattr, fd)
    os.unlink("it")
    r("set unlinked", os.setxattr, fd, "user.y", b"2")
    r("list unlinked", lambda: sorted(os.listxattr(fd)))
    r("remove unlinked", os.removexattr, fd, "user.x")


@case()
def capabilities_go_with_a_write(r: Recorder) -> None:
    make("file", "it", 0o755)
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    r("set", os.setxattr, "it", "security.capability", capability)
    r("get", os.getxattr, "it", "security.capability")
    fd = os.open("it", os.O_WRONLY)
    os.write(fd, b"changed")
    r("list after a write", os.listxattr, "it")
    r("set again", os.setxattr, "it", "security.capability", capability)
    os.ftruncate(fd, 3)
    r("list after a truncation", os.listxattr, "it")
    r("set again", os.setxattr, "it", "security.capability", capability)
    os.chown("it", USER, GROUP)
    r("list after a chown", os.listxattr, "it")


# POSIX ACLs --------------------------------------------------------------------------------------

USER_OBJ, NAMED_USER, GROUP_OBJ, NAMED_GROUP, MASK, OTHERS = 1, 2, 4, 8, 0x10, 0x20
NOBODY = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int], version: int = 2) -> bytes:
    """Return an ACL in the form of the extended attribute: tag, permissions, id."""
    return struct.pack("<I", version) + b"".join(struct.pack("<HHI", *each) for each in entries)


def minimal(mode: int) -> bytes:
    """The ACL that says the same as a mode."""
    return acl((USER_OBJ, mode >> 6 & 7, NOBODY), (GROUP_OBJ, mode >> 3 & 7, NOBODY), (OTHERS, mode & 7, NOBODY))


def extended(user: int = 6, group: int = 4, mask: int = 7) -> bytes:
    """An ACL with a named user and a named group."""
    return acl(
        (USER_OBJ, 7, NOBODY), (NAMED_USER, user, USER), (GROUP_OBJ, 5, NOBODY), (NAMED_GROUP, group, EXTRA_GROUP),
        (MASK, mask, NOBODY), (OTHERS, 0, NOBODY),
    )  # fmt: skip


ACLS = {
    "minimal": minimal(0o640),
    "extended": extended(),
    "masked": extended(user=7, group=7, mask=4),
    "nothing-for-user": extended(user=0),
    "empty": acl(),
    "bad-version": acl(version=1),
    "no-mask": acl((USER_OBJ, 7, NOBODY), (NAMED_USER, 6, USER), (GROUP_OBJ, 5, NOBODY), (OTHERS, 0, NOBODY)),
    "no-owner": acl((GROUP_OBJ, 5, NOBODY), (OTHERS, 0, NOBODY)),
    "bad-tag": acl((USER_OBJ, 7, NOBODY), (3, 7, NOBODY), (GROUP_OBJ, 5, NOBODY), (OTHERS, 0, NOBODY)),
    "unordered": acl((OTHERS, 0, NOBODY), (GROUP_OBJ, 5, NOBODY), (USER_OBJ, 7, NOBODY)),
    "truncated": extended()[:-3],
    "bad-permission": acl((USER_OBJ, 9, NOBODY), (GROUP_OBJ, 5, NOBODY), (OTHERS, 0, NOBODY)),
}
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


@case(
    which=tuple(ACLS),
    attribute=(ACCESS, DEFAULT),
    kind=("file", "dir", "symlink", "fifo"),
    who=("root", "owner", "other"),
)
def acl_set(r: Recorder, which: str, attribute: str, kind: str, who: str) -> None:
    make(kind, "it", 0o2755)
    os.chown("it", USER, GROUP, follow_symlinks=False)
    os.chmod("it", 0o2755, follow_symlinks=True)
    if who != "root":
        become(USER if who == "owner" else OTHER, OTHER)
    r("set", os.setxattr, "it", attribute, ACLS[which], follow_symlinks=False)
    r.stat("stat", "it")
    r("get", os.getxattr, "it", attribute, follow_symlinks=False)
    r("list", lambda: os.listxattr("it", follow_symlinks=False))
    r("chmod", os.chmod, "it", 0o715)
    r("get after chmod", os.getxattr, "it", attribute, follow_symlinks=False)
    r("remove", os.removexattr, "it", attribute, follow_symlinks=False)
    r("remove again", os.removexattr, "it", attribute, follow_symlinks=False)
    r.stat("stat at the end", "it")


@case(
    which=("minimal", "extended", "masked", "nothing-for-user"),
    who=(
        (USER, USER, ()), (OTHER, OTHER, ()), (OTHER, 3000, ()),
        (OTHER, EXTRA_GROUP, ()), (OTHER, OTHER, (EXTRA_GROUP,)),
    ),
    kind=("file", "dir"),
)  # fmt: skip
def acl_decides(r: Recorder, which: str, who: tuple[int, int, tuple[int, ...]], kind: str) -> None:
    make(kind, "it")
    os.chown("it", 4000, 3000)
    os.setxattr("it", ACCESS, ACLS[which])
    become(*who)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        r.open(f"open {flags}", "it", flags)
    for wanted in (os.R_OK, os.W_OK, os.X_OK):
        r.note(f"access {wanted}", os.access("it", wanted))
    r("create inside", os.mkdir, "it/inside")
    r("look inside", os.lstat, "it/nothing")


@case(which=("minimal", "extended", "masked", "nothing-for-user"))
def acl_inherited(r: Recorder, which: str) -> None:
    os.umask(0)
    os.mkdir("d")
    os.setxattr("d", DEFAULT, ACLS[which])
    os.mkdir("d/sub", 0o777)
    os.close(os.open("d/file", os.O_CREAT | os.O_RDWR, 0o666))
    os.mkfifo("d/fifo", 0o600)
    os.symlink("file", "d/link")
    os.mkdir("d/sub/sub", 0o700)
    for name in ("d/sub", "d/file", "d/fifo", "d/sub/sub"):
        r.stat(name, name)
        for attribute in (ACCESS, DEFAULT):
            r(f"{name} {attribute}", os.getxattr, name, attribute)


@case(mode=(0, 0o644, 0o770, 0o7777))
def acl_and_chmod(r: Recorder, mode: int) -> None:
    write("it", b"x")
    os.setxattr("it", ACCESS, extended())
    os.chmod("it", mode)
    r("get", os.getxattr, "it", ACCESS)
    r.stat("stat", "it")
    with aside("copy"):
        os.link("../it", "it")
        r("through another name", os.getxattr, "it", ACCESS)
