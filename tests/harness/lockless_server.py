"""A filesystem whose byte locks fail: a FUSE server that speaks the raw protocol and answers each lock with
an errno.

``python lockless.py MOUNTPOINT ERRNO all|img`` mounts it, says "ready", and serves until it is unmounted.
It has one file, ``img``, and forgets at once what is created besides.  With ``img``, locks fail on that
file only. Protocol: linux/fuse.h.  No FUSE library is used, since those hide locks from the server or take
them themselves.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import struct
import sys

LOOKUP, FORGET, GETATTR, SETATTR, UNLINK, OPEN, STATFS, RELEASE = 1, 2, 3, 4, 10, 14, 17, 18
FLUSH, INIT, OPENDIR, RELEASEDIR, GETLK, SETLK, SETLKW, CREATE = 25, 26, 27, 29, 31, 32, 33, 35
INTERRUPT, BATCH_FORGET = 36, 42
POSIX_LOCKS = 1 << 1
ROOT, IMG, NEW = 1, 2, 3

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTR = struct.Struct("<6Q10I")
ENTRY = struct.Struct("<QQQQII")
OPENED = struct.Struct("<QIi")
NO_LOCK = struct.Struct("<QQII")
GRANTED = {SETLK: b"", SETLKW: b"", GETLK: NO_LOCK.pack(0, 0, 2, 0)}


def attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o644
    return ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def entry(node: int) -> bytes:
    # A name that is valid for long is not looked up again: so what was created can be removed.
    return ENTRY.pack(node, 0, 3600, 0, 0, 0) + attributes(node)


def answer(opcode: int, node: int, body: bytes, failing: range, error: int) -> bytes | int | None:
    """Return the body of the reply, an errno, or None for no reply."""
    if opcode == INIT:
        major, minor = struct.unpack_from("<II", body)
        return INIT_OUT.pack(major, min(minor, 31), 4096, POSIX_LOCKS, 12, 9, 4096, 1, 0, 0, 0)
    if opcode in (FORGET, BATCH_FORGET):
        return None
    if opcode == LOOKUP:
        return entry(IMG) if body == b"img\0" else errno.ENOENT
    if opcode in (GETATTR, SETATTR):
        return struct.pack("<QII", 0, 0, 0) + attributes(node)
    if opcode in (OPEN, OPENDIR):
        return OPENED.pack(0, 0, 0)
    if opcode == CREATE:
        return entry(NEW) + OPENED.pack(0, 0, 0)
    if opcode in (SETLK, SETLKW, GETLK):
        if node in failing and error:
            return error
        return GRANTED[opcode]
    if opcode in (RELEASE, RELEASEDIR, FLUSH, UNLINK):
        return b""
    if opcode == STATFS:
        return struct.pack("<5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
    return errno.ENOSYS


class Server:
    """Answers the requests that come from *fd*; locks on the nodes *failing* are answered as the module says."""

    def __init__(self, fd: int, failing: range, error: int) -> None:
        self.fd = fd
        self.failing = failing
        self.error = error
        self.hanging = not error
        self.unanswered: list[tuple[int, int]] = []

    def go_on(self, *_signal: object) -> None:
        """Answer what has been waiting, and hang no more."""
        self.hanging = False
        while self.unanswered:
            unique, opcode = self.unanswered.pop()
            self.reply(unique, GRANTED[opcode])

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.fd, 1 << 17)
            except OSError as caught:
                if caught.errno == errno.ENODEV:
                    return
                if caught.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
            if opcode in GRANTED and node in self.failing and self.hanging:
                self.unanswered.append((unique, opcode))
            elif opcode != INTERRUPT:
                self.reply(unique, answer(opcode, node, request[IN_HEADER.size :], self.failing, self.error))

    def reply(self, unique: int, answer: bytes | int | None) -> None:
        if answer is not None:
            code, body = (-answer, b"") if isinstance(answer, int) else (0, answer)
            os.write(self.fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), code, unique) + body)


def main(mountpoint: str, error: str, where: str) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    server = Server(fd, range(IMG, NEW + 1) if where == "all" else range(IMG, IMG + 1), int(error))
    signal.signal(signal.SIGUSR1, server.go_on)
    libc = ctypes.CDLL(None, use_errno=True)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"lockless", os.fsencode(mountpoint), b"fuse.lockless", 0, data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), mountpoint)
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
