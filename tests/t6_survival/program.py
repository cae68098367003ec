"""A program that uses files of a mount without pause, and checks that each call did what it was to do, once.

It stops at the first thing that is wrong, and says so.  Run as a program: ``program.py DIRECTORY``; a line on standard
input ends it, and then it prints one line of JSON: what it did how often, the longest pause of each kind of call, and
what was wrong.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BLOCK = 512
BLOCKS = 64


class Wrong(Exception):
    """A call succeeded, but its effect is not there, or there twice."""


class Program:
    """Its threads each have files of their own."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.calls: Counter[str] = Counter()
        self.pauses: dict[str, list[float]] = defaultdict(list)
        self.wrong: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        works: list[Callable[[random.Random], Iterator[None]]] = [
            self.keep_a_file, self.keep_an_unlinked_file, self.make_and_remove, self.rename, self.append, self.directories,
            self.attributes,
        ]
        threads = [threading.Thread(target=self.work, args=(each, number)) for number, each in enumerate(works)]
        for thread in threads:
            thread.start()
        sys.stdin.readline()
        self.ended.set()
        for thread in threads:
            thread.join()
        pauses = {kind: sorted(each)[-10:] for kind, each in self.pauses.items()}
        print(json.dumps({"calls": self.calls, "pauses": pauses, "wrong": self.wrong}), flush=True)

    def work(self, what: Callable[[random.Random], Iterator[None]], number: int) -> None:
        try:
            for _ in what(random.Random(number)):
                if self.ended.is_set() or self.wrong:
                    return
                time.sleep(0.002)  # leave something of the machine to the daemons
        except Exception:
            self.wrong.append(f"{what.__name__}: {traceback.format_exc()}")

    @contextmanager
    def call(self, kind: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.calls[kind] += 1
        self.pauses[kind].append(time.monotonic() - begin)
        if len(self.pauses[kind]) > 10_000:
            self.pauses[kind] = sorted(self.pauses[kind])[-100:]

    # What it does ----------------------------------------------------------------------------------

    def keep_a_file(self, choice: random.Random) -> Iterator[None]:
        """Write to a file that stays open, and read it back; compare what is there with what should be."""
        path = os.path.join(self.directory, "kept")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        yield from self.use(choice, fd, links=1)
        os.close(fd)

    def keep_an_unlinked_file(self, choice: random.Random) -> Iterator[None]:
        """Do the same to a file without a name."""
        path = os.path.join(self.directory, "unlinked")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(path)
        yield from self.use(choice, fd, links=0)
        os.close(fd)

    def use(self, choice: random.Random, fd: int, links: int) -> Iterator[None]:
        content = bytearray(BLOCK * BLOCKS)
        with self.call("ftruncate"):
            os.ftruncate(fd, len(content))
        while True:
            at = choice.randrange(BLOCKS) * BLOCK
            block = choice.randbytes(BLOCK)
            with self.call("data"):
                if os.pwrite(fd, block, at) != BLOCK:
                    raise Wrong("a short write")
            content[at : at + BLOCK] = block
            at = choice.randrange(BLOCKS) * BLOCK
            with self.call("data"):
                found = os.pread(fd, BLOCK, at)
            if found != content[at : at + BLOCK]:
                raise Wrong(f"block {at // BLOCK} has another content")
            if choice.random() < 0.1:
                with self.call("fsync"):
                    os.fsync(fd)
            if choice.random() < 0.1:
                with self.call("fstat"):
                    info = os.fstat(fd)
                if (info.st_size, info.st_nlink) != (len(content), links):
                    raise Wrong(f"fstat: {info.st_size} bytes, {info.st_nlink} links")
            if choice.random() < 0.01 and os.pread(fd, len(content) + 1, 0) != content:
                raise Wrong("another content")
            yield

    def make_and_remove(self, choice: random.Random) -> Iterator[None]:
        """Make a file that must not be there, fill it, and remove it."""
        for number in range(1 << 30):
            path = os.path.join(self.directory, f"new{number}")
            with self.call("create"):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(fd, b"content")
            with self.call("close"):
                os.close(fd)
            with self.call("open"):
                fd = os.open(path, os.O_RDWR | os.O_TRUNC)
            if os.fstat(fd).st_size:
                raise Wrong("O_TRUNC did not truncate")
            os.close(fd)
            with self.call("unlink"):
                os.unlink(path)
            if os.path.exists(path):
                raise Wrong("unlink did not unlink")
            yield

    def rename(self, choice: random.Random) -> Iterator[None]:
        """Rename a file to and fro, over another one now and then; make a link of it, and remove that."""
        one, two, link = (os.path.join(self.directory, name) for name in ("one", "two", "link"))
        fd = os.open(one, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        ino = os.fstat(fd).st_ino
        while True:
            if choice.random() < 0.3:
                os.close(os.open(two, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with self.call("rename"):
                os.rename(one, two)
            if os.path.exists(one) or os.stat(two).st_ino != ino:
                raise Wrong("rename did not rename")
            with self.call("link"):
                os.link(two, link)
            if os.fstat(fd).st_nlink != 2:
                raise Wrong("link did not link")
            with self.call("unlink"):
                os.unlink(link)
            if os.fstat(fd).st_nlink != 1:
                raise Wrong(f"unlink left {os.fstat(fd).st_nlink} links")
            one, two = two, one
            yield

    def append(self, choice: random.Random) -> Iterator[None]:
        """Append to a file; nothing may be missing, nothing there twice."""
        path = os.path.join(self.directory, "appended")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        for number in range(1 << 30):
            with self.call("data"):
                os.write(fd, b"%07d\n" % number)
            if number % 50 == 0:
                with self.call("fstat"):
                    size = os.fstat(fd).st_size
                if size != 8 * (number + 1):
                    raise Wrong(f"{size} bytes after {number + 1} appends of 8")
                if os.pread(fd, 8, 8 * number) != b"%07d\n" % number:
                    raise Wrong("what was appended is not there")
            yield

    def directories(self, choice: random.Random) -> Iterator[None]:
        """Make directories, links and nodes, list and remove them."""
        for number in range(1 << 30):
            top = os.path.join(self.directory, f"directory{number}")
            with self.call("mkdir"):
                os.mkdir(top)
            names = [f"entry{n}" for n in range(5)]
            for name in names[:3]:
                with self.call("symlink"):
                    os.symlink(name * 3, os.path.join(top, name))
            for name in names[3:]:
                with self.call("mknod"):
                    os.mkfifo(os.path.join(top, name))
            with self.call("list"):
                found = os.listdir(top)
            if sorted(found) != names:
                raise Wrong(f"listed {sorted(found)}")
            if os.readlink(os.path.join(top, "entry0")) != "entry0" * 3:
                raise Wrong("readlink")
            for name in names:
                os.unlink(os.path.join(top, name))
            with self.call("rmdir"):
                os.rmdir(top)
            yield

    def attributes(self, choice: random.Random) -> Iterator[None]:
        """Set and read attributes, extended ones that must or must not be there among them."""
        path = os.path.join(self.directory, "attributes")
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        for number in range(1 << 30):
            with self.call("setxattr"):
                os.setxattr(path, "user.number", b"%d" % number, os.XATTR_CREATE)
            if os.getxattr(path, "user.number") != b"%d" % number:
                raise Wrong("getxattr")
            with self.call("removexattr"):
                os.removexattr(path, "user.number")
            with self.call("truncate"):
                os.truncate(path, number % 1000)
            with self.call("chmod"):
                os.chmod(path, 0o600 | number % 64)
            info = os.stat(path)
            if (info.st_size, info.st_mode & 0o777) != (number % 1000, 0o600 | number % 64):
                raise Wrong(f"size {info.st_size}, mode {info.st_mode:o}")
            yield


if __name__ == "__main__":
    Program(sys.argv[1]).run()
