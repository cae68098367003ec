"""A process that makes system calls on request: an owner of its own, as a virtual machine would be.

It runs with ``python -c``, so that what it holds is gone with it, also by SIGKILL.
"""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

_PROGRAM = r"""
import ctypes, errno, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
held = {}
def renameat2(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags):
        code = ctypes.get_errno(); raise OSError(code, os.strerror(code))
def opens(path, flags, mode=0o644):
    fd = os.open(path, flags, mode); held[fd] = fd; return fd
def fork_and(name, *args):
    pid = os.fork()
    if pid == 0:
        try: CALLS[name](*args); os._exit(0)
        except OSError as e: os._exit(e.errno)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
CALLS = dict(
    open=opens, close=lambda fd: os.close(held.pop(fd)), unlink=os.unlink, rename=os.rename, renameat2=renameat2,
    truncate=os.truncate, ftruncate=os.ftruncate, link=os.link, chmod=os.chmod, chown=os.chown, utime=lambda p: os.utime(p),
    setxattr=lambda p, n, v: os.setxattr(p, n, v.encode()), removexattr=os.removexattr,
    getxattr=lambda p, n: os.getxattr(p, n).decode(), read=lambda fd, n, o: os.pread(fd, n, o).decode("latin1"),
    write=lambda fd, d, o: os.pwrite(fd, d.encode("latin1"), o), stat=lambda p: os.stat(p).st_size, fork_and=fork_and,
    cat=lambda p: open(p, "rb").read().decode("latin1"), size=lambda fd: os.lseek(fd, 0, os.SEEK_END),
    mmap=lambda fd, n: mmap.mmap(fd, n).close(),
    setuid=lambda uid, gid: (os.setgroups([]), os.setgid(gid), os.setuid(uid)) and None,
)
for line in sys.stdin:
    name, args = json.loads(line)
    try: answer = ["ok", CALLS[name](*args)]
    except OSError as e: answer = ["error", e.errno]
    print(json.dumps(answer), flush=True)
"""


class Refused(Exception):
    """A system call of an actor failed; `name` is its errno, as "EBUSY"."""

    def __init__(self, call: str, code: int) -> None:
        self.name = errno.errorcode.get(code, str(code))
        super().__init__(f"{call}: {self.name} ({os.strerror(code)})")


class Actor:
    """One process.  Each method that is not here is a call of that name in it."""

    def __init__(self, prefix: Iterable[str | Path] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, call: str, *arguments: Any) -> None:
        """Begin a call; `answer` ends it."""
        assert self.process.stdin is not None
        plain = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in arguments]
        self.process.stdin.write(json.dumps([call, plain]) + "\n")
        self.process.stdin.flush()
        self._call = call

    def answered(self) -> bool:
        """Say whether the call that was begun has ended."""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def answer(self) -> Any:
        """Return what the call returned.  Raises `Refused`."""
        assert self.process.stdout is not None
        kind, value = json.loads(self.process.stdout.readline())
        if kind == "error":
            raise Refused(self._call, value)
        return value

    def call(self, call: str, *arguments: Any) -> Any:
        """Make one system call and return what it returned.  Raises `Refused`."""
        self.ask(call, *arguments)
        return self.answer()

    def result(self, call: str, *arguments: Any) -> str:
        """Make one system call; return "ok" or the name of its errno."""
        try:
            self.call(call, *arguments)
        except Refused as refused:
            return refused.name
        return "ok"

    def end(self) -> None:
        """Let it exit, which closes what it has open."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.end()

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None or (self.process.stdout is not None and not self.process.stdout.closed):
            self.end()
