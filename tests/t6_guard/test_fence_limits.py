"""The fence at its limits: many images, storage that hangs, a connection that has ended, holders in the kernel."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import mounts, processes
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_guard.fencing import daemon_gone, fence, unmount_dead
from t6_guard.ways import HELPERS, SIZE, Fio, wait_until_written

LOST = r"lost the lock o[nf] |fenced .*: (its handles fail|process)"
DATA = ("gated", "passthrough")


@pytest.fixture(params=DATA)
def data(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image(storage: Path) -> str:
    (storage / "image").write_bytes(bytes(SIZE))
    return "image"


@pytest.fixture
def mounted(host: Host, storage: Path, tmp_path: Path, data: str, expect_log: Expected) -> Mount:
    """A mount, of which images are going to be fenced."""
    expect_log(LOST)
    return host.mount(storage, tmp_path / "mnt", f"data={data}")


@pytest.fixture
def bypassed(host: Host, storage: Path, tmp_path: Path, expect_log: Expected) -> Mount:
    """The same, with data that bypasses the daemon."""
    expect_log(LOST)
    return host.mount(storage, tmp_path / "mnt", "data=passthrough")


@contextmanager
def puppet(path: Path, *prefix: str) -> Iterator[Puppet]:
    with Puppet(*prefix) as made:
        made.tell(HELPERS, path=str(path), mark=b"B")
        yield made


def unchanged(path: Path, seconds: float = 0.3) -> bool:
    """Say whether nobody changes a file for a while."""
    os.sync()
    before = path.read_bytes()
    time.sleep(seconds)
    return path.read_bytes() == before


# Engines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("engine", ["libaio", "io_uring", "psync", "pvsync2"])
def test_fio(mounted: Mount, host: Host, storage: Path, image: str, engine: str, direct: bool) -> None:
    fio = Fio(mounted / image, engine, direct=direct)
    try:
        wait_until_written(storage / image)
        result = fence(host, mounted / image)[str(mounted / image)]
        said = fio.wait()
    finally:
        fio.end()
    assert result["killed"] == []
    assert "Input/output error" in said
    assert unchanged(storage / image)


def test_a_loop_device(mounted: Mount, host: Host, storage: Path, image: str) -> None:
    device = subprocess.check_output(["losetup", "--find", "--show", "--direct-io=on", mounted / image], text=True).strip()
    try:
        write = ["dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "oflag=direct", "status=none"]
        subprocess.run(write, check=True)
        fence(host, mounted / image)
        before = (storage / image).read_bytes()
        done = subprocess.run([*write[:1], "if=/dev/urandom", *write[2:]], capture_output=True, text=True, check=False)
        assert "Input/output error" in done.stderr
        # What does not go direct ends in the cache of the device, and is told of when that is written.
        done = subprocess.run(
            ["dd", "if=/dev/urandom", f"of={device}", "bs=4096", "count=9", "conv=fsync", "status=none"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Input/output error" in done.stderr
        assert (storage / image).read_bytes() == before
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    wait_until(lambda: not host.locks(), 10, "the loop device to let go")


def test_copying_from_another_mount(bypassed: Mount, host: Host, storage: Path, tmp_path: Path, image: str) -> None:
    """The kernel copies between two mounts by splice."""
    other = host.mount(storage, tmp_path / "other", "data=passthrough")
    (storage / "source").write_bytes(b"S" * SIZE)
    with puppet(bypassed / image) as writer:
        copy = "os.copy_file_range(source, fd, 4096, 0, 0)"
        writer.tell(f"source = os.open({str(other / 'source')!r}, os.O_RDONLY); fd = os.open(path, os.O_RDWR); {copy}")
        assert (storage / image).read_bytes()[:4096] == b"S" * 4096
        writer.tell(f"again = Again(exec, compile({copy!r}, 'copy', 'exec'))")
        result = fence(host, bypassed / image)[str(bypassed / image)]
        assert [each["pid"] for each in result["killed"]] == [writer.pid]
    assert unchanged(storage / image)


# Several holders -----------------------------------------------------------------------------------


def test_only_who_splices_is_killed(bypassed: Mount, host: Host, storage: Path, image: str) -> None:
    with puppet(bypassed / image) as splicer:
        splicer.tell("fd = os.open(path, os.O_RDWR); child = os.fork()\nif child == 0: libc.prctl(1, 9); time.sleep(1000)")
        child = splicer.tell("child")
        splicer.tell("again = Again(splice_into, fd, b'S')")
        wait_until(lambda: (storage / image).read_bytes()[:1] == b"S", 10, "the splice")
        (result,) = fence(host, bypassed / image).values()
        assert [each["pid"] for each in result["killed"]] == [splicer.pid]
        assert processes.running(child) or not processes.running(splicer.pid)
    assert unchanged(storage / image)


def test_who_waits_in_a_splice_is_seen(bypassed: Mount, host: Host, image: str) -> None:
    with puppet(bypassed / image) as splicer, puppet(bypassed / image) as bystander:
        splicer.tell("fd = os.open(path, os.O_RDWR); out, into = os.pipe()")
        splicer.begin("os.splice(out, fd, 4096, None, 0)")
        bystander.tell("fd = os.open(path, os.O_RDONLY)")
        (result,) = fence(host, bypassed / image).values()
        assert [(each["pid"], each["why"]) for each in result["killed"]] == [(splicer.pid, "splices into it")]
        assert bystander.tell("outcome(os.pread, fd, 1, 0)") == "EIO"


def test_an_image_that_is_open_on_two_mounts(mounted: Mount, host: Host, storage: Path, tmp_path: Path, data: str, image: str) -> None:
    other = host.mount(storage, tmp_path / "other", f"data={data}")
    with puppet(mounted / image) as writer:
        writer.tell(f"fds = [os.open(path, os.O_RDWR), os.open({str(other / image)!r}, os.O_RDWR)]")
        results = fence(host, storage / image)
        assert sorted(results) == sorted([str(mounted / image), str(other / image)])
        assert writer.tell("[outcome(os.pwrite, fd, b'x', 0) for fd in fds]") == ["EIO", "EIO"]


def test_other_images_are_left_alone(mounted: Mount, host: Host, storage: Path, image: str) -> None:
    with puppet(mounted / image) as writer:
        writer.tell("fd = os.open(path, os.O_RDWR); other = os.open(path + '2', os.O_RDWR | os.O_CREAT)")
        fence(host, mounted / image)
        assert writer.tell("outcome(os.pwrite, fd, b'x', 0)") == "EIO"
        assert writer.tell("outcome(os.pwrite, other, b'x', 0)") == "ok"
    assert (storage / "image2").read_bytes() == b"x"


def test_one_that_was_renamed_and_another_of_its_name(mounted: Mount, host: Host, storage: Path, image: str) -> None:
    with puppet(mounted / image) as writer:
        writer.tell("first = os.open(path, os.O_RDWR); os.rename(path, path + '.old')")
        writer.tell("second = os.open(path, os.O_RDWR | os.O_CREAT)")
        # The path does not tell which of the two is meant.
        (refused,) = fence(host, mounted / image, code=1).values()
        assert re.search(r"several images .* by its inode", refused["problems"][0])
        assert writer.tell("outcome(os.pwrite, first, b'x', 0)") == "ok"
        found = os.stat(storage / "image.old")
        done = host.run("lockfs", "fence", "--inode", f"{found.st_dev}:{found.st_ino}")
        assert done.returncode == 0, done.stderr
        assert writer.tell("outcome(os.pwrite, first, b'x', 0)") == "EIO"
        assert writer.tell("outcome(os.pwrite, second, b'x', 0)") == "ok"


# The mount -----------------------------------------------------------------------------------------


def test_one_that_was_unmounted_lazily(mounted: Mount, host: Host, storage: Path, image: str) -> None:
    with puppet(mounted / image) as writer:
        writer.tell("fd = os.open(path, os.O_RDWR)")
        daemon = mounted.daemon()
        assert mounts.umount(mounted.path, lazy=True) == ""
        host.mounts.remove(mounted)
        time.sleep(0.2)
        assert writer.tell("outcome(os.pwrite, fd, b'x', 0)") == "ok"
        fence(host, mounted / image)
        assert writer.tell("outcome(os.pwrite, fd, b'y', 0)") == "EIO"
    assert not processes.wait_until_gone([daemon], 10)
    assert (storage / image).read_bytes()[:1] == b"x"


def test_a_connection_that_was_aborted(bypassed: Mount, host: Host, storage: Path, image: str, expect_log: Expected) -> None:
    """Data goes on past a connection that has ended, and no inode can be declared bad: then the holders are killed."""
    expect_log("the daemon of .* is dead")
    with puppet(bypassed / image) as writer:
        writer.tell("fd = os.open(path, os.O_RDWR)")
        subprocess.run(["umount", "--force", bypassed.path], capture_output=True, check=False)
        wait_until(lambda: daemon_gone(bypassed), 10, "the mount daemon to end")
        assert writer.tell("outcome(os.pwrite, fd, b'x', 0)") == "ok"
        (result,) = fence(host, bypassed / image).values()
        assert [(each["pid"], each["why"]) for each in result["killed"]] == [(writer.pid, "has it open")]
        assert result["fenced"]
    assert (storage / image).read_bytes()[:1] == b"x"
    wait_until(lambda: not host.locks(), 10, "the lock to be released")
    unmount_dead(bypassed)


class Disk:
    """A filesystem of its own on *directory*, which can be made to hang."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.directory = directory
        self.frozen = False
        subprocess.run(["truncate", "-s", "64M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, directory], check=True)

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self.directory], check=True)
        self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            subprocess.run(["fsfreeze", "--unfreeze", self.directory], check=True)
            self.frozen = False


