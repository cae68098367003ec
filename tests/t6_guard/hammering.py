"""One of the processes that hammer images: open for writing, leave a mark, see that it stays, close, again and again.

What happened goes to a log on another filesystem by single appends, each a line of JSON.  Times are CLOCK_MONOTONIC, which is
the same for all processes of a machine.  Run as a program: ``hammering.py NUMBER LOG SECONDS IMAGE...``.
"""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import time


def hammer(number: int, log: int, seconds: float, images: list[str]) -> None:
    """Hammer *images* for a while."""
    choice = random.Random(number)
    end = time.monotonic() + seconds
    step = 0
    while time.monotonic() < end:
        step += 1
        image = choice.choice(images)
        asked = time.monotonic()
        try:
            fd = os.open(image, os.O_RDWR)
        except OSError as error:
            if error.errno != errno.EBUSY:
                say(log, "failed", number, image, asked, time.monotonic(), detail=str(error))
                return
            say(log, "refused", number, image, asked, time.monotonic())
            continue
        got = time.monotonic()
        wrong = leave_a_mark(fd, number, step, choice.uniform(0, 0.02))
        # The time of leaving is taken before close: from here on another may have the image.
        left = time.monotonic()
        os.close(fd)
        say(log, "held", number, image, got, left, asked=asked, detail=wrong)


def leave_a_mark(fd: int, number: int, step: int, pause: float) -> str:
    """Write who we are, see for a while that nobody else writes; return what was wrong, if anything."""
    mark = b"%08d %08d\n" % (number, step)
    os.pwrite(fd, mark, 0)
    deadline = time.monotonic() + pause
    while True:
        seen = os.pread(fd, len(mark), 0)
        if seen != mark:
            return f"wrote {mark!r} and found {seen!r}"
        if time.monotonic() >= deadline:
            return ""
        time.sleep(0.002)


def say(log: int, what: str, number: int, image: str, begin: float, end: float, **more: object) -> None:
    """Append one event."""
    name = os.path.basename(image)
    event = {"what": what, "who": number, "image": name, "begin": begin, "end": end, **more}
    os.write(log, json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    hammer(
        int(sys.argv[1]),
        os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
        float(sys.argv[3]),
        sys.argv[4:],
    )
