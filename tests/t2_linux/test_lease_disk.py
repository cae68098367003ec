"""Disk I/O for leases: direct, whole, and limited in time although a thread may hang for ever."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lockfs_paxos_lease import driver
from lockfs_paxos_lease.disk.area import AreaIO, open_area
from lockfs_paxos_lease.disk.call import Steps, call
from lockfs_paxos_lease.disk.file import DiskFile, Disks
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.actions import (
    Area,
    DiskError,
    IOFailed,
    IOTimeout,
    NotIssued,
    Operation,
    Read,
    Settle,
    Sleep,
    Write,
)
from t3_backends.lease_storage import Trouble

NEVER = float("inf")
SECTOR = 512
SOON = 0.05
LATER = 30.0


@pytest.fixture
def path(storage: Path) -> Path:
    file = storage / "area"
    file.write_bytes(os.urandom(1 << 20))
    return file


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    made = Trouble()
    yield made
    made.heal()


async def area_on(trouble: Trouble, path: Path, threads: int = 4) -> AreaIO:
    return await open_area(trouble, Lane(threads), driver.boottime, str(path), timeout=LATER)


async def until(condition: object) -> None:
    with trio.fail_after(LATER):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.005)


# Files -------------------------------------------------------------------------------------------


def test_it_goes_past_the_page_cache(path: Path) -> None:
    file = Disks().open(str(path))
    flags = int(next(
        line.split()[1] for line in Path(f"/proc/self/fdinfo/{file.fd}").read_text().splitlines() if line.startswith("flags")
    ), 8)  # fmt: skip
    assert flags & os.O_DIRECT
    assert flags & os.O_DSYNC
    assert flags & os.O_CLOEXEC
    file.close()


def test_what_is_written_is_read_at_any_size(path: Path) -> None:
    file = Disks().open(str(path))
    whole = path.read_bytes()
    assert file.read(0, 1 << 20) == whole
    assert file.read(SECTOR * 3, SECTOR) == whole[SECTOR * 3 : SECTOR * 4]
    for offset, length in ((0, SECTOR), (SECTOR * 5, SECTOR * 3), (4096, 4096), (0, 1 << 20)):
        data = os.urandom(length)
        file.write(offset, data)
        assert file.read(offset, length) == data
        assert path.read_bytes()[offset : offset + length] == data
    file.close()


def test_past_the_end_is_an_error_and_not_less(path: Path) -> None:
    file = Disks().open(str(path))
    with pytest.raises(OSError, match="short read: 512 of 1024") as caught:
        file.read((1 << 20) - SECTOR, 2 * SECTOR)
    assert caught.value.errno == errno.EIO
    file.close()


def test_what_is_not_a_whole_number_of_sectors_is_refused_by_the_kernel(path: Path) -> None:
    file = Disks().open(str(path))
    with pytest.raises(OSError):
        file.read(1, SECTOR)
    file.close()


def test_a_symlink_is_not_followed(path: Path, storage: Path) -> None:
    (storage / "link").symlink_to(path)
    with pytest.raises(OSError) as caught:
        Disks().open(str(storage / "link"))
    assert caught.value.errno == errno.ELOOP


def test_a_filesystem_without_direct_io_is_refused_unless_it_is_of_one_host(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", ram], check=True)
    try:
        (ram / "area").write_bytes(bytes(4096))
        for fstype in ("nfs4", "ext4", ""):
            with pytest.raises(OSError, match="O_DIRECT"):
                Disks(fstype).open(str(ram / "area"))
        file = Disks("ramfs").open(str(ram / "area"))
        file.write(SECTOR, b"\x55" * SECTOR)
        assert file.read(SECTOR, SECTOR) == b"\x55" * SECTOR
        file.close()
    finally:
        subprocess.run(["umount", ram], check=True)


def test_on_a_block_device(path: Path) -> None:
    device = subprocess.run(
        ["losetup", "-f", "--show", path], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        file = Disks().open(device)
        data = os.urandom(SECTOR)
        file.write(SECTOR * 7, data)
        assert file.read(SECTOR * 7, SECTOR) == data
        file.close()
        assert path.read_bytes()[SECTOR * 7 : SECTOR * 8] == data
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_many_threads_do_not_share_a_buffer(path: Path) -> None:
    file = Disks().open(str(path))
    wrong: list[int] = []

    def work(number: int) -> None:
        mine = bytes([number]) * 4096
        for _ in range(50):
            file.write(number * 4096, mine)
            if file.read(number * 4096, 4096) != mine:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []
    file.close()


# The time limit ----------------------------------------------------------------------------------


async def test_a_call_returns_what_it_returns_or_raises() -> None:
    lane = Lane(1)
    assert await lane.call(lambda: 7, LATER) == 7
    with pytest.raises(ZeroDivisionError):
        await lane.call(lambda: 1 // 0, LATER)
    assert lane.busy == 0


async def test_one_that_hangs_is_left_behind_and_undone_when_it_comes_back() -> None:
    lane, well = Lane(2), threading.Event()
    undone: list[str] = []
    ended: list[str] = []
    with pytest.raises(Overdue) as caught:
        await lane.call(lambda: str(well.wait()), SOON, undo=undone.append, ended=lambda: ended.append("x"))
    assert caught.value.begun
    assert (lane.busy, undone, ended) == (1, [], [])
    assert await lane.call(lambda: "another", LATER) == "another"
    well.set()
    await until(lambda: not lane.busy)
    assert (undone, ended) == (["True"], ["x"])


async def test_one_that_found_no_thread_never_begins() -> None:
    lane, well = Lane(1), threading.Event()
    ran: list[str] = []
    ended: list[str] = []
    with pytest.raises(Overdue):
        await lane.call(well.wait, SOON)
    with pytest.raises(Overdue, match="no thread was free") as caught:
        await lane.call(lambda: ran.append("ran"), SOON, ended=lambda: ended.append("x"))
    assert not caught.value.begun
    assert ended == ["x"]
    well.set()
    await until(lambda: not lane.busy)
    assert ran == []


async def test_who_is_cancelled_leaves_it_behind_too() -> None:
    lane, well = Lane(1), threading.Event()
    undone: list[bool] = []
    with trio.move_on_after(SOON) as scope:
        await lane.call(well.wait, LATER, undo=undone.append)
    assert scope.cancelled_caught
    assert lane.busy == 1
    well.set()
    await until(lambda: undone)
    assert undone == [True]


# Areas -------------------------------------------------------------------------------------------


async def test_reads_and_writes_are_relative_to_the_area(path: Path) -> None:
    area = await open_area(Disks(), Lane(1), driver.boottime, str(path), start=4096, timeout=LATER)
    await area.write(SECTOR, b"\x77" * SECTOR, LATER, NEVER)
    assert path.read_bytes()[4096 + SECTOR : 4096 + 2 * SECTOR] == b"\x77" * SECTOR
    assert await area.read(SECTOR, SECTOR, LATER) == b"\x77" * SECTOR
    await area.close()


async def test_a_write_that_hangs_may_land_later_and_is_known_to_be_under_way(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    before = path.read_bytes()
    await area.settle(SOON)
    trouble.hangs = lambda what, _: what == "write"
    with pytest.raises(IOTimeout, match="cannot write: no answer within"):
        await area.write(0, b"\x11" * SECTOR, SOON, NEVER)
    with pytest.raises(IOTimeout, match="an earlier write still hangs"):
        await area.settle(SOON)
    # Reads go on meanwhile.
    assert await area.read(0, SECTOR, LATER) == before[:SECTOR]
    trouble.heal()
    await area.settle(LATER)
    assert await area.read(0, SECTOR, LATER) == b"\x11" * SECTOR
    await area.close()


async def test_a_read_that_hangs_is_not_awaited_by_settle(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    trouble.hangs = lambda what, _: what == "read"
    with pytest.raises(IOTimeout):
        await area.read(0, SECTOR, SOON)
    await area.settle(SOON)
    trouble.heal()
    await until(lambda: not trouble.waiting)
    await area.close()


async def test_a_write_for_which_no_thread_is_free_is_known_not_to_land(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path, threads=1)
    before = path.read_bytes()
    trouble.hangs = lambda what, _: what == "read"
    with pytest.raises(IOTimeout):
        await area.read(0, SECTOR, SOON)
    with pytest.raises(IOFailed, match="no thread was free"):
        await area.write(0, b"\x22" * SECTOR, SOON, NEVER)
    await area.settle(SOON)
    trouble.heal()
    await until(lambda: not trouble.waiting)
    assert path.read_bytes() == before
    await area.close()


async def test_a_write_that_is_too_late_is_not_issued(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    calls = len(trouble.calls)
    with pytest.raises(NotIssued, match="too late, and not issued"):
        await area.write(0, b"\x33" * SECTOR, LATER, driver.boottime() - 0.001)
    assert len(trouble.calls) == calls
    await area.settle(SOON)
    await area.write(0, b"\x33" * SECTOR, LATER, driver.boottime() + LATER)
    await area.close()


async def test_an_error_says_what_and_where(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    trouble.fails = lambda what, _: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if what == "write" else None
    with pytest.raises(IOFailed, match=f"{path}: cannot write: No space left on device"):
        await area.write(0, bytes(SECTOR), LATER, NEVER)
    await area.close()


async def test_a_file_is_closed_only_after_the_last_call_has_come_back(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    file = area._file._below  # type: ignore[attr-defined]
    assert isinstance(file, DiskFile)
    trouble.hangs = lambda what, _: what == "read"
    with pytest.raises(IOTimeout):
        await area.read(0, SECTOR, SOON)
    await area.close()
    os.fstat(file.fd)
    trouble.heal()
    await until(lambda: not os.path.exists(f"/proc/self/fd/{file.fd}"))


async def test_a_file_whose_open_hangs_is_closed_when_it_opens(path: Path, trouble: Trouble) -> None:
    before = len(os.listdir("/proc/self/fd"))
    trouble.hangs = lambda what, _: what == "open"
    with pytest.raises(IOTimeout, match="cannot open it"):
        await open_area(trouble, Lane(1), driver.boottime, str(path), timeout=SOON)
    trouble.heal()
    await until(lambda: not trouble.waiting and len(os.listdir("/proc/self/fd")) <= before)


async def test_a_file_that_opens_after_its_area_was_closed_is_closed_at_once(path: Path, trouble: Trouble) -> None:
    before = set(os.listdir("/proc/self/fd"))
    area = AreaIO(lambda: trouble.open(str(path)), Lane(1), driver.boottime, "area")
    with pytest.raises(IOFailed, match="it is not open"):
        await area.read(0, SECTOR, LATER)
    trouble.hangs = lambda what, _: what == "open"
    with pytest.raises(IOTimeout, match="cannot open it"):
        await area.open(SOON)
    await area.close()
    trouble.heal()
    await until(lambda: not trouble.waiting)
    await until(lambda: not area.lane.busy)
    assert set(os.listdir("/proc/self/fd")) == before
    assert area.identity == (0, 0)


async def test_when_close_returns_the_file_is_closed(path: Path, trouble: Trouble) -> None:
    """Also where somebody has been cancelled in a call that is still under way, and does not hang."""
    area = await area_on(trouble, path)
    file = area._file._below  # type: ignore[attr-defined]
    trouble.hangs = lambda what, _: what == "read"
    with trio.move_on_after(SOON):
        await area.read(0, SECTOR, LATER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(area.close)
        await trio.testing.wait_all_tasks_blocked()
        os.fstat(file.fd)
        trouble.heal()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fd)


@pytest.mark.parametrize("hangs", [True, False])
async def test_close_waits_for_the_thread_that_closes_unless_it_hangs(
    path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr("lockfs_paxos_lease.disk.area.CLOSE_TIMEOUT", SOON if hangs else LATER)
    area, well = await area_on(trouble, path), threading.Event()
    file = area._file._below  # type: ignore[attr-defined]
    real = file.close

    def close() -> None:
        well.wait()
        real()

    file.close = close
    async with trio.open_nursery() as nursery:
        nursery.start_soon(area.close)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        if not hangs:
            well.set()
    if hangs:
        os.fstat(file.fd)
        well.set()
        await until(lambda: not area.lane.busy)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fd)


async def test_one_storage_that_hangs_delays_no_other(path: Path, storage: Path, trouble: Trouble) -> None:
    well = Trouble()
    hung, fine = await area_on(trouble, path, threads=2), await area_on(well, path, threads=2)
    trouble.hangs = lambda what, _: what != "open"
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(read_in_vain, hung)
        with trio.fail_after(LATER):
            for _ in range(20):
                await fine.read(0, SECTOR, LATER)
    trouble.heal()
    await until(lambda: not trouble.waiting)
    await hung.close()
    await fine.close()


async def read_in_vain(area: AreaIO) -> None:
    with pytest.raises(IOTimeout):
        await area.read(0, SECTOR, 0.2)


# The driver --------------------------------------------------------------------------------------


async def test_the_driver_does_what_an_operation_asks_for(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)

    def operation() -> Operation[list[str]]:
        yield Write(Area.LEASE, SECTOR, b"\x44" * SECTOR, LATER, NEVER)
        yield Sleep(0)
        data = yield Read(Area.LEASE, SECTOR, SECTOR, LATER)
        seen = [data.hex()[:2]]
        yield Settle(Area.LEASE, SOON)
        for action in (
            Write(Area.LEASE, 0, bytes(SECTOR), LATER, 0.0),
            Read(Area.LEASE, 1 << 20, SECTOR, LATER),
        ):
            try:
                yield action
            except DiskError as error:
                seen.append(type(error).__name__)
        return seen

    assert await driver.run(operation(), {Area.LEASE: area}) == ["44", "NotIssued", "IOFailed"]
    await area.close()


async def test_an_error_of_the_operation_is_its_result() -> None:
    def operation() -> Operation[None]:
        yield Sleep(0)
        raise LookupError("as it is")

    with pytest.raises(LookupError, match="as it is"):
        await driver.run(operation(), {})


async def test_an_operation_that_is_given_up_is_closed() -> None:
    closed: list[bool] = []

    def operation() -> Operation[None]:
        try:
            yield Sleep(LATER)
        finally:
            closed.append(True)

    with trio.move_on_after(SOON):
        await driver.run(operation(), {})
    assert closed == [True]


async def test_what_is_overdue_goes_on_with_that_and_the_thread_does_nothing_more(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    trouble.hangs = lambda what, _: what == "write"

    def operation() -> Operation[str]:
        try:
            yield Write(Area.LEASE, 0, b"\x55" * SECTOR, SOON, NEVER)
        except DiskError as error:
            return type(error).__name__
        yield Write(Area.LEASE, SECTOR, b"\x55" * SECTOR, SOON, NEVER)
        return "both written"

    assert await driver.run(operation(), {Area.LEASE: area}) == "IOTimeout"
    with pytest.raises(IOTimeout):
        await area.settle(SOON)
    trouble.heal()
    await area.settle(LATER)
    assert trouble.calls.count(("write", str(path))) == 1
    assert await area.read(0, SECTOR, LATER) == b"\x55" * SECTOR
    await area.close()


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_thread_that_is_late_with_its_write_is_waited_for(path: Path, trouble: Trouble, cancelled: bool) -> None:
    """It was descheduled when it had seen that the operation goes on, and before the kernel had its write."""
    area = await area_on(trouble, path)
    about_to, go = threading.Event(), threading.Event()
    real = area.write_now

    def write_now(*arguments: Any) -> None:
        about_to.set()
        go.wait()
        real(*arguments)

    area.write_now = write_now  # type: ignore[method-assign]

    def operation() -> Operation[None]:
        yield Read(Area.LEASE, 0, SECTOR, LATER)
        yield Write(Area.LEASE, 0, b"\x66" * SECTOR, LATER if cancelled else SOON, NEVER)
        yield Write(Area.LEASE, SECTOR, b"\x66" * SECTOR, LATER, NEVER)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await trio.to_thread.run_sync(about_to.wait)
                if cancelled:
                    scope.cancel()

            nursery.start_soon(give_up)
            with contextlib.suppress(IOTimeout):
                await driver.run(operation(), {Area.LEASE: area})
    with pytest.raises(IOTimeout):
        await area.settle(SOON)
    go.set()
    await area.settle(LATER)
    assert trouble.calls.count(("write", str(path))) == 1
    await area.close()


async def test_an_operation_that_a_thread_has_ended_has_its_result_also_if_it_is_given_up(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:

        def operation() -> Operation[str]:
            yield Write(Area.LEASE, 0, b"\x77" * SECTOR, LATER, NEVER)
            token.run_sync_soon(scope.cancel)  # in the thread, which has the engine until it is done
            return "held"

        assert await driver.run(operation(), {Area.LEASE: area}) == "held"
    await area.close()


async def test_an_operation_settles_when_a_write_that_it_gave_up_has_ended(path: Path, trouble: Trouble) -> None:
    area = await area_on(trouble, path)
    trouble.hangs = lambda what, _: what == "write"

    def operation() -> Operation[list[str]]:
        seen = []
        for action in (Write(Area.LEASE, 0, b"\x88" * SECTOR, SOON, NEVER), Settle(Area.LEASE, SOON)):
            try:
                yield action
            except IOTimeout as error:
                seen.append(str(error))
        trouble.heal()
        yield Settle(Area.LEASE, LATER)
        return [*seen, (yield Read(Area.LEASE, 0, SECTOR, LATER)).hex()[:2]]

    wrote, settled, there = await driver.run(operation(), {Area.LEASE: area})
    assert "cannot write: no answer within" in wrote
    assert "an earlier write still hangs" in settled
    assert there == "88"
    await area.close()


# Calls between I/Os ------------------------------------------------------------------------------


async def test_calls_and_ios_that_follow_each_other_are_made_by_one_thread(path: Path, trouble: Trouble) -> None:
    area, other = await area_on(trouble, path), Lane(2)

    def operation() -> Steps[set[int]]:
        threads = {(yield from call(threading.get_ident, LATER, other))}
        yield Settle(Area.LEASE, LATER)  # nothing is under way
        yield Write(Area.LEASE, 0, bytes(SECTOR), LATER, NEVER)
        threads.add((yield from call(threading.get_ident, LATER, area.lane)))
        yield Read(Area.LEASE, 0, SECTOR, LATER)
        threads.add(threading.get_ident())
        with contextlib.suppress(LookupError):
            yield from call(lambda: {}["what it raises"], LATER, other)
        return threads

    threads = await driver.run(operation(), {Area.LEASE: area}, area.lane)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert [other.let_in() for _ in range(3)] == [True, True, False], "a guest has not left"
    await area.close()


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_call_that_hangs_is_left_behind_and_undone(path: Path, trouble: Trouble, cancelled: bool) -> None:
    area, other, well = await area_on(trouble, path), Lane(1), threading.Event()
    undone: list[bool] = []

    def operation() -> Steps[str]:
        with pytest.raises(Overdue, match="no answer within"):
            yield from call(well.wait, LATER if cancelled else SOON, other, undone.append)
        yield Read(Area.LEASE, 0, SECTOR, LATER)
        return "read"

    with trio.move_on_after(SOON if cancelled else LATER) as scope:
        assert await driver.run(operation(), {Area.LEASE: area}, area.lane) == "read"
    assert scope.cancelled_caught is cancelled
    assert (area.lane.busy, undone) == (1, [])
    reads = trouble.calls.count(("read", str(path)))
    well.set()
    await until(lambda: not area.lane.busy)
    assert undone == [True]
    assert trouble.calls.count(("read", str(path))) == reads, "the thread that was left behind went on"
    assert other.let_in()
    await area.close()


async def test_no_more_guests_hang_than_a_lane_has_threads(path: Path, trouble: Trouble) -> None:
    area, other, well = await area_on(trouble, path, threads=8), Lane(2), threading.Event()
    overdue: list[bool] = []

    def operation() -> Steps[None]:
        try:
            yield from call(well.wait, SOON, other)
        except Overdue as error:
            overdue.append(error.begun)

    for _ in range(6):
        await driver.run(operation(), {}, area.lane)
    # Two as guests, two in threads of that lane; for the others there was none.
    assert overdue == [True] * 4 + [False] * 2
    assert (area.lane.busy, other.busy) == (2, 2)
    assert await area.read(0, SECTOR, LATER)
    well.set()
    await until(lambda: not area.lane.busy and not other.busy)
    await area.close()
