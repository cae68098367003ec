"""rename, link, unlink, rmdir: every kind of file onto every other, with every flag; and names of all sorts."""

from __future__ import annotations

import os

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.syscalls import AT_EMPTY_PATH, AT_SYMLINK_FOLLOW, link, list_all, rename
from t7_parity.things import KINDS, OTHER, USER, aside, become, make, read, write

FROM = ("file", "dir", "fulldir", "symlink", "dangling", "fifo", "hardlink", "missing")
TO = ("missing", "file", "dir", "fulldir", "symlink", "fifo", "hardlink")
FLAGS = {"none": 0, "noreplace": 1, "exchange": 2, "whiteout": 4, "both": 3, "whiteout-noreplace": 5, "unknown": 8}


@case(old=FROM, new=TO)
def rename_matrix(r: Recorder, old: str, new: str) -> None:
    for label, flags in FLAGS.items():
        with aside(label):
            make(old, "old")
            make(new, "new")
            r(label, rename, "old", "new", flags)
            r.stat(f"{label} old", "old")
            r.stat(f"{label} new", "new")


@case(kind=("file", "dir", "fulldir", "symlink"), flag=tuple(FLAGS))
def rename_into_another_directory(r: Recorder, kind: str, flag: str) -> None:
    make("dir", "a", 0o755)
    make("dir", "b", 0o755)
    make(kind, "a/it")
    make("file", "b/there")
    r("to a new name", rename, "a/it", "b/it", FLAGS[flag])
    r("onto another", rename, "b/it", "b/there", FLAGS[flag])
    r("back", rename, "b/there", "a/it", FLAGS[flag])
    for name in ("a", "b"):
        r.stat(name, name)


@case(flag=("none", "noreplace", "exchange"))
def rename_oddities(r: Recorder, flag: str) -> None:
    flags = FLAGS[flag]
    make("fulldir", "d", 0o755)
    make("file", "f")
    os.link("f", "f2")
    for old, new in (
        ("f", "f"), ("f", "f2"), ("d", "d"), ("d", "d/inside/x"), ("d", "d/new"), ("d/inside", "d"), (".", "x"),
        ("f", "."), ("f", ".."), ("d/..", "x"),
        ("f/", "x"), ("f", "x/"), ("d/", "d3/"), ("f", "missing/x"), ("", "x"), ("f", ""),
        ("f/x", "y"), ("f", "f2/x"),
    ):  # fmt: skip
        r(f"{old!r} to {new!r}", rename, old, new, flags)


@case(kind=(*KINDS, "fulldir", "hardlink", "socket", "device"))
def unlink_and_rmdir(r: Recorder, kind: str) -> None:
    for label, function in (("unlink", os.unlink), ("rmdir", os.rmdir)):
        for suffix in ("", "/", "/."):
            with aside(label + suffix.replace("/", "-")):
                make(kind, "it")
                r(label + suffix, function, "it" + suffix)
                r.stat(f"{label}{suffix} afterwards", "it")


@case(name=(".", "..", "", "d/.", "d/..", "missing/x", "f/x"))
def remove_odd_names(r: Recorder, name: str) -> None:
    make("dir", "d", 0o755)
    make("file", "f")
    r("unlink", os.unlink, name)
    r("rmdir", os.rmdir, name)


@case(kind=(*KINDS, "socket", "device"), follow=(False, True), target=("missing", "file", "dir", "symlink"))
def links(r: Recorder, kind: str, follow: bool, target: str) -> None:
    make(kind, "old")
    make(target, "new")
    r("link", link, "old", "new", AT_SYMLINK_FOLLOW if follow else 0)
    r.stat("old", "old")
    r.stat("new", "new")


@case()
def links_of_descriptors(r: Recorder) -> None:
    make("file", "it")
    fd = os.open("it", os.O_RDWR)
    r("AT_EMPTY_PATH", link, "", "second", AT_EMPTY_PATH, fd)
    r("through proc", link, f"/proc/self/fd/{fd}", "third", AT_SYMLINK_FOLLOW)
    r.stat("three", fd)
    for name in ("it", "second", "third"):
        os.unlink(name)
    r.stat("none", fd)
    r("of an unlinked file", link, "", "fourth", AT_EMPTY_PATH, fd)
    r("of an unlinked file through proc", link, f"/proc/self/fd/{fd}", "fifth", AT_SYMLINK_FOLLOW)


