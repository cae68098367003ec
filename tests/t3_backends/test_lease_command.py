"""``lockfs lease`` on files, directories and what the real sanlock makes of them."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import trio
from harness import processes
from harness.waiting import wait_until
from lockfs_paxos_lease.cli import lease, mend, places, survey
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.size import MIB, Geometry
from t3_backends import sanlock_daemon
from t3_backends.stations import Station, station

from lockfs.backend import Busy, Mode
from lockfs.cli.main import main
from lockfs.errors import LockUnavailable

PLAIN = Geometry()
EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED


def lockfs(*arguments: object, code: int = 0) -> str:
    """Run ``lockfs lease``; return what it prints."""
    output = io.StringIO()
    words = ["lockfs", "lease", *map(str, arguments)]
    with (
        pytest.MonkeyPatch.context() as patch,
        open(os.devnull) as nobody,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        patch.setattr(lease, "PAUSE", 0.05)
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "stdin", nobody)
        got = main()
    assert got == code, output.getvalue()
    return output.getvalue()


def as_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(lockfs(*arguments, "--json", code=code))


def changed(path: Path, offset: int, value: bytes = b"\xff\xff") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)
        os.fsync(file.fileno())


def make_volume(path: Path) -> Path:
    """Make a volume with sanlock's own tool: lockspace LS, index, and a lease."""
    path.write_bytes(b"")
    os.truncate(path, 8 * MIB)
    sanlock_daemon.direct("init", "-s", f"LS:0:{path}:0", "-o", "1")
    sanlock_daemon.direct("format", "-x", f"LS:{path}:1M")
    sanlock_daemon.direct("init", "-r", f"LS:RES1:{path}:3145728")
    sanlock_daemon.direct("update", "-x", f"LS:{path}:1M", "-e", "RES1:3145728")
    return path


