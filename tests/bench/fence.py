"""How long it takes to cut off everybody who has many images open, as when a host cannot renew its leases.

A process has the images open for writing and tries each until that fails, so the last failure is the end of all
writing.  Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio
from bench import MODES, complain
from harness import logs
from harness.host import Host, close_all

from lockfs.protocol import messages as m
from lockfs.protocol.client import LockdClient

HOLDER = r"""
import os, resource, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
directory, count = sys.argv[1], int(sys.argv[2])
fds = [os.open(f"{directory}/{number}", os.O_RDWR | os.O_CREAT) for number in range(count)]
for fd in fds: os.pwrite(fd, b"1", 0)
print("ready", flush=True)
sys.stdin.readline()
for fd in fds:
    try:
        while os.pwrite(fd, b"1", 0): time.sleep(0.0005)
    except OSError: pass
print(time.monotonic(), flush=True)
"""


def measure(host: Host, directory: Path, count: int) -> tuple[float, float]:
    """Return the seconds after which no image can be written to, and after which lockd says so."""
    command = [sys.executable, "-c", HOLDER, str(directory), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        if holder.stdin is None or holder.stdout is None or holder.stdout.readline() != "ready\n":
            raise RuntimeError("the images cannot be opened")
        holder.stdin.write("\n")
        holder.stdin.flush()
        begin = time.monotonic()
        trio.run(fence, host, [directory / str(number) for number in range(count)])
        answered = time.monotonic() - begin
        return float(holder.stdout.readline()) - begin, answered


async def fence(host: Host, images: list[Path]) -> None:
    """Have lockd fence images.  Raises RuntimeError if it could not."""
    client = await LockdClient.connect(str(host.run_dir))
    call = m.Fence([m.FenceTarget(path=str(image)) for image in images], "to see how long it takes")
    answer, _ = await client.call(call, m.Fenced)
    await client.aclose()
    if not all(each.fenced and not each.killed for each in answer.results) or len(answer.results) != len(images):
        raise RuntimeError(f"not all images were fenced: {answer.results}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests/bench/run fence", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round: a first impression")
    parser.add_argument("--images", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--directory", default="/var/tmp", help="where to put the files (default: %(default)s)")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 5
    print(f"Fencing {arguments.images:,} open images (medians of {rounds}):\n")
    print("| data | no write succeeds any more | lockd says so |\n|---|---:|---:|")
    for data in MODES:
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="lockfs-bench.") as name:
            top = Path(name)
            host = Host("bench", top / "run", variables={"LOCKFS_IDLE_EXIT": "60"})
            host.run_dir.mkdir(mode=0o700)
            try:
                (top / "source").mkdir()
                mount = host.mount(top / "source", top / "mount", f"backend=fcntl-lockd,data={data}")
                times = [measure(host, mount.path, arguments.images) for _ in range(rounds)]
                last, answered = (statistics.median(each) for each in zip(*times, strict=True))
                print(f"| {data} | {last * 1000:,.0f} ms | {answered * 1000:,.0f} ms |", flush=True)
            finally:
                complain(close_all([host], logs.Expected({"lost the lock|: its handles fail|does not fence|is dead": True})))


if __name__ == "__main__":
    main()
