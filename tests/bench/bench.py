"""Measures what a mount costs, as ratios to the directory that it shows.

All targets are measured in alternation within one run, and the median of each counts, so that other load on the machine
falls on all alike.  Absolute times are those of the machine; the ratios travel better.  Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import logs, mounts, processes
from harness.host import Host, close_all

from lockfs.options import OPTIONS

FILES = 10_000
DATA_BYTES = 64 << 20
HELD = 2000

OPERATIONS = {
    "stat": ("stat", 2000),
    "open-read": ("open + close for reading", 1000),
    "open-write": ("open + close for writing", 500),
    "create": ("create + unlink", 300),
    "list": ("list 10,000 files", 1),
    "read-1m": ("read 1 MiB, in order", 100),
    "write-1m": ("write 1 MiB, in order", 60),
    "read-4k": ("read 4 KiB, at random", 2000),
    "write-4k": ("write 4 KiB, at random", 2000),
}
"""What is measured: its name for people, and how many rounds one measurement has."""


@dataclass
class Target:
    """One column of the table: `directory` is where it is used."""

    name: str
    directory: Path


def kinds_of_mounts() -> Mapping[str, str]:
    """Return the mounts to measure, with the options of each."""
    found = {"nop": "backend=nop", "fcntl-lockd": "backend=fcntl-lockd"}
    if any(option.name == "data" for option in OPTIONS):
        found = {f"{name}, {data}": f"{options},data={data}" for name, options in found.items() for data in MODES}
    return found


MODES = ("gated", "passthrough")


def fill(directory: Path) -> Path:
    """Make the files that the loops use."""
    directory.mkdir()
    for number in range(FILES):
        (directory / f"file-{number:07}").touch()
    with open(directory / "data", "wb") as data:
        for _ in range(DATA_BYTES >> 20):
            data.write(b"d" * (1 << 20))
    return directory


@contextmanager
def targets(top: Path) -> Iterator[list[Target]]:
    """Mount everything that is compared; the first is the directory itself."""
    found = [Target("directory", fill(top / "plain"))]
    hosts = []
    with ExitStack() as stack:
        (top / "bindfs").mkdir()
        subprocess.run(["bindfs", fill(top / "bindfs-source"), top / "bindfs"], check=True)
        stack.callback(mounts.umount, top / "bindfs")
        found.append(Target("bindfs", top / "bindfs"))
        try:
            for number, (name, options) in enumerate(kinds_of_mounts().items()):
                host = Host(f"bench-{number}", top / f"h{number}", variables={"LOCKFS_IDLE_EXIT": "60"})
                host.run_dir.mkdir(mode=0o700)
                hosts.append(host)
                mount = host.mount(fill(top / f"source-{number}"), top / f"mount-{number}", options)
                found.append(Target(name, mount.path))
            yield found
        finally:
            complain(close_all(hosts, logs.Expected()))


def measure(loops: Path, found: list[Target], rounds: int, scale: float) -> dict[str, dict[str, float]]:
    """Return the median time of each operation on each target, in nanoseconds."""
    times: dict[str, dict[str, list[float]]] = {op: {each.name: [] for each in found} for op in OPERATIONS}
    for turn in range(rounds):
        for operation, (_, count) in OPERATIONS.items():
            # Another one is the first each time, or the first would always pay for what the others find cached.
            for target in found[turn % len(found) :] + found[: turn % len(found)]:
                command = [loops, operation, target.directory, str(max(1, int(count * scale)))]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                times[operation][target.name].append(float(done.stdout))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return {op: {name: statistics.median(each) for name, each in row.items()} for op, row in times.items()}


def memory(loops: Path, source: Path, top: Path, options: str, operation: str) -> list[float]:
    """Return by how many bytes (proportional set size) mount daemon and lockd grow for one open file.

    The host is a new one: a daemon that had as many files open before reuses the memory, and does not grow.
    """
    host = Host("bench", Path(tempfile.mkdtemp(dir=top)))
    try:
        mount = host.mount(source, top / "memory", options)
        daemons = [mount.daemon(), host.lockd()]
        with holding(loops, operation, mount.path, HELD // 20):
            pass
        before = [processes.memory(pid)["Pss"] for pid in daemons]
        with holding(loops, operation, mount.path, HELD):
            after = [processes.memory(pid)["Pss"] for pid in daemons]
        return [(now - then) / HELD for now, then in zip(after, before, strict=True)]
    finally:
        complain(close_all([host], logs.Expected()))


@contextmanager
def holding(loops: Path, operation: str, directory: Path, count: int) -> Iterator[None]:
    """Have another process keep files open."""
    command = [loops, operation, directory, str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        if not holder.stdout or holder.stdout.readline() != "open\n":
            raise RuntimeError(f"{command} could not open its files")
        yield


def complain(complaints: list[str]) -> None:
    """Say what was not as it should be; the figures stand all the same."""
    for complaint in complaints:
        print(f"warning: {complaint}", file=sys.stderr)


def time_table(times: dict[str, dict[str, float]], names: list[str]) -> list[str]:
    """Return the table of times in Markdown."""
    lines = [
        f"| operation | {names[0]} | " + " | ".join(names[1:]) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for operation, (label, _) in OPERATIONS.items():
        base = times[operation][names[0]]
        ratios = " | ".join(f"{times[operation][name] / base:.2f}" for name in names[1:])
        lines.append(f"| {label} | {base / 1000:,.1f} µs | {ratios} |")
    return lines


def memory_table(loops: Path, source: Path, top: Path) -> list[str]:
    """Return the table of memory in Markdown."""
    lines = ["| for one file, KiB | mount daemon | lockd |", "|---|---:|---:|"]
    for name, options in kinds_of_mounts().items():
        for operation, label in (("hold-read", "open for reading"), ("hold-write", "open for writing, its lock held")):
            figures = [f"{grown / 1024:.1f}" for grown in memory(loops, source, top, options, operation)]
            lines.append(f"| {name}: {label} | {' | '.join(figures)} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a first impression")
    parser.add_argument("--directory", default="/var/tmp", help="where to put the files (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="lockfs-bench.") as name:
        top = Path(name)
        loops = top / "loops"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", loops, Path(__file__).with_name("loops.c")], check=True)
        with targets(top) as found:
            rounds, scale = (3, 0.25) if arguments.quick else (9, 1.0)
            times = measure(loops, found, rounds, scale)
            print("Time, as a multiple of that of the directory itself (median of alternating rounds, cached data):\n")
            print("\n".join(time_table(times, [each.name for each in found])))
        print(f"\nMemory that the daemons need for each of {HELD} open files (growth of the proportional set size):\n")
        print("\n".join(memory_table(loops, top / "plain", top)))


if __name__ == "__main__":
    main()
