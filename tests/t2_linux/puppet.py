"""A process that does what a test tells it, line of Python by line, and lets nothing go by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

_PROGRAM = r"""
import ctypes, json, os, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.syscall.restype = ctypes.c_long
RW, RO, SHARED, PRIVATE = 3, 1, 1, 2

def checked(result):
    if result in (-1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def mapped(fd, protection, kind, close=True):
    "Map the first page of a file; unlike the module mmap, without a descriptor of its own."
    address = checked(libc.mmap(None, 4096, protection, kind, fd, 0))
    if close:
        os.close(fd)
    return address

def registered(fds):
    "Register files with a new io_uring ring and close them."
    ring = checked(libc.syscall(425, 4, ctypes.create_string_buffer(120)))
    checked(libc.syscall(427, ring, 2, (ctypes.c_int * len(fds))(*fds), len(fds)))
    for fd in fds:
        os.close(fd)
    return ring

def in_thread(work):
    "Run work in a thread that never ends; return when it has been done."
    done = threading.Event()
    def run():
        work()
        done.set()
        threading.Event().wait()
    threading.Thread(target=run, daemon=True).start()
    done.wait()

def serve():
    for line in sys.stdin:
        source = json.loads(line)
        try:
            try:
                code = compile(source, "<told>", "eval")
            except SyntaxError:
                exec(source, globals())
                answer = None
            else:
                answer = eval(code, globals())
            print(json.dumps(["ok", answer]), flush=True)
        except Exception as error:
            print(json.dumps(["error", repr(error)]), flush=True)
    os._exit(0)

def main_thread_exits():
    "Go on in another thread: the first one becomes a zombie."
    def later():
        time.sleep(0.2)
        print(json.dumps(["ok", None]), flush=True)
        serve()
    threading.Thread(target=later).start()
    libc.syscall(60 if os.uname().machine == "x86_64" else 93, 0)

serve()
"""


class Puppet:
    """One such process; ended by SIGKILL at the end of the block.  `pid` is what this process knows it by."""

    def __init__(self, *prefix: str | Path) -> None:
        command = [*prefix, sys.executable, "-c", _PROGRAM]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # What a helper such as unshare(1) starts has another id than the helper; /proc is that of this process.
        self.pid = int(self.tell("os.readlink('/proc/self')"))

    def tell(self, source: str, **values: Any) -> Any:
        """Have an expression evaluated or statements executed, with *values* as globals; return the value."""
        assert self.process.stdout is not None
        answer = None
        for each in [*(f"{name} = {value!r}" for name, value in values.items()), source]:
            self.begin(each)
            kind, answer = json.loads(self.process.stdout.readline())
            assert kind == "ok", answer
        return answer

    def begin(self, source: str) -> None:
        """Tell without waiting for an answer, which may never come."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(source) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait(20)
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self) -> Puppet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
