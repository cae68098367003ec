"""Files without a name, locks between processes, and programs that are run from the mount."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.syscalls import rename
from t7_parity.things import OTHER, USER, become, make, read, write


@case(how=("unlink", "replace"))
def unlinked_but_open(r: Recorder, how: str) -> None:
    write("it", b"0123456789")
    fd = os.open("it", os.O_RDWR)
    if how == "unlink":
        os.unlink("it")
    else:
        write("other", b"other")
        os.rename("other", "it")
    r.stat("fstat", fd)
    r("write", os.pwrite, fd, b"after", 5)
    r("read", os.pread, fd, 100, 0)
    r("ftruncate", os.ftruncate, fd, 7)
    r("fchmod", os.fchmod, fd, 0o600)
    r("fchown", os.fchown, fd, USER, USER)
    r("futimens", os.utime, fd, ns=(1, 2))
    r("setxattr", os.setxattr, fd, "user.x", b"y")
    r("getxattr", os.getxattr, fd, "user.x")
    r("fsync", os.fsync, fd)
    r("end", os.lseek, fd, 0, os.SEEK_END)
    r.stat("fstat at the end", fd)
    r("open anew", os.open, f"/proc/self/fd/{fd}", os.O_RDONLY)
    r("list", lambda: sorted(os.listdir(".")))
    os.close(fd)
    r("list after close", lambda: sorted(os.listdir(".")))


@case()
def a_name_used_again_while_the_old_file_is_open(r: Recorder) -> None:
    descriptors = []
    for index in range(10):
        write("it", b"file %d" % index)
        descriptors.append(os.open("it", os.O_RDWR))
        os.unlink("it")
    for index, fd in enumerate(descriptors):
        r(f"read {index}", os.pread, fd, 100, 0)
        os.pwrite(fd, b"more", 6)
    write("it", b"the last")
    r("by name", read, "it")
    r("first", os.pread, descriptors[0], 100, 0)


@case(flag=(0, 2))
def renamed_while_open(r: Recorder, flag: int) -> None:
    write("a", b"this is a")
    write("b", b"this is b")
    fd = os.open("a", os.O_RDWR)
    rename("a", "b", flag)
    os.pwrite(fd, b"THIS", 0)
    r.stat("fstat", fd)
    r("b", read, "b")
    r("a", read, "a")


@case()
def parent_renamed_while_open(r: Recorder) -> None:
    os.makedirs("a/b")
    write("a/b/it", b"content")
    fd = os.open("a/b/it", os.O_RDWR)
    os.rename("a", "z")
    os.pwrite(fd, b"C", 0)
    r("by the new name", read, "z/b/it")
    r("by the old name", read, "a/b/it")
    os.chdir("z/b")
    os.rename("../../z", "../../y")
    r("in the working directory", read, "it")
    r("its name", lambda: os.getcwd().rpartition("/y/")[2])


@case()
def removed_behind_the_mount_while_open(r: Recorder) -> None:
    write("it", b"content")
    fd = os.open("it", os.O_RDWR)
    os.unlink("it", dir_fd=r.backing)
    r.stat("fstat", fd)
    r("write", os.pwrite, fd, b"C", 0)
    r("read", os.pread, fd, 100, 0)
    r.stat("by name", "it")
    r("unlink", os.unlink, "it")
    r("create", write, "it", b"new")
    r("read the new one", read, "it")
    r("read the old one", os.pread, fd, 100, 0)


@case()
def closing_twice_is_refused(r: Recorder) -> None:
    write("it", b"x")
    fd = os.open("it", os.O_RDWR)
    copy = os.dup(fd)
    r("close", os.close, fd)
    r("close again", os.close, fd)
    r("write through the copy", os.write, copy, b"y")
    r("content", read, "it")


# Locks that programs take among themselves -------------------------------------------------------


def in_child(function: Callable[..., object], *args: object) -> str:
    """Say how a call ends in a child process, which shares descriptors but no locks."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            function(*args)
        except OSError as error:
            code = error.errno or 255
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return errno.errorcode.get(code, str(code))


@case(held=("LOCK_SH", "LOCK_EX"), wanted=("LOCK_SH", "LOCK_EX"))
def flock(r: Recorder, held: str, wanted: str) -> None:
    write("it", b"x")
    first, second = os.open("it", os.O_RDONLY), os.open("it", os.O_RDONLY)
    r("lock", fcntl.flock, first, getattr(fcntl, held))
    r("second", fcntl.flock, second, getattr(fcntl, wanted) | fcntl.LOCK_NB)
    r("unlock", fcntl.flock, first, fcntl.LOCK_UN)
    r("second again", fcntl.flock, second, getattr(fcntl, wanted) | fcntl.LOCK_NB)
    os.close(second)
    r("after close", fcntl.flock, first, fcntl.LOCK_EX | fcntl.LOCK_NB)


