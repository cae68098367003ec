"""Who uses files of a FUSE mount, found without its daemon: real mounts, real processes, with passthrough and without."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.waiting import wait_until
from t2_linux.kernel_fs.mounted import MiniMount, attached, serving
from t2_linux.puppet import Puppet

from lockfs.linux import descriptors, holders, mappings, mount, mountids, mountinfo, process
from lockfs.linux.holders import Use

Seen = set[tuple[int, str, bool]]
NO_DEVICE = os.makedev(4095, 0)


@pytest.fixture(params=["passthrough", "plain"])
def mini(request: pytest.FixtureRequest, storage: Path, tmp_path: Path) -> Iterator[MiniMount]:
    """A mount with the files f and g."""
    for name in "fg":
        (storage / name).write_bytes(bytes(8192))
    with serving(storage, tmp_path / "mnt", plain=request.param == "plain") as served:
        # The daemon has no flush; once it has said so, no close waits for it.
        (served.path / "g").read_bytes()
        yield served


@pytest.fixture
def puppet(mini: MiniMount) -> Iterator[Puppet]:
    with Puppet() as puppet:
        puppet.tell("pass", path=str(mini.path / "f"))
        yield puppet


def device(mini: MiniMount) -> int:
    return os.stat(mini.path).st_dev


def node(mini: MiniMount, name: str = "f") -> int:
    return os.stat(mini.source / name).st_ino  # of which minifs makes its node ids


def seen(mini: MiniMount, name: str = "f", **how: bool) -> Seen:
    """Return who uses a file: process, way, writable."""
    return {(use.pid, use.how, use.writable) for use in holders.uses(device(mini), {node(mini, name)}, **how)}


def mount_id(mountpoint: Path) -> int:
    return max(each.mount_id for each in mountinfo.read() if each.mountpoint == os.fsencode(mountpoint))


@pytest.mark.parametrize(
    ("opening", "writable"),
    [
        ("os.open(path, os.O_RDWR)", True),
        ("os.open(path, os.O_WRONLY | os.O_APPEND)", True),
        ("os.open(path, os.O_RDONLY)", False),
        ("os.open(path, os.O_PATH)", False),
        ("fd = os.open(path, os.O_RDWR); os.dup2(fd, 77); os.close(fd)", True),
        ("in_thread(lambda: os.open(path, os.O_RDWR))", True),
        ("in_thread(lambda: (checked(libc.unshare(0x400)), os.open(path, os.O_RDWR)))", True),
        ("fd = os.open(path, os.O_RDWR); in_thread(lambda: checked(libc.unshare(0x400))); os.close(fd)", True),
        ("mapped(os.open(path, os.O_RDWR), RW, PRIVATE, close=False)", True),
    ],
)
def test_descriptors(mini: MiniMount, puppet: Puppet, opening: str, writable: bool) -> None:
    assert seen(mini) == set()
    puppet.tell(opening)
    assert seen(mini) == {(puppet.pid, "fd", writable)}
    assert seen(mini, "g") == set()
    assert seen(mini, mappings_only=True) == set()


@pytest.mark.parametrize(
    ("mapping", "writable"),
    [
        ("mapped(os.open(path, os.O_RDWR), RW, SHARED)", True),
        ("mapped(os.open(path, os.O_RDWR), RO, SHARED)", True),
        ("mapped(os.open(path, os.O_RDWR), 0, SHARED)", True),
        ("mapped(os.open(path, os.O_RDONLY), RO, SHARED)", False),
        ("mapped(os.open(path, os.O_RDWR), RW, PRIVATE)", None),
        ("mapped(os.open(path, os.O_RDONLY), RW, PRIVATE)", None),
        ("in_thread(lambda: mapped(os.open(path, os.O_RDWR), RW, SHARED))", True),
    ],
)
def test_mappings_outlive_their_descriptor(mini: MiniMount, puppet: Puppet, mapping: str, writable: bool | None) -> None:
    puppet.tell(mapping)
    expected = set() if writable is None else {(puppet.pid, "mapping", writable)}
    assert seen(mini) == seen(mini, mappings_only=True) == expected
    assert seen(mini, "g") == set()
    # The kernel's own word on it, from the file that is too slow to be used.
    smaps = Path(f"/proc/{puppet.pid}/smaps").read_text()
    block = smaps[smaps.index(f"{mini.path}/f\n") :]
    flags = re.search(r"^VmFlags: (.*)$", block, re.MULTILINE)
    assert flags is not None
    words = flags[1].split()
    assert writable is None or ("mw" in words) == writable
    assert ("ms" in words) == (writable is not None)


def test_a_mapping_that_was_made_unwritable_or_unmapped(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("address = mapped(os.open(path, os.O_RDWR), RW, SHARED)")
    puppet.tell("checked(libc.mprotect(ctypes.c_void_p(address), 4096, RO))")
    assert seen(mini) == {(puppet.pid, "mapping", True)}
    puppet.tell("checked(libc.munmap(ctypes.c_void_p(address), 4096))")
    assert seen(mini) == set()


def test_the_text_of_maps_says_what_the_ioctl_says(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("for way in (RW, RO): mapped(os.open(path, os.O_RDWR), way, SHARED)")
    puppet.tell("mapped(os.open(path, os.O_RDONLY), RO, SHARED), mapped(os.open(path, os.O_RDWR), RW, PRIVATE)")
    maps = os.open(f"/proc/{puppet.pid}/maps", os.O_RDONLY)
    try:
        by_text = list(mappings.by_text(maps))
        assert sum(each.ino == node(mini) for each in by_text) == 3
        try:
            assert list(mappings.by_query(maps)) == by_text
        except OSError:
            assert os.uname().release < "6.11"
        puppet.end()
        with pytest.raises(ProcessLookupError):
            list(mappings.by_text(maps))
        with pytest.raises(ProcessLookupError):
            list(mappings.by_query(maps))
    finally:
        os.close(maps)


def test_both_ways_at_once_and_any_inode(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("mapped(os.open(path, os.O_RDWR), RW, SHARED, close=False)")
    puppet.tell("os.open(other, os.O_RDONLY)", other=str(mini.path / "g"))
    who = process.of_pid(puppet.pid)
    assert who is not None
    assert holders.uses(device(mini), None) == [
        Use(puppet.pid, who.start, *each)
        for each in [*sorted([(node(mini), "fd", True), (node(mini, "g"), "fd", False)]), (node(mini), "mapping", True)]
    ]
    assert holders.uses(NO_DEVICE, None) == []
    assert holders.uses(device(mini), None, pids=[os.getpid()]) == []
    assert len(holders.uses(device(mini), None, pids=[os.getpid(), puppet.pid, 2, 1 << 22])) == 3


def test_a_deleted_file(mini: MiniMount, puppet: Puppet) -> None:
    number = node(mini)
    puppet.tell("fd = os.open(path, os.O_RDWR); mapped(fd, RW, SHARED, close=False); os.unlink(path)")
    found = holders.uses(device(mini), {number})
    assert [(use.pid, use.how) for use in found] == [(puppet.pid, "fd"), (puppet.pid, "mapping")]


def test_children_inherit(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("fd = os.open(path, os.O_RDWR); mapped(os.dup(fd), RW, SHARED)")
    child = puppet.tell("os.fork() or signal.pause()")
    puppet.tell("os.close(fd)")
    assert seen(mini) == {(child, "fd", True), (child, "mapping", True), (puppet.pid, "mapping", True)}
    puppet.tell("os.kill(child, 9), os.waitpid(child, 0)", child=child)
    assert seen(mini) == {(puppet.pid, "mapping", True)}


RELAY = """
import os, sys, time
os.open(sys.argv[1], os.O_RDWR)
print(flush=True)
until = time.monotonic() + 60
while time.monotonic() < until:
    if os.read(0, 1) == b"": break  # the test closed its end
    if os.fork(): os._exit(0)
