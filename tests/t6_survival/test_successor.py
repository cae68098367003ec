"""What a successor of a mount daemon takes over, what happens before it serves, and what if there is none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from harness import mounts, processes
from harness.actor import Actor
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_guard.fencing import fence
from t6_guard.ways import HELPERS
from t6_survival.successors import PATIENCE, kill, kill_lockd, restarts, serving, told, wait_for_restart

from lockfs.fs.journal import records
from lockfs.fs.journal.records import decode
from lockfs.fs.journal.state import replay

DATA = ("gated", "passthrough") if "LOCKFS_ROUNDS" in os.environ else ("passthrough",)
both = pytest.mark.parametrize("mounted", ["gated", "passthrough"], indirect=True)
"""For what may differ most: it is tried with both in any case."""

pytestmark = pytest.mark.usefixtures("succession")


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host that gives up late."""
    return make_host("host-a", LOCKFS_RESTARTS="1000", LOCKFS_HANG="1")


@pytest.fixture(params=DATA)
def mounted(request: pytest.FixtureRequest, host: Host, storage: Path, tmp_path: Path) -> Mount:
    """A mount with one image."""
    (storage / "image").write_bytes(b"content")
    return host.mount(storage, tmp_path / "mnt", f"data={request.param},wait=0.3")


@pytest.fixture
def other(mounted: Mount, host_b: Host, storage: Path, tmp_path: Path) -> Mount:
    """The same storage on another host."""
    return host_b.mount(storage, tmp_path / "other", "wait=0")


@pytest.fixture
def program(mounted: Mount) -> Iterator[Puppet]:
    with Puppet() as made:
        made.tell(HELPERS, path=str(mounted / "image"), top=str(mounted.path))
        yield made


def held_back(mount: Mount) -> int:
    """Kill the daemon of a mount, and stop its successor before it does anything; return that one's process id."""
    before = serving(mount)
    os.kill(before, signal.SIGKILL)

    def successor() -> int:
        found = [pid for pid in mount.host.processes("lockfs.fs") if pid != before and "--resume" in processes.command_line(pid)]
        return found[0] if found else 0

    pid = wait_until(successor, PATIENCE, "a successor")
    os.kill(pid, signal.SIGSTOP)
    return pid


# What it takes over --------------------------------------------------------------------------------


@both
def test_open_files_of_every_kind(mounted: Mount, program: Puppet, other: Mount) -> None:
    program.tell("rw = os.open(path, os.O_RDWR)")
    program.tell("ro = os.open(path, os.O_RDONLY)")
    program.tell("ap = os.open(path, os.O_WRONLY | os.O_APPEND)")
    program.tell("gone = os.open(path + '2', os.O_RDWR | os.O_CREAT | os.O_EXCL); os.write(gone, b'nameless'); os.unlink(path + '2')")
    program.tell("os.mkdir(top + '/d'); d = os.open(top + '/d', os.O_RDONLY | os.O_DIRECTORY)")
    kill(mounted)
    assert program.tell("os.pwrite(rw, b'C', 0)") == 1
    assert program.tell("os.write(ap, b'+')") == 1
    assert (mounted.source / "image").read_bytes() == b"Content+"
    assert program.tell("os.pread(ro, 99, 0) == b'Content+'")
    assert program.tell("os.pread(gone, 99, 0) == b'nameless' and os.fstat(gone).st_nlink == 0")
    assert program.tell("outcome(os.pwrite, ro, b'x', 0)") == "EBADF"
    assert program.tell("os.close(os.open('new', os.O_CREAT | os.O_RDWR, dir_fd=d)); os.listdir(d) == ['new']") is None
    assert program.tell("os.listdir(d) == ['new']")
    assert program.tell("os.fsync(rw), os.fsync(d), os.ftruncate(rw, 3)")[0] is None
    assert (mounted.source / "image").read_bytes() == b"Con"
    with Actor() as asker:
        assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
        program.tell("for fd in (rw, ro, ap, gone, d): os.close(fd)")
        wait_until(lambda: asker.result("open", other / "image", os.O_RDWR) == "ok", PATIENCE, "the image to be free")