@case(held=("LOCK_SH", "LOCK_EX"), wanted=("LOCK_SH", "LOCK_EX"), start=(0, 5, 100))
def posix_locks(r: Recorder, held: str, wanted: str, start: int) -> None:
    write("it", b"0123456789")
    fd = os.open("it", os.O_RDWR)
    r("lock", fcntl.lockf, fd, getattr(fcntl, held), 10, 0)
    r.note("child", in_child(fcntl.lockf, fd, getattr(fcntl, wanted) | fcntl.LOCK_NB, 10, start))
    r("unlock a part", fcntl.lockf, fd, fcntl.LOCK_UN, 3, 4)
    r.note("child in the gap", in_child(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 3, 4))
    os.close(os.open("it", os.O_RDONLY))
    r.note("child after any close", in_child(fcntl.lockf, fd, getattr(fcntl, wanted) | fcntl.LOCK_NB, 10, 0))


@case(flags=(os.O_RDONLY, os.O_WRONLY))
def posix_locks_need_the_right_descriptor(r: Recorder, flags: int) -> None:
    write("it", b"x")
    fd = os.open("it", flags)
    r("shared", fcntl.lockf, fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    r("exclusive", fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


@case(wanted=("F_RDLCK", "F_WRLCK"))
def open_file_description_locks(r: Recorder, wanted: str) -> None:
    write("it", b"x")
    first, second = os.open("it", os.O_RDWR), os.open("it", os.O_RDWR)

    def lock(kind: int) -> bytes:
        return struct.pack("=hhqqi4x", kind, 0, 0, 1, 0).ljust(32, b"\0")

    set_lock = 37
    r.quietly("first", fcntl.fcntl, first, set_lock, lock(fcntl.F_WRLCK))
    r.quietly("second", fcntl.fcntl, second, set_lock, lock(getattr(fcntl, wanted)))
    os.close(first)
    r.quietly("after close", fcntl.fcntl, second, set_lock, lock(getattr(fcntl, wanted)))


@case(kind=("F_RDLCK", "F_WRLCK"))
def leases(r: Recorder, kind: str) -> None:
    write("it", b"x")
    fd = os.open("it", os.O_RDONLY)
    r("set", fcntl.fcntl, fd, fcntl.F_SETLEASE, getattr(fcntl, kind))
    r("get", fcntl.fcntl, fd, fcntl.F_GETLEASE)


# Programs ----------------------------------------------------------------------------------------


def run(command: list[str]) -> tuple[int, bytes]:
    """Run a program and return how it ended."""
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode, done.stdout


@case(kind=("binary", "script"), mode=(0o755, 0o111, 0o644, 0o700))
def running(r: Recorder, kind: str, mode: int) -> None:
    if kind == "binary":
        shutil.copy("/bin/echo", "program")
    else:
        write("program", b"#!/bin/sh\necho script $1\n")
    os.chmod("program", mode)
    r("root", run, ["./program", "hello"])
    become(OTHER)
    r("user", run, ["./program", "hello"])


@case()
def a_running_program_cannot_be_written(r: Recorder) -> None:
    shutil.copy("/bin/sleep", "program")
    with subprocess.Popen(["./program", "30"]) as process:
        r("open for writing", os.open, "program", os.O_WRONLY)
        r("truncate", os.truncate, "program", 0)
        r("open for reading", lambda: len(read("program")) > 1000)
        r("unlink", os.unlink, "program")
        process.kill()


@case()
def a_program_that_is_being_written_cannot_run(r: Recorder) -> None:
    shutil.copy("/bin/echo", "program")
    fd = os.open("program", os.O_RDWR)
    r("run", run, ["./program", "hello"])
    os.close(fd)
    r("run after close", run, ["./program", "hello"])


@case(bits=(0o4755, 0o2755))
def set_id_programs(r: Recorder, bits: int) -> None:
    shutil.copy("/usr/bin/id", "program")
    os.chown("program", USER, USER)
    os.chmod("program", bits)
    become(OTHER)
    r("user", run, ["./program", "-u"])
    r("group", run, ["./program", "-g"])


@case(kind=("file", "dir", "fifo", "missing"))
def running_what_is_no_program(r: Recorder, kind: str) -> None:
    make(kind, "it", 0o755)
    r("run", os.execv, "it", ["it"])


@case()
def a_shared_library_can_be_loaded(r: Recorder) -> None:
    maps = read("/proc/self/maps").decode().splitlines()
    shutil.copy(next(line.split()[-1] for line in maps if "/libz.so" in line or "/libm.so" in line), "copy.so")
    r.note("loaded", ctypes.CDLL("./copy.so")._name)
    r.note("mapped from here", any("copy.so" in line for line in read("/proc/self/maps").decode().splitlines()))