"""


def test_a_use_that_is_handed_down_from_process_to_process_is_never_missed(mini: MiniMount) -> None:
    """Each process of a relay forks the next and exits: a list of processes made at any time is soon out of date."""
    ours, theirs = socket.socketpair()
    relay = subprocess.Popen([sys.executable, "-c", RELAY, mini.path / "f"], stdin=theirs, stdout=subprocess.PIPE)
    theirs.close()
    assert relay.stdout is not None
    try:
        relay.stdout.read(1)
        ours.setblocking(False)
        runners: Seen = set()
        for _ in range(25):
            try:
                ours.send(b"." * 100)
            except BlockingIOError:
                pass
            found = seen(mini)
            assert found
            runners |= found
        print(f"found {len(runners)} processes of the relay")
        assert len(runners) > 10
    finally:
        ours.close()
        relay.stdout.read()  # ends with the last of them
        relay.stdout.close()
        relay.wait(20)
    wait_until(lambda: not seen(mini), 20, "the relay to end")


def test_a_birth_during_the_listing(mini: MiniMount, puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case of the relay: who has the file exits before the list gets to it, its child was born behind."""
    puppet.tell("fd = os.open(path, os.O_RDWR); here, there = os.pipe(), os.pipe()")
    # Each runner waits for a word, forks the next one, tells its number and exits.
    runner = puppet.tell(
        "os.fork() or [os.read(here[0], 1) and (next := os.fork()) and (os.write(there[1], b'%9d' % next), os._exit(0))"
        " for _ in iter(int, 1)]"
    )
    puppet.tell("os.close(fd)")
    runners = [runner]
    list_everybody = holders._everybody

    def racing() -> list[tuple[int, int]]:
        everybody = list_everybody()
        if len(runners) == 4:
            return everybody
        puppet.tell("os.write(here[1], b'x')")
        runners.append(int(puppet.tell("os.read(there[0], 9).decode()")))
        return [each for each in everybody if each[0] not in runners]

    monkeypatch.setattr(holders, "_everybody", racing)
    try:
        found = seen(mini)
        assert (runners[-1], "fd", True) in found
        assert found <= {(each, "fd", True) for each in runners}  # one that has told its child may exit later
        assert len(set(runners)) == 4
    finally:
        os.kill(runners[-1], signal.SIGKILL)


