"""Reading directories: what is listed, with which types, from any position, while the directory changes."""

from __future__ import annotations

import os

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.syscalls import getdents, list_all
from t7_parity.things import KINDS, make, write


def names(fd: int) -> list[bytes]:
    """Return what is left to read in a directory, sorted."""
    return sorted(entry.name for entry in list_all(fd))


@case()
def types(r: Recorder) -> None:
    for kind in (*KINDS, "socket", "device", "hardlink"):
        make(kind, kind)
    fd = os.open(".", os.O_RDONLY)
    r.note("entries", sorted((entry.name, entry.type) for entry in list_all(fd)))


@case(where=("empty", "top-of-a-tree"))
def dot_and_dotdot(r: Recorder, where: str) -> None:
    os.makedirs("d/e/f" if where == "top-of-a-tree" else "d")
    fd = os.open("d", os.O_RDONLY)
    entries = {entry.name: entry for entry in list_all(fd)}
    r.note("names", sorted(entries))
    r.note("types", [entries[name].type for name in (b".", b"..")])
    r.note(". is the directory", os.path.samefile("d", "d/."))
    r.note(".. is its parent", os.path.samefile("d/..", "."))
    r.stat("links", "d")


@case(count=(0, 1, 2, 100, 1000, 5000), size=(300, 32768))
def sizes(r: Recorder, count: int, size: int) -> None:
    os.mkdir("d")
    names = [f"d/file-{index:05}" + "x" * (index % 50) for index in range(count)]
    for name in names:
        os.mknod(name, 0o100644, dir_fd=r.backing)
    fd = os.open("d", os.O_RDONLY)
    found = list_all(fd, size)
    r.note("how many", len(found))
    r.note("twice", len(found) - len({entry.name for entry in found}))
    r.note("names", b"\n".join(sorted(entry.name for entry in found)))
    r("at the end", getdents, fd)
    os.lseek(fd, 0, os.SEEK_SET)
    r.note("again", len(list_all(fd, size)))
    for name in names:
        os.unlink(name, dir_fd=r.backing)


@case(count=(10, 300))
def positions(r: Recorder, count: int) -> None:
    os.mkdir("d")
    for index in range(count):
        os.mkfifo(f"d/{index:04}", dir_fd=r.backing)
    fd = os.open("d", os.O_RDONLY)
    entries = list_all(fd, 600)
    for chosen in (0, 1, 2, count // 2, count, count + 1):
        os.lseek(fd, entries[chosen].offset, os.SEEK_SET)
        rest = [each.name for each in list_all(fd)]
        r.note(f"the rest after {chosen} is", rest == [each.name for each in entries[chosen + 1 :]])
    second = os.open("d", os.O_RDONLY)
    r.note("descriptors have positions of their own", (len(getdents(fd)) == 0, len(list_all(second)) == count + 2))


@case(order=("forward", "backward"), size=(300, 32768))
def deleting_while_reading(r: Recorder, order: str, size: int) -> None:
    os.mkdir("d")
    for index in range(300):
        os.mknod(f"d/{index:04}", 0o100644)
    fd = os.open("d", os.O_RDONLY)
    deleted = 0
    while entries := getdents(fd, size):
        for entry in entries if order == "forward" else reversed(entries):
            if entry.name not in (b".", b".."):
                os.unlink(b"d/" + entry.name)
                deleted += 1
    r.note("deleted", deleted)
    r.note("left", os.listdir("d"))
    r("rmdir", os.rmdir, "d")


@case()
def changes_show_after_a_rewind(r: Recorder) -> None:
    for name in ("a", "b", "c"):
        write(name, b"x")
    fd = os.open(".", os.O_RDONLY)
    r.note("before", names(fd))
    os.unlink("a")
    os.rename("b", "z")
    write("new", b"x")
    os.lseek(fd, 0, os.SEEK_SET)
    r.note("after", names(fd))
    os.close(os.open("behind", os.O_CREAT | os.O_WRONLY, dir_fd=r.backing))
    os.unlink("c", dir_fd=r.backing)
    os.lseek(fd, 0, os.SEEK_SET)
    r.note("after changes behind the mount", names(fd))
    r.note("a new listing", sorted(os.listdir(".")))


@case()
def a_descriptor_outlives_its_name(r: Recorder) -> None:
    os.makedirs("d")
    fd = os.open("d", os.O_RDONLY)
    os.rename("d", "e")
    os.close(os.open("inside", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    r.note("renamed", names(fd))
    os.unlink("inside", dir_fd=fd)
    os.rmdir("e")
    os.lseek(fd, 0, os.SEEK_SET)
    r("read", list_all, fd)
    r.stat("fstat", fd)
    r("create", os.open, "x", os.O_CREAT | os.O_RDWR, dir_fd=fd)
    r("mkdir", os.mkdir, "x", dir_fd=fd)
    r("look up", os.stat, "x", dir_fd=fd)
    r("fsync", os.fsync, fd)
    r("fchmod", os.fchmod, fd, 0o700)
    r.stat("then", fd)


@case()
def a_working_directory_that_is_removed(r: Recorder) -> None:
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    r("getcwd", os.getcwd)
    r("list", os.listdir, ".")
    r("create", os.open, "x", os.O_CREAT | os.O_RDWR)
    r("mkdir", os.mkdir, "x")
    r("stat", os.stat, ".")
    r("open", os.open, ".", os.O_RDONLY)
    r("go up", os.chdir, "..")


@case()
def io_on_a_directory(r: Recorder) -> None:
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    r("read", os.read, fd, 10)
    r("pread", os.pread, fd, 10, 0)
    r("write", os.write, fd, b"x")
    r("ftruncate", os.ftruncate, fd, 0)
    r("fsync", os.fsync, fd)
    r("fdatasync", os.fdatasync, fd)
    r("small buffer", getdents, fd, 16)
    r("negative position", os.lseek, fd, -1, os.SEEK_SET)
    r("list a file", lambda: getdents(os.open("/dev/null", os.O_RDONLY)))


@case()
def links_of_directories(r: Recorder) -> None:
    for index in range(20):
        os.makedirs(f"d/{index}")
    r.stat("twenty", "d")
    os.rename("d/0", "elsewhere")
    r.stat("nineteen", "d")
    os.rmdir("d/1")
    r.stat("eighteen", "d")
    os.rename("d/2", "d/renamed")
    r.stat("still", "d")


@case()
def an_entry_changes_its_type(r: Recorder) -> None:
    for kind in ("file", "dir", "fifo", "dangling", "file"):
        make(kind, "it")
        fd = os.open(".", os.O_RDONLY)
        r.note(kind, sorted((entry.name, entry.type) for entry in list_all(fd)))
        os.close(fd)
        r.stat(f"stat {kind}", "it")
        os.rename("it", f"was-{kind}-{len(r.events)}")