@both
def test_what_has_no_name_any_more(mounted: Mount, program: Puppet) -> None:
    """Nothing but a descriptor leads to it; it survives both daemons, one after the other, and is let go in the end."""
    kept = "nameless-file|nameless-directory|d/below"

    def kept_by_lockd() -> set[str]:
        found = processes.descriptors(mounted.host.lockd()).values()
        return {name for name in kept.split("|") for each in found if name in each}

    program.tell("os.mkdir(top + '/d'); os.mkdir(top + '/nameless-directory'); d = os.open(top + '/nameless-directory', os.O_RDONLY)")
    program.tell("for each in ('nameless-file', 'd/below', 'other'): open(f'{top}/{each}', 'w').write(each)")
    program.tell("one = os.open(top + '/nameless-file', os.O_RDONLY); two = os.open(top + '/d/below', os.O_RDONLY)")
    program.tell("os.rename(top + '/other', top + '/nameless-file')")  # replaces it
    program.tell("os.unlink(top + '/d/below'); os.rmdir(top + '/d'); os.rmdir(top + '/nameless-directory')")
    files = {"nameless-file", "d/below"} if told(mounted)["data"] == "gated" else set()
    for end in (kill, kill_lockd, kill, kill):
        end(mounted)
        assert kept_by_lockd() == {*files, "nameless-directory"}, end
        assert program.tell("os.pread(one, 99, 0) == b'nameless-file' and os.pread(two, 99, 0) == b'd/below'"), end
        assert program.tell("os.fstat(one).st_nlink, os.fstat(two).st_nlink, os.listdir(d)") == [0, 0, []]
    program.tell("again = os.open(f'/proc/self/fd/{two}', os.O_RDONLY); os.close(two); os.close(one)")
    # What the kernel says of a file that it has forgotten is lost with a daemon that has just read it.
    wait_until(lambda: kept_by_lockd() == {*files, "nameless-directory"} - {"nameless-file"}, PATIENCE, "one to be let go")
    kill(mounted)
    assert program.tell("os.pread(again, 99, 0) == b'd/below' and open(top + '/nameless-file').read() == 'other'")
    program.tell("os.close(again); os.close(d)")
    wait_until(lambda: kept_by_lockd() == set(), PATIENCE, "lockd to let go")


def test_a_listing_goes_on_where_it_was(mounted: Mount, program: Puppet) -> None:
    program.tell("os.mkdir(top + '/many')")
    for number in range(3000):
        (mounted.source / "many" / f"a-rather-long-name-of-a-file-{number}").touch()
    program.tell("it = os.scandir(top + '/many'); names = [next(it).name for _ in range(10)]")
    kill(mounted)
    (mounted.source / "many" / "later").touch()
    program.tell("names += [next(it).name for _ in range(1000)]")
    kill(mounted)
    program.tell("names += [each.name for each in it]")
    assert program.tell("len(names), len(set(names)), 'later' in names") == [3000, 3000, False]


def test_a_mapping_keeps_the_image(mounted: Mount, program: Puppet, other: Mount) -> None:
    if told(mounted)["data"] == "gated":
        pytest.skip("what is mapped goes through the daemon")
    program.tell("address = mapped(os.open(path, os.O_RDWR), RW, SHARED)")
    time.sleep(0.3)
    with Actor() as asker:
        for _ in range(2):
            kill(mounted)
            assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
        program.tell("libc.munmap(ctypes.c_void_p(address), 4096)")
        wait_until(lambda: asker.result("open", other / "image", os.O_RDWR) == "ok", PATIENCE, "the image to be free")


