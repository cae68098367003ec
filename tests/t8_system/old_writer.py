"""A program that has an image open and writes to it without end, whatever errors it gets.

``old_writer.py IMAGE direct|buffered``: with ``direct`` it writes from the start on, past its own cache; with
``buffered`` it writes the image once when it is told so by a line, says "written", and flushes nothing.  It says "ready"
first, and ``fenced TIME`` (CLOCK_BOOTTIME) when the file is bad for the first time.  That it finds out with writes of
nothing, which ask nothing of the storage.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time

BLOCK = 4096
BLOCKS = 16
MARK = b"A"
PAUSE = 0.02
"""Seconds between two writes: what is tested is not how much the storage can take."""


def watch(fd: int) -> None:
    """Say when the file is bad."""
    while True:
        try:
            os.pwrite(fd, b"", 0)
        except OSError:
            print(f"fenced {time.clock_gettime(time.CLOCK_BOOTTIME)}", flush=True)
            return
        time.sleep(0.01)


def write(fd: int, buffer: mmap.mmap) -> None:
    """Write all of the image."""
    for number in range(BLOCKS):
        try:
            os.pwritev(fd, [buffer], number * BLOCK)
        except OSError:
            pass
        time.sleep(PAUSE)


def main(path: str, how: str) -> None:
    """Write until the end."""
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if how == "direct" else 0))
    buffer = mmap.mmap(-1, BLOCK)
    buffer[:] = MARK * BLOCK
    if how == "direct":
        write(fd, buffer)
    print("ready", flush=True)
    if how == "buffered":
        sys.stdin.readline()
        write(fd, buffer)
        print("written", flush=True)
    threading.Thread(target=watch, args=(fd,)).start()
    while True:
        write(fd, buffer)


if __name__ == "__main__":
    main(*sys.argv[1:])