@case()
def linked_files_are_one(r: Recorder) -> None:
    make("hardlink", "it")
    write("other", b"other")
    os.truncate("it", 3)
    r("content", read, "it-first")
    os.chmod("it-first", 0o600)
    r.stat("mode", "it")
    os.unlink("it")
    r.stat("one left", "it-first")
    r.note("same", os.path.samefile("it-first", "it-first"))
    r.note("other", os.path.samefile("it-first", "other"))


@case(count=(200,))
def many_links(r: Recorder, count: int) -> None:
    write("it", b"x")
    for index in range(count):
        os.link("it", f"name-{index}")
    r.stat("all", f"name-{count - 1}")
    for index in range(0, count, 2):
        os.unlink(f"name-{index}")
    r.stat("half", "it")


@case(who=("owner", "other", "directory-owner"))
def sticky_directory(r: Recorder, who: str) -> None:
    os.mkdir("d")
    os.chown("d", 3000, 3000)
    os.chmod("d", 0o1777)
    for name in ("a", "b", "c", "d"):
        write(f"d/{name}", b"x", 0o666)
        os.chown(f"d/{name}", USER, USER)
    become({"owner": USER, "other": OTHER, "directory-owner": 3000}[who])
    r("rename", os.rename, "d/a", "d/z")
    r("unlink", os.unlink, "d/b")
    os.close(os.open("d/mine", os.O_CREAT | os.O_RDWR))
    r("replace", os.rename, "d/mine", "d/c")
    r("rename away", os.rename, "d/d", "d/c")


@case(name=(
    b"x" * 255, b"x" * 256, b"\xff\xfe\xfd", b"new\nline", b"back\\slash", b"\\x41", b"tab\t", b"\x01\x7f", b" ",
    b"...", b".hidden", b"-", b"*?[]",
    "ü€😀".encode(), "ü".encode() * 127, b"e\xcc\x81", b"trailing ", b"trailing.", b"a,b=c",
    b"\"quote'", b"lockfs", b".lockfs", b"%s", b".fuse_hidden0001",
))  # fmt: skip
def odd_names(r: Recorder, name: bytes) -> None:
    fd = r.open("create", name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    if fd is None:
        r("mkdir", os.mkdir, name)
        r("stat", os.lstat, name)
        r("rename to it", os.rename, b".", name)
        return
    r("write", os.write, fd, b"named " + name)
    os.close(fd)
    r("list", os.listdir, b".")
    r("read", read, name)
    r("link", os.link, name, b"second")
    r("rename", os.rename, name, b"plain")
    r("rename back", os.rename, b"plain", name)
    r("symlink", os.symlink, name, b"link")
    r("follow", read, b"link")
    r("unlink", os.unlink, name)
    r("mkdir", os.mkdir, name)
    r("create below", write, name + b"/inside", b"x")
    r("list below", os.listdir, name)


@case()
def every_byte_in_a_name(r: Recorder) -> None:
    for byte in range(1, 256):
        if byte != ord("/"):
            r(f"{byte:#x}", os.mkdir, b"byte" + bytes([byte]))
    r("list", lambda: sorted(os.listdir(b".")))
    fd = os.open(".", os.O_RDONLY)
    r.note("entries", len(list_all(fd)))


@case(length=(4000, 4095, 4096, 5000))
def long_paths(r: Recorder, length: int) -> None:
    os.mkdir("d")
    path = "d/../" * (length // 5)
    path += "./" * ((length - len(path) - 1) // 2)
    path = path.rjust(length - 1, "/")[-(length - 1) :].lstrip("/") + "d"
    r("stat", os.lstat, path)
    r("open", os.open, path, os.O_RDONLY)
    r("mkdir", os.mkdir, path + "x")


@case()
def case_matters(r: Recorder) -> None:
    write("name", b"lower")
    write("NAME", b"upper")
    r("lower", read, "name")
    r("upper", read, "NAME")
    r.stat("mixed", "Name")


@case()
def a_name_comes_and_goes_behind_the_mount(r: Recorder) -> None:
    r.stat("not there", "it")
    os.close(os.open("it", os.O_CREAT | os.O_WRONLY, dir_fd=r.backing))
    r.stat("there", "it")
    os.rename("it", "other", src_dir_fd=r.backing, dst_dir_fd=r.backing)
    r.stat("old name", "it")
    r.stat("new name", "other")
    os.unlink("other", dir_fd=r.backing)
    r.stat("gone", "other")
    os.mkdir("other", dir_fd=r.backing)
    r.stat("a directory now", "other")
    r("list", os.listdir, ".")
