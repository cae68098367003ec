"""open(2) with every combination of flags, on every kind of file, by everyone."""

from __future__ import annotations

import fcntl
import itertools
import os

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.things import EXTRA_GROUP, GROUP, KINDS, OTHER, USER, aside, become, make, write

ACCESS = ("O_RDONLY", "O_WRONLY", "O_RDWR")
WHETHER = ("O_CREAT", "O_EXCL", "O_TRUNC", "O_APPEND", "O_DIRECTORY", "O_NOFOLLOW")
EXTRA = ("O_NOATIME", "O_SYNC", "O_DSYNC", "O_DIRECT", "O_PATH", "O_ASYNC", "O_NOCTTY")


def flags_of(*names: str) -> int:
    """Return the flags of these names; never wait for the other end of a fifo."""
    flags = os.O_NONBLOCK
    for name in names:
        flags |= getattr(os, name)
    return flags


def try_open(r: Recorder, step: str, name: str, flags: int) -> None:
    """Open, see what can be done with the descriptor, and close."""
    fd = r.open(step, name, flags)
    if fd is None:
        return
    r.note(f"{step} flags", fcntl.fcntl(fd, fcntl.F_GETFL))
    r(f"{step} read", os.read, fd, 4)
    r(f"{step} write", os.write, fd, b"xyz")
    r.stat(f"{step} fstat", fd)
    r(f"{step} offset", os.lseek, fd, 0, os.SEEK_CUR)
    r(f"{step} close", os.close, fd)


@case(kind=KINDS, access=ACCESS)
def combinations(r: Recorder, kind: str, access: str) -> None:
    for length in range(len(WHETHER) + 1):
        for chosen in itertools.combinations(WHETHER, length):
            step = "|".join((access, *chosen))
            with aside(step):
                make(kind, "it")
                try_open(r, step, "it", flags_of(access, *chosen))


@case(kind=KINDS, access=ACCESS, extra=EXTRA)
def extra_flags(r: Recorder, kind: str, access: str, extra: str) -> None:
    for chosen in ((), ("O_CREAT",), ("O_NOFOLLOW",), ("O_TRUNC",)):
        step = "|".join((access, extra, *chosen))
        with aside(step):
            make(kind, "it")
            try_open(r, step, "it", flags_of(access, extra, *chosen))


@case(kind=("dir", "file", "missing"), access=ACCESS)
def tmpfile(r: Recorder, kind: str, access: str) -> None:
    make(kind, "it")
    try_open(r, "O_TMPFILE", "it", os.O_TMPFILE | getattr(os, access))


@case(flags=(3, 3 | os.O_CREAT, os.O_CREAT | os.O_DIRECTORY, 1 << 30))
def odd_flags(r: Recorder, flags: int) -> None:
    make("file", "it")
    try_open(r, "existing", "it", flags)
    try_open(r, "missing", "new", flags)


@case(name=("it/", "it/.", "./it", "it//", "dir/", "dir/.", "dir/../it", "", ".", "..", "it/below", "gone/x"))
def spellings(r: Recorder, name: str) -> None:
    with aside("below"):
        make("file", "it")
        make("dir", "dir", 0o755)
        for access in ACCESS:
            try_open(r, access, name, flags_of(access))
        try_open(r, "O_CREAT", name, flags_of("O_RDWR", "O_CREAT"))


IDENTITIES = {
    "owner": (USER, USER, ()),
    "group": (OTHER, GROUP, ()),
    "extra-group": (OTHER, OTHER, (EXTRA_GROUP, GROUP)),
    "other": (OTHER, OTHER, ()),
}


@case(
    who=tuple(IDENTITIES),
    mode=(0, 0o400, 0o200, 0o600, 0o640, 0o060, 0o044, 0o040, 0o004, 0o002, 0o666, 0o466, 0o646, 0o4755, 0o1777),
)
def permissions_of_a_file(r: Recorder, who: str, mode: int) -> None:
    write("it", b"0123456789", mode)
    os.chown("it", USER, GROUP)
    os.chmod("it", mode)
    become(*IDENTITIES[who])
    for access in (*ACCESS, "O_TRUNC", "O_CREAT"):
        try_open(r, access, "it", flags_of(access))
    for wanted in (os.F_OK, os.R_OK, os.W_OK, os.X_OK):
        r.note(f"access {wanted}", os.access("it", wanted))
    try_open(r, "O_NOATIME", "it", flags_of("O_NOATIME"))


