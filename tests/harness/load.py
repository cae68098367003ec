"""A process that uses a mount all the time, and notices every error and every byte that is not what it wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

_PROGRAM = r"""
import os, sys, time, itertools
directory, name = sys.argv[1:]
fd = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT, 0o644)
print("ready", flush=True)
longest, count = 0.0, 0
for turn in itertools.count():
    begin = time.monotonic()
    block = b"%016d" % turn * 256
    os.pwrite(fd, block, turn % 16 * 4096)
    assert os.pread(fd, 4096, turn % 16 * 4096) == block, "read other data than was written"
    if turn % 8 == 0:
        os.fsync(fd)
        assert os.fstat(fd).st_nlink == 1
    one, two = (f"{directory}/{name}.{turn}.{part}" for part in ("a", "b"))
    new = os.open(one, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(new, block)
    os.close(new)
    os.rename(one, two)
    with open(two, "rb") as file:
        assert file.read() == block, "a renamed file has other content"
    os.unlink(two)
    longest, count = max(longest, time.monotonic() - begin), count + 1
    if os.path.exists(sys.argv[1] + "/stop"):
        break
os.close(fd)
print(count, longest, flush=True)
"""


class Load:
    """One such process.  It ends when there is a file ``stop`` in the directory, and fails at the first error."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, directory, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()[1]

    def check(self) -> None:
        """Raise AssertionError if it has failed."""
        if self.process.poll() is not None:
            raise AssertionError(f"the load ended: {self.process.communicate()[1]}")

    def finish(self) -> tuple[int, float]:
        """Return how many turns it made, and how many seconds the longest took."""
        said, complaint = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complaint
        count, longest = said.split()
        return int(count), float(longest)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