@pytest.fixture
def disk(storage: Path, tmp_path: Path, expect_log: Expected) -> Iterator[Disk]:
    """On `storage`.  Asked for before `host`, it goes on and is unmounted after that has ended."""
    disk = Disk(storage, tmp_path / "disk")
    yield disk
    disk.thaw()
    wait_until(lambda: not mounts.umount(storage), 10, "the storage to be let go")


def test_a_storage_that_hangs_holds_up_no_fence(
    disk: Disk, host: Host, storage: Path, tmp_path: Path, data: str, expect_log: Expected
) -> None:
    expect_log(LOST)
    (storage / "image").write_bytes(bytes(SIZE))
    mount = host.mount(storage, tmp_path / "mnt", f"data={data}")
    with puppet(mount / "image") as writer:
        writer.tell("fd = os.open(path, os.O_RDWR); other = os.dup(fd); os.pwrite(fd, b'1', 0)")
        disk.freeze()
        try:
            writer.tell("stuck = threading.Thread(target=lambda: outcome(os.pwrite, fd, b'2', 0)); stuck.start()")
            time.sleep(0.3)
            begin = time.monotonic()
            (result,) = fence(host, mount / "image").values()
            assert time.monotonic() - begin < 4
            assert result["fenced"]
            assert result["killed"] == []
            # The one write that was under way may still arrive, and that is said.
            assert not result["drained"]
            assert writer.tell("outcome(os.pwrite, other, b'3', 1)") in ("EIO", "ENOTCONN")
        finally:
            disk.thaw()
        writer.tell("stuck.join()")
        assert (storage / "image").read_bytes()[:2] in (b"1\0", b"2\0")
    wait_until(lambda: not host.locks(), 10, "the lock to be released")
    assert not mounts.umount(mount.path)