@contextmanager
def in_use(path: Path, run_dir: Path) -> Iterator[sanlock_daemon.Daemon]:
    """Run a daemon that is host 1, and has the lease."""
    daemon = sanlock_daemon.Daemon("alpha", run_dir)
    try:
        daemon.client("add_lockspace", "-s", f"LS:1:{path}:0", "-o", "1")
        holder = daemon.command(f"LS:RES1:{path}:3145728", "/usr/bin/sleep", "600")
        try:
            # It turns into that program when it has the lease, and not a moment before.
            wait_until(lambda: processes.command_line(holder.pid)[:1] == ["/usr/bin/sleep"], 20, "the lease is held")
            yield daemon
        finally:
            holder.kill()
            holder.wait()
    finally:
        daemon.close()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return make_volume(tmp_path / "volume")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A volume whose lease a daemon has.  Joining takes seconds: all tests that change nothing share it."""
    path = make_volume(tmp_path_factory.mktemp("v") / "volume")
    with in_use(path, tmp_path_factory.mktemp("s") / "d"):
        yield path


def test_dump_tells_what_sanlocks_dump_does(held: Path) -> None:
    path = held
    areas = {area["offset"]: area for area in as_json("dump", path)["areas"]}
    assert {offset: area["kind"] for offset, area in areas.items()} == {
        0: "lockspace", MIB: "index", 2 * MIB: "lease", 3 * MIB: "lease",
    }  # fmt: skip
    (host,) = areas[0]["hosts"]
    assert (host["host_id"], host["name"], host["generation"], host["free"]) == (1, "alpha", 1, False)
    assert (areas[0]["lockspace"], areas[0]["takeover"], host["io_timeout"]) == ("LS", "sanlock", 1)
    assert areas[MIB]["leases"] == [{"number": 0, "name": "RES1", "offset": 3 * MIB}]
    there = areas[3 * MIB]
    assert (there["name"], there["held"], there["version"]) == ("RES1", True, 1)
    assert there["owner"] == {"host_id": 1, "generation": 1}
    # Record for record as sanlock has it.
    dumped = {int(line.split()[0]): line.split() for line in sanlock_daemon.direct("dump", path).splitlines()[1:]}
    theirs = dumped[3 * MIB]
    assert theirs[1:3] == ["LS", "RES1"]
    assert [int(each) for each in theirs[3:7]] == [int(there["timestamp"]), 1, 1, 1]
    (block,) = there["ballots"]
    shown = next(line for line in sanlock_daemon.direct("dump", path, "-f", "2").splitlines() if "mbal" in line).split()
    numbers = {name: int(shown[shown.index(name) + 1]) for name in ("mbal", "bal", "inp", "inp2", "inp3", "lver")}
    assert numbers == {name: block[name] for name in numbers}


def test_dump_and_list_for_people(held: Path) -> None:
    path = held
    text = lockfs("dump", path, "--ballots")
    assert f"{path}: lockspace LS, sanlock's timing, sectors of 512, areas of 1 MiB" in text
    assert "held by host 1 (generation 1) since" in text
    assert "MBAL" in text
    rows = [line.split() for line in lockfs("list", path).splitlines()]
    assert ["RES1", "held", "1", "1", f"{path}:3145728"] in rows
    assert lockfs("list", f"{path}:3M").splitlines()[1].split()[:2] == ["RES1", "held"]


def test_what_sanlock_makes_and_uses_is_found_right(held: Path) -> None:
    path = held
    assert lockfs("check", path) == "4 areas checked, no findings\n"


async def test_what_lockfs_makes_and_uses_is_found_right(storage: Path, tmp_path: Path) -> None:
    async def use(a: Station, b: Station) -> None:
        grant = await a.acquire()
        other = await b.acquire(name="other")
        assert lockfs("check", storage) == "3 areas checked, no findings\n"
        assert len(as_json("list", storage / ".lockfs/leases")["leases"]) == 2
        await a.release(grant)
        await b.release(other)
        assert lockfs("check", storage) == "3 areas checked, no findings\n"
        # While both are at work, too.
        with trio.move_on_after(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hammer, a)
                nursery.start_soon(hammer, b)
                while True:
                    found = await trio.to_thread.run_sync(lockfs, "check", storage)
                    assert found == "3 areas checked, no findings\n"

    async def hammer(host: Station) -> None:
        while True:
            try:
                with trio.CancelScope(shield=True):
                    await host.release(await host.acquire(SHARED if random.random() < 0.3 else EXCLUSIVE))
            except Busy:
                pass
            await trio.sleep(random.random() / 100)

    options = {"takeover": "6"}
    async with (
        station("host-a", storage, "paxos-lease", options, run_dirs=tmp_path / "r") as a,
        station("host-b", storage, "paxos-lease", options, run_dirs=tmp_path / "r") as b,
    ):
        await use(a, b)


def test_check_tells_what_is_wrong_and_where(volume: Path) -> None:
    changed(volume, 3 * MIB + 32)
    (found,) = as_json("check", volume, code=2)["findings"]
    assert (found["level"], found["record"], found["offset"], found["code"]) == ("error", "leader", 3 * MIB, -229)
    assert "checksum" in lockfs("check", volume, code=2)


@pytest.mark.parametrize(
    ("end", "code"), [(0, 0), (511, 1), (4096, 2), (MIB + 5, 0), (2 * MIB + 100, 2), (3 * MIB + MIB // 2, 2)]
)
def test_a_volume_that_is_cut_off(volume: Path, end: int, code: int) -> None:
    os.truncate(volume, end)
    assert "Traceback" not in lockfs("check", volume, code=code)


def mended(path: Path, waited: list[float]) -> list[str]:
    taken = survey.take(places.areas(places.parse(str(path))))
    return mend.carry_out(taken, mend.plan(taken), waited.append)


def test_a_request_record_is_mended(volume: Path) -> None:
    changed(volume, 3 * MIB + 512)
    assert "there is nobody to ask" in lockfs("repair", volume, code=1)
    lockfs("check", volume, code=2)
    assert "write an empty request record" in lockfs("repair", volume, "--yes")
    lockfs("check", volume)


def test_it_asks_before_it_writes(volume: Path) -> None:
    changed(volume, 3 * MIB + 512)
    for answer, code in ((b"no\n", 2), (b"y\n", 0)):
        ours, theirs = os.openpty()
        try:
            os.write(ours, answer)
            command = [sys.executable, "-m", "lockfs.cli.main", "lease", "repair", str(volume)]
            done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=60, check=False)
        finally:
            os.close(ours)
            os.close(theirs)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Write this now? [y/N]" in done.stdout
        lockfs("check", volume, code=code)


def test_a_ballot_block_and_a_dead_host_are_mended_and_sanlock_goes_on(volume: Path, tmp_path: Path) -> None:
    """Not the block of the holder, who writes it anew by itself."""
    path, offset = volume, 3 * MIB + PLAIN.host_offset(1)
    with in_use(path, tmp_path / "alpha") as daemon:
        changed(path, offset)
        said = lockfs("repair", path, "--yes", code=2)
        assert "host 1 holds the lease, and writes the block anew when it lets go" in said
        daemon.client("release", "-r", f"LS:RES1:{path}:3145728", "-p", str(holder_of(daemon)))
        lockfs("check", path)
        changed(path, offset)
        waited: list[float] = []
        assert mended(path, waited) == [f"{path}:3145728: host 1: write a ballot block that takes part in no ballot"]
        assert waited == [5]  # three times the io_timeout of 1 s, and 2
        lockfs("check", path)
        assert daemon.command(f"LS:RES1:{path}:3145728", "/usr/bin/true").wait(20) == 0
        lockfs("check", path)
        assert Leader.decode(path.read_bytes()[3 * MIB :]).lver == 2
    # That host dies, and its record is damaged.
    changed(path, 168)
    waited = []
    assert mended(path, waited) == [f"{path}: host 1: write a free host record"]
    assert waited == [8 * 1 + 60]
    record = Leader.decode(path.read_bytes())
    assert (record.owner_id, record.owner_generation, record.timestamp) == (1, 2, 0)
    lockfs("check", path)
    with in_use(path, tmp_path / "again"):
        assert Leader.decode(path.read_bytes()).owner_generation == 3
        lockfs("check", path)


def holder_of(daemon: sanlock_daemon.Daemon) -> int:
    line = next(line for line in daemon.client("status").splitlines() if line.startswith("r "))
    return int(line.split()[-1])


def test_nothing_is_mended_where_somebody_is_at_work(volume: Path) -> None:
    offset = 3 * MIB + PLAIN.host_offset(7)
    changed(volume, offset)
    taken = survey.take(places.areas(places.parse(str(volume))))

    def meanwhile(_: float) -> None:
        changed(volume, 3 * MIB + PLAIN.host_offset(9), b"\x09")

    with pytest.raises(LockUnavailable, match="has changed meanwhile"):
        mend.carry_out(taken, mend.plan(taken), meanwhile)
    assert volume.read_bytes()[offset : offset + 2] == b"\xff\xff"


def test_a_damaged_leader_is_left_to_a_person(volume: Path) -> None:
    changed(volume, 3 * MIB + 32)
    assert "nobody can tell from the storage what it should be" in lockfs("repair", volume, "--yes", code=2)
    assert volume.read_bytes()[3 * MIB + 32 : 3 * MIB + 34] == b"\xff\xff"


def test_what_is_there_is_not_overwritten_unawares(held: Path, tmp_path: Path) -> None:
    path = held
    making = ("--lockspace", "NEW", "--overwrite")
    assert "is a lockspace that hosts are in: 1" in lockfs("format", path, *making, code=1)
    data = tmp_path / "data"
    data.write_bytes(b"precious" * (MIB // 4))
    assert "has data that is nobody's lease already" in lockfs("format", data, "--lockspace", "NEW", code=1)
    assert data.read_bytes()[:8] == b"precious"
    lockfs("format", data, *making)
    assert as_json("dump", data)["areas"][0]["takeover"] == 16


@pytest.mark.parametrize(("sector", "align"), [(512, 1), (4096, 1), (4096, 2), (4096, 4), (4096, 8)])
def test_sanlock_uses_what_is_made_here(tmp_path: Path, sector: int, align: int) -> None:
    path = tmp_path / "volume"
    sizes = ("--sector", sector, "--align", align, "--lockspace", "LS", "--takeover", "sanlock")
    lockfs("format", path, *sizes, "--index", "--max-leases", 4, "--io-timeout", 1)
    offset = 3 * align * MIB
    lockfs("create", f"{path}:{offset}", *sizes, "--name", "RES1")
    assert "RES1" in sanlock_daemon.direct("dump", f"{path}:{offset}")
    assert "rindex_header" in sanlock_daemon.direct("dump", f"{path}:{align * MIB}", "-f", "1")
    assert [each["name"] for each in as_json("list", f"{path}:{offset}")["leases"]] == ["RES1"]


def test_it_is_a_command_of_lockfs(volume: Path) -> None:
    command = [sys.executable, "-m", "lockfs.cli.main", "lease", "list", str(volume)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "RES1" in done.stdout


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    for words in (
        ("format", tmp_path / "x", "--lockspace", "N" * 49),
        ("format", tmp_path / "x", "--lockspace", "N", "--takeover", "soon"),
        ("format", tmp_path / "x", "--lockspace", "N", "--sector", "512", "--align", "8"),
        ("create", f"{tmp_path / 'x'}:100", "--lockspace", "N", "--name", "A"),
        ("dump", tmp_path / "nothing"),
    ):
        assert "Traceback" not in lockfs(*words, code=1)