@case(
    who=tuple(IDENTITIES),
    mode=(0, 0o500, 0o700, 0o300, 0o100, 0o750, 0o730, 0o070, 0o755, 0o007, 0o1777, 0o3777, 0o555),
)
def permissions_of_a_directory(r: Recorder, who: str, mode: int) -> None:
    os.mkdir("d")
    write("d/it", b"0123456789", 0o666)
    write("d/mine", b"0123456789", 0o666)
    os.chown("d/mine", OTHER, OTHER)
    os.mkdir("d/sub")
    os.chmod("d/sub", 0o777)
    os.chown("d", USER, GROUP)
    os.chmod("d", mode)
    become(*IDENTITIES[who])
    r("list", lambda: sorted(os.listdir("d")))
    r.stat("look up", "d/it")
    try_open(r, "read", "d/it", os.O_RDONLY)
    try_open(r, "create", "d/new", os.O_RDWR | os.O_CREAT)
    try_open(r, "create existing", "d/it", os.O_RDWR | os.O_CREAT)
    r("mkdir", os.mkdir, "d/newdir")
    r("symlink", os.symlink, "x", "d/newlink")
    r("mkfifo", os.mkfifo, "d/newfifo")
    r("link", os.link, "d/it", "d/newname")
    r("rename", os.rename, "d/it", "d/renamed")
    r("rename mine", os.rename, "d/mine", "d/renamed-mine")
    r("rmdir", os.rmdir, "d/sub")
    r("unlink", os.unlink, "d/it")
    r("chdir", os.chdir, "d")


@case(umask=(0, 0o022, 0o077))
def a_file_made_with_no_rights_is_open_all_the_same(r: Recorder, umask: int) -> None:
    os.chmod(".", 0o777)
    become(USER)
    os.umask(umask)
    for mode in (0, 0o444, 0o222, 0o400):
        try_open(r, f"{mode:o}", f"new-{mode:o}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        fd = r.open(f"{mode:o} write", f"other-{mode:o}", os.O_WRONLY | os.O_CREAT, mode)
        if fd is not None:
            r("write", os.write, fd, b"x")
            os.close(fd)
        r.open(f"{mode:o} again", f"other-{mode:o}", os.O_RDWR)


@case()
def reopened_through_proc(r: Recorder) -> None:
    make("file", "it")
    fd = os.open("it", os.O_RDONLY)
    try_open(r, "for writing", f"/proc/self/fd/{fd}", os.O_RDWR)
    path = os.open("it", os.O_PATH)
    try_open(r, "a path descriptor", f"/proc/self/fd/{path}", os.O_RDWR)
    os.unlink("it")
    try_open(r, "unlinked", f"/proc/self/fd/{path}", os.O_RDWR)
    r("fchmod on O_PATH", os.fchmod, path, 0o600)
    r("read on O_PATH", os.read, path, 1)
    r.stat("O_PATH", path)


@case()
def changed_flags(r: Recorder) -> None:
    make("file", "it")
    fd = os.open("it", os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    os.write(fd, b"end")
    r("offset", os.lseek, fd, 0, os.SEEK_CUR)
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    os.pwrite(fd, b"begin", 0)
    r("content", os.pread, fd, 100, 0)


@case(count=(200,))
def many_descriptors_of_one_file(r: Recorder, count: int) -> None:
    make("file", "it")
    descriptors = [os.open("it", os.O_RDWR) for _ in range(count)]
    for index, fd in enumerate(descriptors):
        os.pwrite(fd, bytes([index]), index)
    for fd in descriptors[1:]:
        os.close(fd)
    r("content", os.pread, descriptors[0], 1000, 0)