def test_a_write_that_hangs_holds_up_nobody_else(disk: Disk, host: Host, storage: Path, tmp_path: Path) -> None:
    """Requests that come one by one have one thread; another has to step in when that is stuck."""
    (storage / "image").write_bytes(bytes(SIZE))
    mount = host.mount(storage, tmp_path / "mnt", "data=gated")
    with puppet(mount / "image") as writer, puppet(mount / "image") as reader:
        writer.tell("fd = os.open(path, os.O_RDWR); [os.pwrite(fd, b'1', 0) for _ in range(100)]")
        reader.tell("fd = os.open(path, os.O_RDONLY)")
        disk.freeze()
        try:
            for _ in range(3):
                writer.tell("stuck = threading.Thread(target=lambda: outcome(os.pwrite, fd, b'2', 0)); stuck.start()")
                writer.tell("time.sleep(0.1)")
                assert reader.tell("[os.stat(path).st_size, os.fstat(fd).st_size]") == [SIZE, SIZE]
                assert reader.tell("len(os.pread(fd, 4096, 8192))") == 4096
            assert reader.tell("outcome(os.open, path, os.O_WRONLY)") == "EBUSY"
        finally:
            disk.thaw()
        writer.tell("stuck.join()")
    wait_until(lambda: not host.locks(), 10, "the lock to be released")
    assert not mounts.umount(mount.path)


