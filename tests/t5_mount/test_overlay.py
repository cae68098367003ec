"""What the overlay promises beyond behaving like the directory below it (which the parity suite checks)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import processes
from harness.actor import Actor
from harness.faulty import Faulty
from harness.host import Host, Mount
from harness.logs import Expected

from lockfs.linux import mount as mounts

HIDDEN = ".lockfs"


# lockfs's own directory ----------------------------------------------------------------------------


def test_its_own_directory_is_invisible_and_unreachable(mount: Mount, storage: Path) -> None:
    (storage / HIDDEN).mkdir(exist_ok=True)
    (storage / HIDDEN / "secret").write_text("x")
    (storage / "file").touch()
    assert HIDDEN not in os.listdir(mount)
    for call in (
        lambda: os.stat(mount / HIDDEN),
        lambda: os.listdir(mount / HIDDEN),
        lambda: (mount / HIDDEN / "secret").read_text(),
        lambda: os.rmdir(mount / HIDDEN),
        lambda: os.rename(mount / HIDDEN, mount / "x"),
        lambda: os.unlink(mount / HIDDEN),
    ):
        with pytest.raises(FileNotFoundError):
            call()
    assert (storage / HIDDEN / "secret").read_text() == "x"


def test_nothing_can_be_made_in_its_place(mount: Mount, storage: Path) -> None:
    (mount / "file").touch()
    (mount / "directory").mkdir()
    for call in (
        lambda: os.mkdir(mount / HIDDEN),
        lambda: os.mknod(mount / HIDDEN),
        lambda: os.symlink("x", mount / HIDDEN),
        lambda: os.link(mount / "file", mount / HIDDEN),
        lambda: os.rename(mount / "directory", mount / HIDDEN),
        lambda: os.close(os.open(mount / HIDDEN, os.O_CREAT | os.O_WRONLY)),
    ):
        with pytest.raises(PermissionError):
            call()


def test_a_directory_of_that_name_further_down_is_nothing_special(mount: Mount) -> None:
    (mount / "d").mkdir()
    (mount / "d" / HIDDEN).mkdir()
    assert os.listdir(mount / "d") == [HIDDEN]


# Nothing outside the source ------------------------------------------------------------------------


def test_a_filesystem_mounted_below_the_source_is_not_crossed(host: Host, storage: Path, tmp_path: Path) -> None:
    below = storage / "below"
    below.mkdir()
    (below / "underneath").touch()
    mounts.mount(b"none", os.fsencode(below), "tmpfs", 0)
    try:
        (below / "on top").touch()
        mount = host.mount(storage, tmp_path / "mnt")
        assert os.listdir(mount / "below") == ["underneath"]
        mounts.mount(b"none", os.fsencode(below), "tmpfs", 0)
        mounts.umount(os.fsencode(below))
        assert os.listdir(mount / "below") == ["underneath"]
    finally:
        mounts.umount(os.fsencode(below))


def test_symbolic_links_lead_where_the_caller_sees_them(mount: Mount, storage: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("outside")
    (storage / "absolute").symlink_to(outside)
    (storage / "relative").symlink_to("file")
    (storage / "file").write_text("inside")
    assert (mount / "absolute").read_text() == "outside"
    assert (mount / "relative").read_text() == "inside"
    assert os.readlink(mount / "absolute") == str(outside)


def test_no_race_of_directory_and_link_leads_outside(mount: Mount, storage: Path, tmp_path: Path) -> None:
    """Somebody swaps a directory for a symbolic link to outside while others walk through it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("outside")
    (storage / "real").mkdir()
    (storage / "real" / "file").write_text("inside")
    (storage / "link").symlink_to(outside)
    stop = threading.Event()
    exchange = ctypes.CDLL(None).renameat2

    def swap() -> None:
        while not stop.is_set():
            exchange(-100, os.fsencode(storage / "real"), -100, os.fsencode(storage / "link"), 2)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        before = (outside / "file").stat()
        for _ in range(300):
            for name in ("real", "link"):
                # O_NOFOLLOW for the caller's own walk: what the daemon does must then stay inside.
                try:
                    directory = os.open(mount / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                except OSError:
                    continue
                try:
                    fd = os.open("file", os.O_RDONLY, dir_fd=directory)
                except OSError:
                    pass
                else:
                    assert os.read(fd, 10) == b"inside"
                    os.close(fd)
                os.close(directory)
        assert (outside / "file").stat().st_atime_ns == before.st_atime_ns
    finally:
        stop.set()
        thread.join()


# Mounted over itself -------------------------------------------------------------------------------


def test_mounted_over_its_own_source(host: Host, host_b: Host, storage: Path, tmp_path: Path) -> None:
    (storage / "image").write_text("before")
    other = host_b.mount(storage, tmp_path / "b")
    over = host.mount(storage, storage)
    assert os.path.ismount(storage)
    assert (over / "image").read_text() == "before"
    with Actor() as holder, Actor() as rival:
        fd = holder.call("open", over / "image", os.O_RDWR)
        holder.call("write", fd, "AFTER.", 0)
        assert rival.result("open", storage / "image", os.O_RDWR) == "EBUSY"
        assert rival.result("open", other / "image", os.O_RDWR) == "EBUSY"
    assert (other / "image").read_text() == "AFTER."
    over.umount()
    assert (storage / "image").read_text() == "AFTER."


# Nodes ---------------------------------------------------------------------------------------------


def inode(path: Path) -> int:
    return path.lstat().st_ino


def test_node_ids_are_never_used_again(mount: Mount) -> None:
    seen: set[int] = set()
    for _ in range(200):
        with (mount / "file").open("w"):
            number = inode(mount / "file")
        (mount / "file").unlink()
        assert number not in seen
        seen.add(number)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


def test_many_files_do_not_keep_many_descriptors(mount: Mount, storage: Path) -> None:
    count = int(os.environ.get("LOCKFS_TEST_FILES", "8000"))
    (storage / "many").mkdir()
    directory = os.open(storage / "many", os.O_RDONLY)
    for number in range(count):
        os.mknod(f"{number}", dir_fd=directory)
    os.close(directory)
    assert len(os.listdir(mount / "many")) == count
    for entry in os.scandir(mount / "many"):
        entry.stat(follow_symlinks=False)
    assert len(processes.descriptors(mount.daemon())) < 5000
    # All are known still: each is found again by its handle.
    for number in range(0, count, 997):
        assert (mount / "many" / str(number)).stat().st_size == 0


def test_what_the_kernel_forgets_is_forgotten(mount: Mount, storage: Path) -> None:
    """Lookup counts are exact: when the kernel drops all its inodes, the daemon drops all its descriptors."""
    (storage / "d").mkdir()
    for number in range(500):
        (storage / "d" / f"{number}").touch()
    daemon = mount.daemon()
    before = len(processes.descriptors(daemon))
    for _ in range(3):
        for entry in os.scandir(mount / "d"):
            entry.stat()
            os.stat(entry.path)
    assert len(processes.descriptors(daemon)) > before + 400
    deadline = time.monotonic() + 20
    while len(processes.descriptors(daemon)) > before + 5:
        assert time.monotonic() < deadline, "nodes stay after the kernel has forgotten them"
        drop_caches()
        time.sleep(0.1)


def test_an_unlinked_open_file_and_a_removed_working_directory(mount: Mount) -> None:
    with (mount / "file").open("w+") as file:
        file.write("content")
        file.flush()
        os.unlink(mount / "file")
        drop_caches()
        assert os.fstat(file.fileno()).st_nlink == 0
        os.ftruncate(file.fileno(), 3)
        file.seek(0)
        assert file.read() == "con"
    (mount / "dir").mkdir()
    fd = os.open(mount / "dir", os.O_PATH)
    os.rmdir(mount / "dir")
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    (mount / "file").write_text("x")
    fd = os.open(mount / "file", os.O_PATH)
    os.unlink(mount / "file")
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


# Two mounts of one source --------------------------------------------------------------------------


@pytest.fixture
def two(host: Host, host_b: Host, storage: Path, tmp_path: Path) -> tuple[Mount, Mount]:
    return host.mount(storage, tmp_path / "a"), host_b.mount(storage, tmp_path / "b")


def test_two_mounts_see_each_other_at_once(two: tuple[Mount, Mount]) -> None:
    a, b = two
    (a / "file").write_text("1")
    assert (b / "file").read_text() == "1"
    with (b / "file").open("rb", buffering=0) as reader:
        for size in range(2, 40):
            with (a / "file").open("ab") as writer:
                writer.write(b"x")
            assert os.lseek(reader.fileno(), 0, os.SEEK_END) == size
            assert (b / "file").stat().st_size == size
        with (a / "file").open("r+b") as writer:
            writer.write(b"y")
        assert os.pread(reader.fileno(), 1, 0) == b"y"
    os.chmod(a / "file", 0o600)
    assert (b / "file").stat().st_mode & 0o777 == 0o600
    os.rename(a / "file", a / "renamed")
    assert os.listdir(b) == ["renamed"]
    assert not (b / "file").exists()
    os.unlink(b / "renamed")
    assert not (a / "renamed").exists()


def test_an_open_sees_what_was_written_and_an_open_file_soon(
    host: Host, host_b: Host, storage: Path, tmp_path: Path
) -> None:
    """Through the daemon, where the kernel trusts for a moment what it knows of an image that has not changed lately."""
    a, b = (each.mount(storage, tmp_path / each.name, "data=gated") for each in (host, host_b))
    names = [f"image{number}" for number in range(10)]
    for name in names:
        (a / name).write_text("old")
    time.sleep(1.1)  # so long ago is not lately
    with Actor() as reader, Actor() as writer, Actor() as third:
        for name in names:
            open_file = reader.call("open", a / name, os.O_RDONLY)
            written = writer.call("open", b / name, os.O_RDWR)
            for content in ("old, and longer", "new, and longer"):
                assert reader.call("read", open_file, 100, 0)[:3] == "old"
                writer.call("write", written, content, 0)
                assert third.call("cat", a / name) == content
                wait_until(lambda open_file=open_file, content=content: reader.call("read", open_file, 100, 0) == content)
            writer.call("close", written)


def test_the_size_of_a_held_image_is_true_after_it_changed_hands(two: tuple[Mount, Mount]) -> None:
    a, b = two
    with Actor() as first, Actor() as second:
        for _ in range(20):
            for who, mount in ((first, a), (second, b)):
                fd = who.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
                end = who.call("size", fd)
                who.call("write", fd, "x", end)
                assert who.call("size", fd) == end + 1 == who.call("stat", mount / "image")
                who.call("close", fd)
        assert first.call("stat", a / "image") == second.call("stat", b / "image") == 2 * 20


# Errors of the storage -----------------------------------------------------------------------------


@contextmanager
def filesystem(directory: Path, image: Path, kind: str, megabytes: int) -> Iterator[None]:
    subprocess.run(["truncate", "-s", f"{megabytes}M", image], check=True)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_full_disk_is_the_callers_error_and_leaves_no_lock(host: Host, storage: Path, tmp_path: Path) -> None:
    with filesystem(storage, tmp_path / "disk", "ext4", 8):
        mount = host.mount(storage, tmp_path / "mnt")
        with Actor() as writer:
            fd = writer.call("open", mount / "big", os.O_WRONLY | os.O_CREAT)
            results = {writer.result("write", fd, "x" * (1 << 20), at << 20) for at in range(16)}
            assert results == {"ok", "ENOSPC"}
            writer.call("close", fd)
            assert host.locks() == []
            last = ""
            for number in range(5000):
                last = writer.result("open", mount / f"n{number}", os.O_WRONLY | os.O_CREAT)
                if last != "ok":
                    break
            assert last == "ENOSPC"
        wait_until(lambda: host.locks() == [])
        mount.umount()
        wait_until(lambda: not host.processes())  # lockd lets go of the storage, too


@pytest.mark.parametrize("module", ["on", "off"])
def test_a_frozen_storage_holds_up_only_who_changes_something(
    make_host: Callable[..., Host], storage: Path, tmp_path: Path, module: str
) -> None:
    host = make_host("host-a", **({"LOCKFS_KERNEL": "off"} if module == "off" else {}))
    with filesystem(storage, tmp_path / "disk", "ext4", 64):
        mount = host.mount(storage, tmp_path / "mnt", "data=gated")
        with Actor() as writer, Actor() as toucher, Actor() as other:
            fd = writer.call("open", mount / "image", os.O_WRONLY | os.O_CREAT)
            writer.call("write", fd, "x" * 4096, 0)
            (mount / "touched").touch()
            subprocess.run(["fsfreeze", "--freeze", storage], check=True)
            try:
                writer.ask("write", fd, "y" * 4096, 0)
                toucher.ask("utime", mount / "touched")
                for _ in range(50):
                    assert (other.call("stat", mount / "image"), other.call("cat", mount / "touched")) == (4096, "")
                    time.sleep(0.005)
                assert not any(actor.answered() for actor in (writer, toucher))
            finally:
                subprocess.run(["fsfreeze", "--unfreeze", storage], check=True)
            assert (writer.answer(), toucher.answer()) == (4096, None)
            assert other.call("cat", mount / "image") == "y" * 4096
            writer.call("close", fd)
        mount.umount()
        wait_until(lambda: not host.processes())


@pytest.fixture
def server(storage: Path, tmp_path: Path, leaves_nothing: None) -> Iterator[Faulty]:
    """A file server with `storage`."""
    made = Faulty(storage, tmp_path / "path")
    yield made
    made.close()


def opened(pid: int, name: str) -> list[int]:
    """Return the descriptors of a process that keep a file open, by the end of its path."""
    found = [fd for fd, path in processes.descriptors(pid).items() if path.endswith(name)]
    flags = [Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split()[3] for fd in found]
    return [fd for fd, each in zip(found, flags, strict=True) if not int(each, 8) & os.O_PATH]


def test_an_error_of_the_last_close_is_told_and_keeps_nothing(
    server: Faulty, host: Host, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    expect_log("image: what was written may not be on the storage: close: No space left on device")
    mount = host.mount(server.path, tmp_path / "mnt", "data=gated")
    with Actor() as writer, Actor() as next_one:
        for flags in (os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_DIRECT):
            fd = writer.call("open", mount / "image", flags)
            writer.call("write", fd, "x", 0)
            server.be("full")
            assert writer.result("close", fd) == "ENOSPC"
            wait_until(lambda: host.locks() == [])
            wait_until(lambda: not opened(mount.daemon(), "/image"))
            server.be("fine")
            fd = next_one.call("open", mount / "image", os.O_RDWR)
            next_one.call("close", fd)
    assert (storage / "image").read_text() == "x"
    mount.umount()


@pytest.mark.parametrize("data", ["passthrough", "gated"])
def test_a_quota_is_the_callers_error_and_leaves_no_lock(host: Host, storage: Path, tmp_path: Path, data: str) -> None:
    with filesystem(storage, tmp_path / "disk", "btrfs", 128):
        subprocess.run(["btrfs", "-q", "quota", "enable", storage], check=True)
        subprocess.run(["btrfs", "-q", "subvolume", "create", storage / "images"], check=True)
        subprocess.run(["btrfs", "-q", "qgroup", "limit", "4M", storage / "images"], check=True)
        mount = host.mount(storage / "images", tmp_path / "mnt", f"data={data}")
        with Actor() as writer:
            fd = writer.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
            results = [writer.result("write", fd, "x" * (1 << 20), at << 20) for at in range(8)]
            assert (set(results), results[0], results[-1]) == ({"ok", "EDQUOT"}, "ok", "EDQUOT")
            writer.call("close", fd)
            assert host.locks() == []
            read = writer.call("cat", mount / "image")  # the last write that was let through may be a short one
            assert len(read) <= results.index("EDQUOT") << 20
            assert read == (storage / "images" / "image").read_text() == "x" * len(read)
        mount.umount()
        wait_until(lambda: not host.processes())


def test_a_read_only_source_refuses_writers_and_leaves_no_lock(host: Host, storage: Path, tmp_path: Path) -> None:
    (storage / "image").write_text("x")
    view = tmp_path / "view"
    view.mkdir()
    mounts.mount(os.fsencode(storage), os.fsencode(view), "", mounts.MS_BIND)
    try:
        mounts.mount(b"", os.fsencode(view), "", mounts.MS_BIND | mounts.MS_REMOUNT | mounts.MS_RDONLY)
        mount = host.mount(view, tmp_path / "mnt")
        with Actor() as writer:
            for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
                assert writer.result("open", mount / "image", flags) == "EROFS"
            assert writer.result("open", mount / "new", os.O_WRONLY | os.O_CREAT) == "EROFS"
            for call in (("unlink",), ("truncate", 0), ("chmod", 0o600)):
                assert writer.result(call[0], mount / "image", *call[1:]) == "EROFS"
            assert writer.call("cat", mount / "image") == "x"
        assert host.locks() == []
        mount.umount()
        wait_until(lambda: not host.processes())
    finally:
        mounts.umount(os.fsencode(view))


def test_a_read_only_mount_refuses_writers(host: Host, storage: Path, tmp_path: Path) -> None:
    (storage / "image").write_text("x")
    mount = host.mount(storage, tmp_path / "mnt", "ro")
    with Actor() as writer:
        assert writer.result("open", mount / "image", os.O_RDWR) == "EROFS"
        assert writer.call("cat", mount / "image") == "x"
    assert host.locks() == []


def test_a_name_that_is_too_long(mount: Mount, host: Host) -> None:
    with Actor() as writer:
        for name in ("n" * 256, "n" * 5000):
            assert writer.result("open", mount / name, os.O_WRONLY | os.O_CREAT) == "ENAMETOOLONG"
    assert host.locks() == []


def wait_until(what: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Answering -----------------------------------------------------------------------------------------


def test_waiting_opens_do_not_starve_a_stat(host: Host, host_b: Host, storage: Path, tmp_path: Path) -> None:
    mount = host.mount(storage, tmp_path / "a", "wait=3,owner=open")
    (storage / "image").touch()
    (storage / "file").write_text("x")
    with Actor() as holder:
        holder.call("open", mount / "image", os.O_RDWR)
        results: list[str] = []

        def open_and_wait() -> None:
            try:
                os.close(os.open(mount / "image", os.O_RDWR))
            except OSError as error:
                results.append(error.strerror)

        threads = [threading.Thread(target=open_and_wait) for _ in range(300)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert (mount / "file").stat().st_size == 1
        assert (mount / "file").read_text() == "x"
        assert not results, "the others were to be waiting still"
        for thread in threads:
            thread.join()
        assert results == ["Device or resource busy"] * 300


def test_a_caller_that_is_killed_while_it_waits_holds_nothing(host: Host, storage: Path, tmp_path: Path) -> None:
    mount = host.mount(storage, tmp_path / "a", "wait=60")
    (storage / "image").touch()
    with Actor() as holder, Actor() as next_one:
        fd = holder.call("open", mount / "image", os.O_RDWR)
        waiting = Actor()
        waiting.ask("open", mount / "image", os.O_RDWR)
        time.sleep(0.2)
        waiting.process.kill()
        time.sleep(0.1)
        holder.call("close", fd)
        assert next_one.result("open", mount / "image", os.O_RDWR) == "ok"
        waiting.end()


def test_limits_of_the_connection(mount: Mount) -> None:
    from lockfs.fs.connection import MAX_BACKGROUND
    from lockfs.linux import mountinfo, tree

    found = mountinfo.at(os.fsencode(mount.path))
    assert found is not None
    control = tree.detached(b"fusectl")
    fd = os.open(f"{os.minor(found.dev)}/max_background", os.O_RDONLY, dir_fd=control)
    assert int(os.read(fd, 20)) == MAX_BACKGROUND
    os.close(fd)
    os.close(control)


def test_sigterm_unmounts_a_mount_that_is_not_in_use(mount: Mount) -> None:
    pid = mount.daemon()
    os.kill(pid, 15)
    assert not processes.wait_until_gone([pid], 10)
    assert not os.path.ismount(mount)
    mount.host.mounts.remove(mount)


def test_sigterm_leaves_a_mount_that_is_in_use(mount: Mount, expect_log: Callable[..., None]) -> None:
    expect_log("SIGTERM: .* stays mounted: Device or resource busy")
    with (mount / "file").open("w") as file:
        os.kill(mount.daemon(), 15)
        wait_until(lambda: "stays mounted" in mount.host.log())
        file.write("still here")
    assert (mount / "file").read_text() == "still here"