def test_when_births_never_end_it_says_so(mini: MiniMount, puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    puppet.tell("fd = os.open(path, os.O_RDWR)")
    births = iter(range(1 << 30))
    monkeypatch.setattr(holders, "_forks", lambda: next(births))
    monkeypatch.setattr(holders, "PATIENCE", 0.2)
    with pytest.raises(holders.Incomplete) as caught:
        seen(mini)
    assert [(use.pid, use.how) for use in caught.value.found] == [(puppet.pid, "fd")]


def test_another_mount_namespace(mini: MiniMount, monkeypatch: pytest.MonkeyPatch) -> None:
    with Puppet("unshare", "--mount", "--propagation", "private") as puppet:
        puppet.tell("pass", mnt=str(mini.path))
        # A mount that only that namespace has, over which there is another one now.
        puppet.tell("a = os.system(f'mount --bind {mnt} {mnt}')")
        puppet.tell("fd = os.open(mnt + '/f', os.O_RDWR); os.chdir('/')")
        puppet.tell("b = os.system(f'mount -t tmpfs none {mnt}')")
        assert puppet.tell("a, b") == [0, 0]
        # No file has to be asked, which some filesystem would not survive.
        monkeypatch.delattr(mountids.MountIds, "_ask")
        assert seen(mini) == {(puppet.pid, "fd", True)}


def test_a_mount_that_the_process_left_behind(mini: MiniMount, puppet: Puppet) -> None:
    """The descriptor's mount is in no list that its process has."""
    puppet.tell("fd = os.open(path, os.O_RDWR); checked(libc.unshare(0x20000))")
    assert seen(mini) == {(puppet.pid, "fd", True)}


def test_a_process_with_another_root_directory(mini: MiniMount, puppet: Puppet, tmp_path: Path) -> None:
    puppet.tell("checked(libc.unshare(0x20000)); checked(libc.mount(None, b'/', None, 0x44000, None))")
    assert puppet.tell("os.system(f'mount --bind {src} {dst}')", src=str(mini.path), dst=str(tmp_path / "storage")) == 0
    puppet.tell("fd = os.open(dst + '/f', os.O_RDWR); os.chroot('/usr'); os.chdir('/')")
    assert seen(mini) == {(puppet.pid, "fd", True)}


def test_another_pid_namespace(mini: MiniMount) -> None:
    with Puppet("unshare", "--pid", "--fork", "--kill-child") as puppet:
        assert puppet.tell("os.getpid()") == 1
        puppet.tell("fd = os.open(path, os.O_RDWR); mapped(os.dup(fd), RW, SHARED)", path=str(mini.path / "f"))
        found = holders.uses(device(mini), {node(mini)})
        assert [(use.pid, use.how) for use in found] == [(puppet.pid, "fd"), (puppet.pid, "mapping")]
        assert holders.kill(found[0])
        wait_until(lambda: not seen(mini), 20, "its death")


def test_a_first_thread_that_has_exited(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("mapped(os.open(path, os.O_RDWR), RW, SHARED, close=False); in_thread(lambda: None)")
    puppet.tell("main_thread_exits()")
    assert "State:\tZ" in Path(f"/proc/{puppet.pid}/status").read_text()
    found = holders.uses(device(mini), {node(mini)})
    assert [(use.pid, use.how, use.writable) for use in found] == [(puppet.pid, "fd", True), (puppet.pid, "mapping", True)]
    assert holders.kill(found[0])
    wait_until(lambda: not seen(mini), 20, "the death of all its threads")


def test_zombies_and_kernel_threads(mini: MiniMount, puppet: Puppet) -> None:
    zombie = puppet.tell("os.open(path, os.O_RDWR) and os.fork() or os._exit(0)")
    wait_until(lambda: "State:\tZ" in Path(f"/proc/{zombie}/status").read_text(), 20, "a zombie")
    assert holders.uses(device(mini), None, pids=[zombie, 2]) == []


def test_a_mount_that_was_unmounted_lazily(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("mapped(os.open(path, os.O_RDWR), RW, SHARED, close=False)")
    dev = device(mini)
    mount.umount(os.fsencode(mini.path), mount.MNT_DETACH)
    expected = [(puppet.pid, "fd", True), (puppet.pid, "mapping", True)]
    for inodes in ({node(mini)}, None):
        assert [(use.pid, use.how, use.writable) for use in holders.uses(dev, inodes)] == expected
        assert holders.uses(NO_DEVICE, inodes) == []
    puppet.end()


@pytest.mark.parametrize("lazily", [False, True])
def test_a_fenced_inode(mini: MiniMount, puppet: Puppet, lazily: bool) -> None:
    number, dev = node(mini), device(mini)
    puppet.tell("fd = os.open(path, os.O_RDWR); mapped(os.dup(fd), RW, SHARED)")
    # Another type of file in its place makes the kernel declare the inode bad.
    (mini.source / "f").unlink()
    (mini.source / "f").mkdir()
    with pytest.raises(AssertionError, match="Input/output error"):
        puppet.tell("os.fstat(fd)")
    if lazily:
        mount.umount(os.fsencode(mini.path), mount.MNT_DETACH)
    expected = [(puppet.pid, "fd", True), (puppet.pid, "mapping", True)]
    assert [(use.pid, use.how, use.writable) for use in holders.uses(dev, {number})] == expected
    puppet.end()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_the_daemon_is_not_needed(storage: Path, tmp_path: Path, how: signal.Signals, lazily: bool, plain: bool) -> None:
    (storage / "f").write_bytes(bytes(8192))
    with attached(storage, tmp_path / "mnt") as mini, Puppet() as puppet, Puppet() as stuck:
        mini.start(plain=plain)
        path, dev = mini.path / "f", device(mini)
        path.read_bytes()
        puppet.tell("fd = os.open(path, os.O_RDWR); mapped(os.dup(fd), RW, SHARED)", path=str(path))
        assert mini.daemon is not None
        os.kill(mini.daemon.pid, how)
        if how == signal.SIGKILL:
            mini.daemon.wait(20)  # the connection stays, for the test has the device open too
        stuck.begin(f"os.stat({str(path)!r})")
        wait_until(lambda: "request_wait" in Path(f"/proc/{stuck.pid}/wchan").read_text(), 20, "one that waits for it")
        if lazily:
            mount.umount(os.fsencode(path.parent), mount.MNT_DETACH)
        for inodes in ({node(mini)}, None):
            found = holders.uses(dev, inodes)
            assert [(use.pid, use.how) for use in found] == [(puppet.pid, "fd"), (puppet.pid, "mapping")]
        assert holders.kill(found[0])
        wait_until(lambda: not holders.uses(dev, None), 20, "its death")
        if not lazily:
            mount.umount(os.fsencode(path.parent), mount.MNT_DETACH)
        if how == signal.SIGSTOP:
            os.kill(mini.daemon.pid, signal.SIGCONT)


def test_files_that_a_ring_has(mini: MiniMount, puppet: Puppet) -> None:
    other = puppet.tell("other = registered([os.open('/dev/null', os.O_RDWR)])")
    assert seen(mini) == set()
    puppet.tell("ring = registered([os.open(path, os.O_RDWR)])")
    # Which file it is, only the kernel knows.
    [use] = holders.uses(device(mini), {node(mini, "g")})
    assert (use.pid, use.ino, use.how, use.writable) == (puppet.pid, holders.UNKNOWN_INO, "ring", True)
    puppet.tell("os.unlink(path)")
    assert [use] == holders.uses(device(mini), {12345})
    puppet.tell("os.close(ring)")
    wait_until(lambda: not holders.uses(device(mini), None), 20, "the ring to end")
    assert other is None


def test_a_descriptor_in_flight_is_not_seen_until_it_lands(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("one, two = socket.socketpair()")
    puppet.tell("fd = os.open(path, os.O_RDWR); socket.send_fds(one, [b'x'], [fd]); os.close(fd)")
    assert seen(mini) == set()  # as the module says; the daemon has got no RELEASE
    puppet.tell("received = socket.recv_fds(two, 1, 1)[1]")
    assert seen(mini) == {(puppet.pid, "fd", True)}


def test_processes_that_come_and_go(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("fd = os.open(path, os.O_RDWR)")
    # Those that last long enough to be listed, and often not to be looked at.
    churn = subprocess.Popen(["sh", "-c", "while read x; do sleep 0.002 & sleep 0.004; done"], stdin=subprocess.PIPE)
    assert churn.stdin is not None
    try:
        churn.stdin.write(b"x\n" * 300)
        churn.stdin.close()
        scans = 0
        while churn.poll() is None:
            assert seen(mini) == {(puppet.pid, "fd", True)}
            scans += 1
        assert scans > 0
    finally:
        churn.kill()
        churn.wait(20)


def test_without_the_right_to_look_it_says_so(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("fd = os.open(path, os.O_RDWR)")
    with Puppet() as candid:
        candid.tell("import lockfs.linux.holders as holders; os.setgroups([]); os.setgid(65534); os.setuid(65534)")
        refused = f"try: holders.uses({device(mini)}, None); said = ''\nexcept holders.Incomplete as error: said = str(error)"
        candid.tell(refused)
        said = candid.tell("said")
        assert "no permission" in said and "CAP_SYS_PTRACE" in said


def test_no_other_process_is_ever_killed(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("fd = os.open(path, os.O_RDWR)")
    [use] = holders.uses(device(mini), {node(mini)})
    earlier = Use(use.pid, use.start - 1, use.ino, use.how, use.writable)
    assert not holders.kill(earlier)
    assert puppet.tell("'alive'") == "alive"
    myself = process.of_pid(os.getpid())
    assert myself is not None
    assert not holders.kill(Use(myself.pid, myself.start, use.ino, "fd", True))
    assert holders.kill(use)
    assert puppet.process.wait(20) == -signal.SIGKILL
    assert not holders.kill(use)


def test_a_later_process_of_the_same_number_is_listed_as_another_one() -> None:
    program = """
import os, sys
os.system("mount -t proc proc /proc")
def directory(pid): return next(each.inode() for each in os.scandir("/proc") if each.name == str(pid))
found = set()
for _ in range(20):
    open("/proc/sys/kernel/ns_last_pid", "w").write("4999")
    pid = os.fork()
    if pid == 0:
        os.read(int(sys.argv[1]), 1)
        os._exit(0)
    assert pid == 5000
    one = directory(pid)
    assert one == directory(pid)
    found.add(one)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
assert len(found) == 20, found
"""
    reading, writing = os.pipe()
    try:
        subprocess.run(
            ["unshare", "--pid", "--fork", "--mount", sys.executable, "-c", program, str(reading)],
            check=True, pass_fds=[reading], timeout=60,
        )  # fmt: skip
    finally:
        os.close(reading)
        os.close(writing)


def test_a_mount_id_that_has_gone_to_another_mount(mini: MiniMount, puppet: Puppet, tmp_path: Path) -> None:
    """What is remembered of a mount id is not believed of a file that was opened later."""
    place = tmp_path / "place"
    place.mkdir()
    for _ in range(50):
        subprocess.run(["mount", "--bind", mini.path, place], check=True, timeout=20)
        before = mount_id(place)
        known = mountids.MountIds(device(mini))
        mount.umount(os.fsencode(place))
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True, timeout=20)
        try:
            if mount_id(place) != before:
                continue  # somebody else on this machine got it
            puppet.tell("fd = os.open(place, os.O_CREAT | os.O_RDWR)", place=str(place / "x"))
            proc = os.open(f"/proc/{puppet.pid}", os.O_PATH)
            try:
                assert known.shows(proc, "fd/0", before)  # so it is believed at first
                found = descriptors.of_process(proc, puppet.pid, device(mini), lambda ino: True, known)
            finally:
                os.close(proc)
            puppet.tell("os.close(fd)")
            assert found.files == set()
            return
        finally:
            mount.umount(os.fsencode(place))
    pytest.fail("no mount id was given out again")


def test_on_a_real_mount_the_number_is_the_node_id(mount, puppet_alone: Puppet) -> None:
    image = mount / "image"
    image.write_bytes(b"x")
    found = os.stat(image)
    puppet_alone.tell("fd = os.open(path, os.O_RDWR)", path=str(image))
    uses = holders.uses(found.st_dev, {found.st_ino})
    assert [(use.pid, use.how, use.writable) for use in uses] == [(puppet_alone.pid, "fd", True)]


@pytest.fixture
def puppet_alone() -> Iterator[Puppet]:
    with Puppet() as puppet:
        yield puppet


def test_how_long_it_takes(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("fd = os.open(path, os.O_RDWR)")
    crowd = [subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL) for _ in range(500)]
    try:
        for mappings_only in (False, True):
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                found = seen(mini, mappings_only=mappings_only)
                times.append(time.perf_counter() - begin)
                assert len(found) == (not mappings_only)
            shown = ", ".join(f"{each * 1000:.0f}" for each in times)
            print(f"500 processes, {mappings_only=}: {shown} ms")
    finally:
        for each in crowd:
            each.kill()
            each.wait()