def test_storage_without_file_handles(host: Host, storage: Path, tmp_path: Path) -> None:
    """There a name is all that leads to a file again: what has none any more is gone, and says so."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", storage], check=True)
    try:
        (storage / "image").write_bytes(b"content")
        mount = host.mount(storage, tmp_path / "mnt")
        assert "has no file handles" in host.log()
        with Puppet() as program:
            program.tell(HELPERS, top=str(mount.path))
            program.tell("os.mkdir(top + '/d'); fd = os.open(top + '/image', os.O_RDWR); d = os.open(top + '/d', os.O_RDONLY)")
            kill(mount)
            assert program.tell("os.pwrite(fd, b'C', 0), os.fstat(fd).st_size") == [1, 7]
            program.tell("os.rename(top + '/image', top + '/d/moved'); os.close(os.open('new', os.O_RDWR | os.O_CREAT, dir_fd=d))")
            kill(mount)
            assert program.tell("os.pread(fd, 7, 0) == b'Content' and sorted(os.listdir(top + '/d')) == ['moved', 'new']")
            program.tell("os.close(fd); os.close(d)")
        wait_until(lambda: not host.locks(), PATIENCE, "the image to be free")
        mount.umount()
    finally:
        wait_until(lambda: not mounts.umount(storage), PATIENCE, "the storage to be let go")


def test_owners_are_told_apart_still(host: Host, storage: Path, tmp_path: Path) -> None:
    (storage / "image").touch()
    mount = host.mount(storage, tmp_path / "mnt", "owner=open,wait=0")
    with Actor() as program:
        fd = program.call("open", mount / "image", os.O_RDWR)
        kill(mount)
        assert program.result("open", mount / "image", os.O_RDWR) == "EBUSY"
        program.call("close", fd)
        wait_until(lambda: program.result("open", mount / "image", os.O_RDWR) == "ok", PATIENCE, "the image to be free")


def test_a_wait_for_an_image_goes_on(mounted: Mount, other: Mount, host: Host, storage: Path, tmp_path: Path) -> None:
    patient = host.mount(storage, tmp_path / "patient", "wait=20")
    with Actor() as holder, Actor() as waiting:
        fd = holder.call("open", other / "image", os.O_RDWR)
        waiting.ask("open", patient / "image", os.O_RDWR)
        time.sleep(0.3)
        kill(patient)
        time.sleep(0.3)
        holder.call("close", fd)
        assert waiting.answer() > 0
        waiting.end()
    wait_until(lambda: not host.locks(), PATIENCE, "the image to be free")


def test_many_open_files(mounted: Mount, program: Puppet) -> None:
    program.tell("fds = [os.open(f'{path}{n}', os.O_RDWR | os.O_CREAT) for n in range(500)]")
    kill(mounted)
    begin = time.monotonic()
    assert program.tell("all(os.fstat(fd).st_size == 0 and os.pwrite(fd, b'x', 0) == 1 for fd in fds)")
    print(f"500 open files: all used {time.monotonic() - begin:.2f} s after another daemon serves")
    assert len(mounted.host.locks()) == 500
    program.tell("for fd in fds: os.close(fd)")
    wait_until(lambda: not mounted.host.locks(), PATIENCE, "all images to be free")


def test_one_that_is_stopped_is_replaced(mounted: Mount, program: Puppet, expect_log: Expected) -> None:
    expect_log("has not answered for 1 s: it is killed")
    program.tell("fd = os.open(path, os.O_RDWR)")
    kill(mounted, signal.SIGSTOP)
    assert program.tell("os.fstat(fd).st_size") == 7


# Its end -------------------------------------------------------------------------------------------


@both
def test_nothing_is_left(mounted: Mount, program: Puppet, host: Host) -> None:
    def round_() -> None:
        program.tell("fds = [os.open(f'{path}{n}', os.O_RDWR | os.O_CREAT) for n in range(20)]")
        kill(mounted)
        program.tell("for fd in fds: os.close(fd)")
        wait_until(lambda: not host.locks(), PATIENCE, "all images to be free")

    def kinds(pid: int) -> Counter[str]:
        found = Counter(re.sub(r"\d+", "N", what.partition(":")[0]) for what in processes.descriptors(pid).values())
        del found["socket"]
        return found

    round_()
    before = {"lockd": kinds(host.lockd()), "mount daemon": kinds(serving(mounted))}
    for _ in range(3):
        round_()
    after = {"lockd": kinds(host.lockd()), "mount daemon": kinds(serving(mounted))}
    assert {name: after[name] - before[name] for name in after} == {name: Counter() for name in after}
    (mounted.source / "image").unlink()
    mounted.umount()
    assert list((host.run_dir / "mounts").iterdir()) == []


def test_sigterm_unmounts(mounted: Mount) -> None:
    kill(mounted)
    pid = serving(mounted)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not mounts.is_mounted(mounted.path), PATIENCE, "the mount to go")
    assert not processes.wait_until_gone([pid], PATIENCE)
    mounted.host.mounts.remove(mounted)


def test_what_was_unmounted_meanwhile_ends(mounted: Mount, host: Host) -> None:
    pid = held_back(mounted)
    assert mounts.umount(mounted.path, lazy=True) == ""
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not told(mounted), PATIENCE, "the mount to end")
    assert not processes.wait_until_gone([pid], PATIENCE)
    host.mounts.remove(mounted)


# Before it serves ----------------------------------------------------------------------------------


@both
def test_an_image_can_be_fenced(mounted: Mount, program: Puppet, host: Host, other: Mount, expect_log: Expected) -> None:
    expect_log("lost the lock o[nf]|fenced .*: its handles fail")
    program.tell("fd = os.open(path, os.O_RDWR); mine = os.open(path + '2', os.O_RDWR | os.O_CREAT)")
    pid = held_back(mounted)
    (result,) = fence(host, mounted / "image").values()
    assert (result["fenced"], result["killed"], result["daemon_killed"]) == (True, [], False)
    if told(mounted)["data"] == "passthrough":
        assert program.tell("outcome(os.pwrite, fd, b'x', 0)") == "EIO"
    os.kill(pid, signal.SIGCONT)
    assert program.tell("outcome(os.pwrite, fd, b'x', 0), outcome(os.fstat, fd), outcome(os.pread, fd, 1, 0)") == ["EIO"] * 3
    assert program.tell("os.pwrite(mine, b'x', 0), os.fstat(mine).st_size") == [1, 1]
    assert (mounted.source / "image").read_bytes() == b"content"
    kill(mounted)
    assert program.tell("outcome(os.pwrite, fd, b'x', 0), outcome(os.fstat, fd)") == ["EIO"] * 2
    program.tell("outcome(os.close, fd); os.close(mine)")
    wait_until(lambda: not host.locks(), PATIENCE, "the image to be free")


def test_whoever_is_killed_while_it_waits_leaves_nothing(mounted: Mount, program: Puppet, host: Host) -> None:
    pid = held_back(mounted)
    program.begin("fd = os.open(path, os.O_RDWR)")
    time.sleep(0.2)
    program.process.kill()
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: program.process.poll() is not None, PATIENCE, "the program to end")
    wait_until(lambda: not host.locks(), PATIENCE, "the image to be free")


def test_what_is_open_for_nobody_is_closed(mounted: Mount, program: Puppet, host: Host) -> None:
    """Of two open files whose answers the kernel may not have taken, one is in use, and of the other it knows nothing."""
    program.tell("fd = os.open(path, os.O_RDWR); os.fstat(fd)")
    (journal,) = (host.run_dir / "mounts").iterdir()
    pid = held_back(mounted)
    state = replay(journal.read_bytes())
    (mine,) = (each for each in state.files.values() if each.hold is not None)
    node = state.nodes[mine.node].found
    unknown = msgspec.structs.replace(node, node=1000, lookups=1)
    nobodys = msgspec.structs.replace(mine, serial=1000, number=1000, node=1000, unique=4, hold=None, answered=False, counted=False)
    kept = [each for each in decode(journal.read_bytes()) if not isinstance(each, records.Answered)]
    journal.write_bytes(b"".join(map(records.encode, [*kept, unknown, nobodys])))
    os.kill(pid, signal.SIGCONT)
    program.tell("os.fstat(fd)")
    wait_until(lambda: "was open for nobody" in host.log(), PATIENCE, "one to be closed")
    program.tell("os.stat(path)")
    state = replay(journal.read_bytes())
    assert [each.serial for each in state.files.values() if each.node == 1000] == []
    assert 1000 not in state.nodes
    assert [each.serial for each in state.files.values() if each.hold is not None] == [mine.serial]
    assert program.tell("os.pwrite(fd, b'C', 0), os.close(fd)")[0] == 1
    wait_until(lambda: not host.locks(), PATIENCE, "the image to be free")


def test_a_mount_can_be_replaced_on_purpose(mounted: Mount, program: Puppet) -> None:
    """Killing is all it takes; nothing in the way of it is for crashes only."""
    program.tell("fd = os.open(path, os.O_RDWR)")
    before = restarts(mounted)
    processes.end([serving(mounted)], signal.SIGKILL, PATIENCE)
    wait_for_restart(mounted, before)
    assert told(mounted)["restarts"] == before + 1
    assert not told(mounted).get("restarting")
    assert program.tell("os.fstat(fd).st_size") == 7


# If there is none ----------------------------------------------------------------------------------


def test_a_daemon_that_never_comes_up_is_given_up(
    make_host: Callable[..., Host], host_b: Host, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    expect_log("did not come up")
    expect_log("has died 3 times in a row and is not started any more")
    expect_log("the daemon of .* is dead; what is open there stays locked")
    expect_log("the journal of the mount has no beginning")
    host = make_host("host-a", LOCKFS_RESTARTS="2")
    (storage / "image").write_bytes(b"content")
    mount, other = host.mount(storage, tmp_path / "mnt", "data=passthrough"), host_b.mount(storage, tmp_path / "other", "wait=0")
    (journal,) = (host.run_dir / "mounts").iterdir()
    with Puppet() as program, Actor() as asker:
        program.tell(HELPERS, path=str(mount / "image"))
        program.tell("fd = os.open(path, os.O_RDWR)")
        os.truncate(journal, 0)
        os.kill(mount.daemon(), signal.SIGKILL)
        assert program.tell("outcome(os.stat, path)") == "ENOTCONN"
        assert told(mount)["daemon_gone"]
        assert "daemon gone" in host.run("lockfs", "status").stdout
        assert program.tell("os.pwrite(fd, b'C', 0)") == 1
        assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
        assert len(host.locks()) == 1
    wait_until(lambda: not told(mount), PATIENCE, "lockd to let go of the mount")
    assert mounts.umount(mount.path) == ""
    host.mounts.remove(mount)
    assert list((host.run_dir / "mounts").iterdir()) == []