# Many, and again and again -------------------------------------------------------------------------


def test_a_thousand_images(mounted: Mount, host: Host, storage: Path, data: str) -> None:
    with puppet(mounted.path) as writer:
        writer.tell("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))")
        writer.tell("fds = [os.open(f'{path}/{n}', os.O_RDWR | os.O_CREAT) for n in range(1000)]")
        writer.tell("for fd in fds: os.pwrite(fd, b'1', 0)")
        # Asks for each until it fails; then all have failed.
        writer.tell(
            "def all_fail():\n"
            "    global at\n"
            "    for fd in fds:\n"
            "        while outcome(os.pwrite, fd, b'1', 0) == 'ok': time.sleep(0.001)\n"
            "    at = time.monotonic()\n"
            "waiting = threading.Thread(target=all_fail); waiting.start()"
        )
        begin = time.monotonic()
        results = fence(host, *(mounted / str(n) for n in range(1000)))
        assert len(results) == 1000
        assert all(each["fenced"] and not each["killed"] for each in results.values())
        writer.tell("waiting.join()")
        took = writer.tell("at") - begin
        print(f"1,000 images, {data}: all fail after {took:.2f} s, which includes the start of the command")
        assert took < 5
        assert writer.process.poll() is None
    wait_until(lambda: not host.locks(), 20, "all locks to be released")


def test_nothing_is_left_of_many_fences(mounted: Mount, host: Host, storage: Path) -> None:
    (storage / "image").write_bytes(b"")

    def round_() -> None:
        with puppet(mounted / "image") as writer:
            writer.tell("fds = [os.open(f'{path}{n}', os.O_RDWR | os.O_CREAT) for n in range(20)]")
            fence(host, *(mounted / f"image{n}" for n in range(20)))
            assert writer.tell("{outcome(os.pwrite, fd, b'x', 0) for fd in fds} == {'EIO'}")
        wait_until(lambda: not host.locks(), 10, "the locks to be released")

    def open_in(pid: int) -> Counter[str]:
        kinds = Counter(what.partition(":")[0] for what in processes.descriptors(pid).values())
        del kinds["socket"]  # some idle connections are kept
        return kinds

    round_()
    daemons = [mounted.daemon(), host.lockd()]
    before = [open_in(pid) for pid in daemons]
    for _ in range(3):
        round_()

    def settled() -> bool:
        return all(not open_in(pid) - earlier for pid, earlier in zip(daemons, before, strict=True))

    try:
        wait_until(settled, 10, "the daemons to close what they opened")
    except TimeoutError:
        pytest.fail(str([open_in(pid) - earlier for pid, earlier in zip(daemons, before, strict=True)]), pytrace=False)
    assert mounted.daemon() == daemons[0]


def test_no_backing_file_stays_open(disk: Disk, host: Host, storage: Path, tmp_path: Path, expect_log: Expected) -> None:
    """The kernel keeps the backing file of a fenced inode no longer than it is open: its space becomes free."""
    expect_log(LOST)
    mount = host.mount(storage, tmp_path / "mnt", "data=passthrough")
    free = os.statvfs(storage).f_bfree
    with puppet(mount / "image") as writer:
        writer.tell("fd = os.open(path, os.O_RDWR | os.O_CREAT); os.write(fd, bytes(8 << 20)); os.fsync(fd)")
        assert os.statvfs(storage).f_bfree < free
        fence(host, mount / "image")
        os.unlink(storage / "image")
    wait_until(lambda: os.statvfs(storage).f_bfree >= free, 30, "the space to be free")
