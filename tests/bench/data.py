"""Measures data with fio: what a mount makes of the speed of the storage.

All targets show one and the same file, and take turns; each figure is the median, over the rounds, of the ratio to the
backing directory within one round.  Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import Target, complain
from harness import logs, mounts
from harness.host import Host, close_all

READ, RANDOM_READ = "--rw=rw --rwmixread=100", "--rw=randrw --rwmixread=100"
"""Reads by who has the file open for writing, too, as a virtual machine has its image."""
DIRECT = "--direct=1 --ioengine=libaio"
JOBS = {
    "read 1 MiB, in order, buffered": f"{READ} --bs=1M",
    "write 1 MiB, in order, buffered": "--rw=write --bs=1M",
    "read 4 KiB, at random, buffered": f"{RANDOM_READ} --bs=4k",
    "write 4 KiB, at random, buffered": "--rw=randwrite --bs=4k",
    "write 4 KiB, at random, each with fdatasync": "--rw=randwrite --bs=4k --fdatasync=1",
    "read 4 KiB, O_DIRECT, libaio, depth 1": f"{RANDOM_READ} --bs=4k {DIRECT} --iodepth=1",
    "write 4 KiB, O_DIRECT, libaio, depth 1": f"--rw=randwrite --bs=4k {DIRECT} --iodepth=1",
    "read 4 KiB, O_DIRECT, libaio, depth 16": f"{RANDOM_READ} --bs=4k {DIRECT} --iodepth=16",
    "write 4 KiB, O_DIRECT, libaio, depth 16": f"--rw=randwrite --bs=4k {DIRECT} --iodepth=16",
    "read 1 MiB, O_DIRECT, libaio, depth 16": f"{READ} --bs=1M {DIRECT} --iodepth=16",
    "write 1 MiB, O_DIRECT, libaio, depth 16": f"--rw=write --bs=1M {DIRECT} --iodepth=16",
    "read 4 KiB, at random, buffered; open for reading only": "--rw=randread --bs=4k",
}
SIZE = "64M"
"""What a guest uses all the time: the page cache has it, where there is one."""


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    rounds: int
    seconds: float


@contextmanager
def targets(top: Path) -> Iterator[list[Target]]:
    """Mount everything that is compared; the first is the backing directory."""
    source = top / "source"
    source.mkdir()
    found = [Target("directory", source)]
    hosts = []
    with ExitStack() as stack:
        (top / "bindfs").mkdir()
        # Else it clears O_DIRECT, and the page cache would be measured.
        subprocess.run(["bindfs", "--forward-odirect=512", source, top / "bindfs"], check=True)
        stack.callback(mounts.umount, top / "bindfs")
        try:
            for data in ("passthrough", "gated"):
                host = Host(f"bench-{data}", top / data, variables={"LOCKFS_IDLE_EXIT": "60"})
                host.run_dir.mkdir(mode=0o700)
                hosts.append(host)
                mount = host.mount(source, top / f"mount-{data}", f"backend=fcntl-lockd,data={data}")
                found.append(Target(data, mount.path))
            found.append(Target("bindfs", top / "bindfs"))
            yield found
        finally:
            complain(close_all(hosts, logs.Expected()))


def fio(directory: Path, job: str, seconds: float) -> float:
    """Run one job; return bytes per second."""
    command = [
        "fio", "--name=data", f"--filename={directory / 'image'}", f"--size={SIZE}", "--invalidate=0", "--time_based",
        f"--runtime={seconds}", "--output-format=json", "--randrepeat=0", "--ioengine=psync", *job.split(),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(result["read"]["bw_bytes"] + result["write"]["bw_bytes"])


def measure(found: list[Target], jobs: list[str], plan: Plan) -> dict[str, tuple[float, dict[str, float]]]:
    """Return for each job the median bytes per second of the directory, and the median ratio of each other target."""
    base: dict[str, list[float]] = {job: [] for job in jobs}
    ratios: dict[str, dict[str, list[float]]] = {job: {each.name: [] for each in found[1:]} for job in jobs}
    for turn in range(plan.rounds):
        for job in jobs:
            # Another one is the first each time.
            order = found[turn % len(found) :] + found[: turn % len(found)]
            speeds = {each.name: fio(each.directory, JOBS[job], plan.seconds) for each in order}
            base[job].append(speeds[found[0].name])
            for each in found[1:]:
                ratios[job][each.name].append(speeds[each.name] / speeds[found[0].name])
        print(f"round {turn + 1} of {plan.rounds}", file=sys.stderr)
    return {
        job: (statistics.median(base[job]), {name: statistics.median(each) for name, each in ratios[job].items()})
        for job in jobs
    }


def table(results: dict[str, tuple[float, dict[str, float]]], names: list[str]) -> list[str]:
    """Return the results in Markdown."""
    lines = ["| fio | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for job, (speed, ratios) in results.items():
        figures = " | ".join(f"{ratios[name]:.2f}" for name in names[1:])
        lines.append(f"| {job} | {speed / 1e6:,.0f} MB/s | {figures} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests/bench/run data", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a first impression")
    parser.add_argument("--directory", default="/var/tmp", help="where to put the files (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run (default: %(default)g)")
    parser.add_argument("--only", default="", help="only jobs with this in their names")
    arguments = parser.parse_args()
    plan = Plan(3, 0.7) if arguments.quick else Plan(7, arguments.seconds)
    jobs = [name for name in JOBS if arguments.only in name]
    temporary = tempfile.TemporaryDirectory(dir=arguments.directory, prefix="lockfs-bench.")
    with temporary as name, targets(Path(name)) as found:
        # What is measured is neither the allocation of blocks nor reading into the cache.
        fio(found[0].directory, "--rw=write --bs=1M --end_fsync=1", 1)
        results = measure(found, jobs, plan)
    print("Throughput, as a multiple of that of the directory itself (median of the ratios of alternating runs):\n")
    print("\n".join(table(results, [each.name for each in found])))


if __name__ == "__main__":
    main()
