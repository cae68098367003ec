"""What is written is read: by every call that moves data, at every kind of offset, through mappings, with holes."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

from t7_parity.record import Recorder
from t7_parity.registry import case
from t7_parity.syscalls import (
    FALLOC_FL_COLLAPSE_RANGE,
    FALLOC_FL_INSERT_RANGE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
    sync_file_range,
)
from t7_parity.things import make, read, write

PAGE = 4096
LARGEST = (1 << 63) - 1


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes that tell where they belong."""
    return bytes((index * 7 + index // 251 + seed) % 256 for index in range(length))


@case(
    offset=(0, 1, 511, 4095, 4096, 4097, 65536, 1 << 20, (1 << 32) - 1),
    length=(0, 1, 511, 4096, 4097, 131072, 300000),
)
def pwrite_and_pread(r: Recorder, offset: int, length: int) -> None:
    fd = os.open("it", os.O_RDWR | os.O_CREAT)
    r("pwrite", os.pwrite, fd, pattern(length), offset)
    r("pread", os.pread, fd, length + 10, max(0, offset - 5))
    r("beyond the end", os.pread, fd, 10, offset + length)
    r.stat("size", fd)
    r("offset", os.lseek, fd, 0, os.SEEK_CUR)


@case(offset=(-1, LARGEST, LARGEST - 10, 1 << 44, (1 << 44) - PAGE, 1 << 50))
def extreme_offsets(r: Recorder, offset: int) -> None:
    fd = os.open("it", os.O_RDWR | os.O_CREAT)
    r("pwrite", os.pwrite, fd, b"0123456789", offset)
    r("pread", os.pread, fd, 10, offset)
    r("lseek", os.lseek, fd, offset, os.SEEK_SET)
    r("write", os.write, fd, b"x")
    r.stat("size", fd)


@case(vectors=(0, 1, 3, 17, 1024, 1025))
def vectors_of_buffers(r: Recorder, vectors: int) -> None:
    fd = os.open("it", os.O_RDWR | os.O_CREAT)
    buffers = [pattern(index * 37 % 500, index) for index in range(vectors)]
    r("writev", os.writev, fd, buffers)
    into = [bytearray(len(each)) for each in buffers]
    os.lseek(fd, 0, os.SEEK_SET)
    r("readv", os.readv, fd, into)
    r.note("content", b"".join(into))
    r("pwritev", os.pwritev, fd, buffers, 1000)
    r("preadv", os.preadv, fd, into, 999)
    r.note("content", b"".join(into))


@case(flags=(0, os.O_APPEND, os.O_SYNC, os.O_DSYNC, os.O_APPEND | os.O_SYNC))
def appending(r: Recorder, flags: int) -> None:
    write("it", b"begin")
    first = os.open("it", os.O_RDWR | flags)
    second = os.open("it", os.O_RDWR | flags)
    for index in range(20):
        os.write(first, b"first %d " % index)
        os.write(second, b"second %d " % index)
    r("pwrite", os.pwrite, first, b"at the start", 0)
    r("offsets", lambda: [os.lseek(fd, 0, os.SEEK_CUR) for fd in (first, second)])
    r("content", os.pread, first, 10000, 0)


@case(length=(512, 4096, 8192, 65536, 1 << 20, 1000, 4097), offset=(0, 512, 4096, 100))
def direct(r: Recorder, length: int, offset: int) -> None:
    write("it", pattern(1 << 16))
    fd = r.open("open", "it", os.O_RDWR | os.O_DIRECT)
    if fd is None:
        return
    with mmap.mmap(-1, max(length, PAGE)) as buffer:
        buffer[:length] = pattern(length, 3)
        view = memoryview(buffer)[:length]
        r("write", os.pwritev, fd, [view], offset)
        r("read", os.preadv, fd, [view], offset)
        r.note("data", bytes(view))
        view.release()
    os.close(fd)
    r("content", read, "it")


@case(whence=(os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, 5, -1), offset=(0, 5, -5, 100, -100, LARGEST, -LARGEST - 1))
def lseek(r: Recorder, whence: int, offset: int) -> None:
    write("it", b"0123456789")
    fd = os.open("it", os.O_RDWR)
    os.lseek(fd, 7, os.SEEK_SET)
    r("lseek", os.lseek, fd, offset, whence)
    r("read", os.read, fd, 3)
    r("position", os.lseek, fd, 0, os.SEEK_CUR)


@case(flags=(os.O_RDONLY, os.O_RDWR))
def growth_behind_the_mount(r: Recorder, flags: int) -> None:
    write("it", b"0123456789")
    fd = os.open("it", flags)
    r("content", os.pread, fd, 100, 0)
    behind = os.open("it", os.O_RDWR, dir_fd=r.backing)
    os.pwrite(behind, b"grown", 10)
    r("end", os.lseek, fd, 0, os.SEEK_END)
    r("content after growth", os.pread, fd, 100, 0)
    os.pwrite(behind, b"OVER", 2)
    r("fstat", os.fstat, fd)
    os.ftruncate(behind, 4)
    r("end after truncation", os.lseek, fd, 0, os.SEEK_END)
    r("content after truncation", os.pread, fd, 100, 0)
    r("write at the end", os.write, fd, b"w")
    r("seen from behind", os.pread, behind, 100, 0)
    again = os.open("it", os.O_RDONLY)
    r("a new descriptor", os.pread, again, 100, 0)


SEEK_FILES = {
    "empty": (),
    "data": ((0, 10000),),
    "hole-then-data": ((1 << 20, 4096),),
    "data-then-hole": ((0, 4096), (1 << 20, 0)),
    "islands": ((1 << 16, 4096), (1 << 18, 4096), (1 << 20, 1)),
}


@case(which=tuple(SEEK_FILES))
def seek_data_and_hole(r: Recorder, which: str) -> None:
    fd = os.open("it", os.O_RDWR | os.O_CREAT)
    for offset, length in SEEK_FILES[which]:
        if length:
            os.pwrite(fd, pattern(length), offset)
        else:
            os.ftruncate(fd, offset)
    os.fsync(fd)
    size = os.fstat(fd).st_size
    for at in (0, 1, 4096, 1 << 16, (1 << 16) + 5000, size - 1, size, size + 1):
        for name in ("SEEK_DATA", "SEEK_HOLE"):
            r(f"{name} from {at}", os.lseek, fd, at, getattr(os, name))
    r.note("blocks", os.fstat(fd).st_blocks)
    r("content", read, "it")


@case(where=("start", "middle", "end"), size=(1 << 20, 1 << 30, 1 << 40))
def sparse_files(r: Recorder, where: str, size: int) -> None:
    fd = os.open("it", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    offset = {"start": 0, "middle": size // 2, "end": size - PAGE}[where]
    os.pwrite(fd, pattern(PAGE), offset)
    os.fsync(fd)
    r("around it", os.pread, fd, 3 * PAGE, max(0, offset - PAGE))
    r.note("blocks", os.fstat(fd).st_blocks)
    r.stat("stat", fd)


MODES = {
    "allocate": 0,
    "keep": FALLOC_FL_KEEP_SIZE,
    "punch": FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
    "zero": FALLOC_FL_ZERO_RANGE,
    "zero-keep": FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
    "collapse": FALLOC_FL_COLLAPSE_RANGE,
    "insert": FALLOC_FL_INSERT_RANGE,
    "wrong": 1 << 12,
}


@case(mode=tuple(MODES))
def allocation(r: Recorder, mode: str) -> None:
    write("it", pattern(3 * PAGE))
    fd = os.open("it", os.O_RDWR)
    r("fallocate", fallocate, fd, MODES[mode], PAGE, PAGE)
    r("beyond the end", fallocate, fd, MODES[mode], 10 * PAGE, PAGE)
    r("no length", fallocate, fd, MODES[mode], 0, 0)
    r("negative", fallocate, fd, MODES[mode], -1, 10)
    r.stat("stat", fd)
    r("content", read, "it")
    reading = os.open("it", os.O_RDONLY)
    r("read-only descriptor", fallocate, reading, MODES[mode], 0, PAGE)


@case()
def posix_fallocate(r: Recorder) -> None:
    fd = os.open("it", os.O_RDWR | os.O_CREAT)
    r("allocate", os.posix_fallocate, fd, 0, 3 * PAGE)
    r.stat("stat", fd)


@case(flags=(os.O_RDONLY, os.O_WRONLY, os.O_RDWR))
def wrong_direction(r: Recorder, flags: int) -> None:
    write("it", b"0123456789")
    fd = os.open("it", flags)
    r("read", os.read, fd, 3)
    r("write", os.write, fd, b"abc")
    r("pread", os.pread, fd, 3, 0)
    r("pwrite", os.pwrite, fd, b"abc", 0)
    r("fsync", os.fsync, fd)
    r("fdatasync", os.fdatasync, fd)
    r("readahead", os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_WILLNEED)
    for prot in (mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_WRITE):
        for kind in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            r.quietly(f"map {prot} {kind}", lambda prot=prot, kind=kind: mmap.mmap(fd, 10, kind, prot).close())
    r("ftruncate", os.ftruncate, fd, 5)
    r("fallocate", fallocate, fd, 0, 0, 5)


@case(kind=("file", "dir", "fifo"))
def syncing(r: Recorder, kind: str) -> None:
    make(kind, "it")
    fd = os.open("it", os.O_RDONLY | os.O_NONBLOCK)
    r("fsync", os.fsync, fd)
    r("fdatasync", os.fdatasync, fd)
    r("sync_file_range", sync_file_range, fd, 0, 0, 7)
    r("wrong flags", sync_file_range, fd, 0, 0, 8)
    r("negative", sync_file_range, fd, -1, 0, 7)
    r("fadvise", os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.sync()


# Mappings ----------------------------------------------------------------------------------------


@case(length=(1, 4096, 10000, 1 << 20))
def shared_mapping(r: Recorder, length: int) -> None:
    write("it", pattern(length))
    fd = os.open("it", os.O_RDWR)
    with mmap.mmap(fd, length) as mapping:
        r.note("read", mapping[:])
        mapping[0:1] = b"M"
        mapping[length - 1 : length] = b"N"
        r("seen by pread", os.pread, fd, length, 0)
        os.pwrite(fd, b"W", length // 2)
        r.note("seen in the mapping", mapping[length // 2 : length // 2 + 1])
        r("flush", mapping.flush)
        behind = os.open("it", os.O_RDONLY, dir_fd=r.backing)
        r("seen in the source", os.pread, behind, length, 0)
        mapping[0:1] = b"Z"
    os.fsync(fd)
    os.close(fd)
    r("content", read, "it")


@case()
def a_mapping_outlives_its_descriptor(r: Recorder) -> None:
    write("it", pattern(PAGE))
    fd = os.open("it", os.O_RDWR)
    with mmap.mmap(fd, PAGE) as mapping:
        os.close(fd)
        mapping[:5] = b"after"
        os.unlink("it")
        mapping[5:10] = b"later"
        r.note("content", mapping[:])


@case(flags=(os.O_RDONLY, os.O_RDWR))
def private_mapping(r: Recorder, flags: int) -> None:
    write("it", pattern(PAGE))
    fd = os.open("it", flags)
    with mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        mapping[:5] = b"alone"
        r.note("in the mapping", mapping[:10])
    r("in the file", os.pread, fd, 10, 0)


@case()
def touching_a_mapping_beyond_the_end_is_a_bus_error(r: Recorder) -> None:
    write("it", pattern(2 * PAGE))
    fd = os.open("it", os.O_RDWR)
    mapping = mmap.mmap(fd, 2 * PAGE)
    os.ftruncate(fd, 10)
    r.note("within the last page", mapping[5:20])
    child = os.fork()
    if child == 0:
        os._exit(mapping[PAGE])
    r.note("a child that touches it", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@case()
def a_mapping_sees_a_truncation_and_regrowth(r: Recorder) -> None:
    write("it", b"x" * PAGE)
    fd = os.open("it", os.O_RDWR)
    with mmap.mmap(fd, PAGE) as mapping:
        os.ftruncate(fd, 100)
        os.ftruncate(fd, PAGE)
        r.note("zeros after the cut", mapping[90:110])


# From file to file -------------------------------------------------------------------------------


@case(length=(0, 1, 5000, 1 << 20), at=(0, 100, 4096), to=(0, 7, 1 << 16))
def copy_file_range(r: Recorder, length: int, at: int, to: int) -> None:
    write("from", pattern(200000))
    write("to", b"t" * 1000)
    source, target = os.open("from", os.O_RDONLY), os.open("to", os.O_RDWR)
    copied = 0
    while copied < length and (more := os.copy_file_range(source, target, length - copied, at + copied, to + copied)):
        copied += more
    r.note("copied", copied)
    r("content", read, "to")


@case()
def copy_file_range_refusals(r: Recorder) -> None:
    write("it", pattern(PAGE))
    reading, writing = os.open("it", os.O_RDONLY), os.open("it", os.O_RDWR)
    appending = os.open("it", os.O_WRONLY | os.O_APPEND)
    directory = os.open(".", os.O_RDONLY)
    r("onto itself, overlapping", os.copy_file_range, writing, writing, 100, 0, 50)
    r("to a reader", os.copy_file_range, writing, reading, 10, 0, 100)
    r("to an appender", os.copy_file_range, reading, appending, 10, 0, 100)
    r("from a directory", os.copy_file_range, directory, writing, 10)
    r("content", read, "it")


@case(length=(0, 1, 4096, 100000, 200001))
def sendfile(r: Recorder, length: int) -> None:
    write("from", pattern(200000))
    source, target = os.open("from", os.O_RDONLY), os.open("to", os.O_RDWR | os.O_CREAT)
    sent = 0
    while sent < length and (more := os.sendfile(target, source, sent, length - sent)):
        sent += more
    r.note("sent", sent)
    r("content", read, "to")


@case(length=(1, 4096, 60000))
def splice(r: Recorder, length: int) -> None:
    write("from", pattern(60000))
    source, target = os.open("from", os.O_RDONLY), os.open("to", os.O_RDWR | os.O_CREAT)
    reading, writing = os.pipe()
    moved = 0
    while moved < length:
        count = os.splice(source, writing, min(length - moved, 8192), offset_src=moved)
        done = 0
        while done < count:
            done += os.splice(reading, target, count - done, offset_dst=moved + done)
        moved += count
    r("content", read, "to")


@case()
def many_small_writes(r: Recorder) -> None:
    fd = os.open("it", os.O_RDWR | os.O_CREAT)
    for index in range(1000):
        os.write(fd, struct.pack("<I", index))
    for index in range(0, 1000, 3):
        os.pwrite(fd, b"----", index * 4)
    r("content", os.pread, fd, 10000, 0)


@case()
def ioctls(r: Recorder) -> None:
    write("it", pattern(PAGE))
    fd = os.open("it", os.O_RDWR)
    os.lseek(fd, 100, os.SEEK_SET)
    for name, request in (("FS_IOC_GETFLAGS", 0x80086601), ("FS_IOC_GETVERSION", 0x80087601), ("odd", 0x1234)):
        r.quietly(name, fcntl.ioctl, fd, request, bytes(8))
    r("FIONREAD", lambda: fcntl.ioctl(fd, 0x541B, bytes(4)))
