"""The options that say which images are guarded, and whose an open is."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, Mount

READ, WRITE, READ_WRITE = os.O_RDONLY, os.O_WRONLY, os.O_RDWR


@pytest.fixture
def actors() -> Iterator[Callable[..., Actor]]:
    made: list[Actor] = []

    def make(*prefix: str | Path) -> Actor:
        made.append(Actor(prefix))
        return made[-1]

    yield make
    for each in made:
        each.__exit__(None, None, None)


@pytest.fixture(params=["gated", "passthrough"])
def data(request: pytest.FixtureRequest) -> str:
    """Where data flows; who gets what does not depend on it."""
    return str(request.param)


@pytest.fixture
def mounted(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, data: str
) -> Callable[[str], tuple[Mount, Mount]]:
    """Mount the storage on two hosts with the given options."""
    (storage / "a.img").write_text("image")
    (storage / "notes.txt").write_text("text")

    def mount(options: str) -> tuple[Mount, Mount]:
        options += f",data={data}"
        return host.mount(storage, tmp_path / "a", options), host_b.mount(storage, tmp_path / "b", options)

    return mount


# images= -------------------------------------------------------------------------------------------


def test_only_what_matches_is_guarded(mounted, actors) -> None:
    a, b = mounted("images=*.img,wait=0.3")
    first, second = actors(), actors()
    for name, expected in (("a.img", "EBUSY"), ("notes.txt", "ok")):
        first.call("open", a / name, WRITE)
        assert second.result("open", b / name, WRITE) == expected
        assert second.result("truncate", b / name, 1) == expected
    assert second.result("getxattr", b / "notes.txt", "user.lockfs.holder") == "ENODATA"


# shared= -------------------------------------------------------------------------------------------


def test_shared_images_have_many_writers_but_no_remover(mounted, actors) -> None:
    a, b = mounted("shared=*.img,wait=0.3")
    first, second = actors(), actors()
    fd = first.call("open", a / "a.img", READ_WRITE)
    assert second.result("open", b / "a.img", READ_WRITE) == "ok"
    assert second.result("unlink", b / "a.img") == "EBUSY"
    assert second.result("rename", b / "notes.txt", b / "a.img") == "EBUSY"
    first.call("close", fd)
    assert second.result("unlink", b / "a.img") == "ok"


# pin= ----------------------------------------------------------------------------------------------


def test_readers_of_a_pinned_image_keep_writers_away(mounted, actors) -> None:
    a, b = mounted("pin=a.img,wait=0.3")
    reader, second_reader, writer = actors(), actors(), actors()
    fds = [reader.call("open", a / "a.img", READ), second_reader.call("open", b / "a.img", READ)]
    for call in (("open", WRITE), ("truncate", 0), ("unlink",)):
        assert writer.result(call[0], b / "a.img", *call[1:]) == "EBUSY"
    reader.call("close", fds[0])
    assert writer.result("open", b / "a.img", WRITE) == "EBUSY"
    second_reader.call("close", fds[1])
    assert writer.result("open", b / "a.img", WRITE) == "ok"
    assert reader.result("open", a / "a.img", READ) == "EBUSY"
    assert reader.result("open", a / "notes.txt", READ) == "ok"


def test_a_reader_of_a_pinned_image_may_become_its_writer(mounted, actors) -> None:
    """As a hypervisor does: it opens for writing while it still has the image open for reading."""
    a, b = mounted("pin=a.img,wait=0.3")
    owner, other = actors(), actors()
    reading = owner.call("open", a / "a.img", READ)
    writing = owner.call("open", a / "a.img", READ_WRITE)
    owner.call("close", reading)
    assert other.result("open", b / "a.img", READ) == "EBUSY"
    reading = owner.call("open", a / "a.img", READ)
    owner.call("close", writing)
    assert other.result("open", b / "a.img", READ) == "ok"
    assert owner.result("open", a / "a.img", READ_WRITE) == "EBUSY"
    owner.call("close", reading)


def test_truncation_through_a_read_only_open_of_a_pinned_image(mounted, actors) -> None:
    a, b = mounted("pin=a.img,wait=0.3")
    first, other = actors(), actors()
    fd = first.call("open", a / "a.img", READ | os.O_TRUNC)
    assert other.result("open", b / "a.img", WRITE) == "EBUSY"
    assert other.result("open", b / "a.img", READ) == "ok"
    first.call("close", fd)


# owner= --------------------------------------------------------------------------------------------


def test_two_opens_are_two_owners(mounted, actors) -> None:
    a, _b = mounted("owner=open,wait=0.3")
    one = actors()
    fd = one.call("open", a / "a.img", WRITE)
    assert one.result("open", a / "a.img", WRITE) == "EBUSY"
    assert one.result("truncate", a / "a.img", 0) == "EBUSY"
    one.call("close", fd)
    assert one.result("open", a / "a.img", WRITE) == "ok"


@pytest.fixture
def control_group(tmp_path: Path) -> Iterator[Path]:
    """A new control group of the unified hierarchy."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            group = Path(line.split()[4]) / f"lockfs-test-{os.getpid()}"
            group.mkdir()
            yield group
            deadline = time.monotonic() + 10
            while (group / "cgroup.procs").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            group.rmdir()
            return
    pytest.skip("this host has no cgroup v2 hierarchy")


def test_a_control_group_is_one_owner(mounted, actors, control_group: Path) -> None:
    a, b = mounted("owner=cgroup,wait=0.3")
    inside, also_inside, outside = actors(), actors(), actors()
    for each in (inside, also_inside):
        (control_group / "cgroup.procs").write_text(str(each.pid))
    inside.call("open", a / "a.img", WRITE)
    assert also_inside.result("open", a / "a.img", WRITE) == "ok"
    assert outside.result("open", a / "a.img", WRITE) == "EBUSY"
    assert also_inside.result("open", b / "a.img", WRITE) == "EBUSY"
    for each in (inside, also_inside):
        each.end()


def test_threads_of_a_process_are_one_owner(mounted) -> None:
    import threading

    a, _b = mounted("wait=0.3")
    fds: list[int] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: fds.append(os.open(a / "a.img", WRITE)))
        thread.start()
        thread.join()
    assert len(fds) == 3
    for fd in fds:
        os.close(fd)


def test_a_caller_in_another_pid_namespace_owns_by_itself(mounted, actors) -> None:
    """The mount daemon may see such a caller (a child namespace) or not; either way it is one owner, and held out."""
    a, b = mounted("wait=0.3")
    inside = actors("unshare", "--pid", "--fork")
    outside = actors()
    inside.call("open", a / "a.img", WRITE)
    assert outside.result("open", a / "a.img", WRITE) == "EBUSY"
    assert outside.result("open", b / "a.img", WRITE) == "EBUSY"


# wait= ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_an_open_waits_for_the_holder_to_let_go(mounted, actors, where: str) -> None:
    a, b = mounted("wait=20")
    holder, waiting = actors(), actors()
    fd = holder.call("open", a / "a.img", WRITE)
    waiting.ask("open", (a if where == "here" else b) / "a.img", WRITE)
    time.sleep(0.3)
    began = time.monotonic()
    holder.call("close", fd)
    waiting.answer()
    assert time.monotonic() - began < 10


def test_without_waiting_a_release_under_way_is_waited_for(mounted, actors) -> None:
    """close() returns before the kernel has told anybody; the next open must not be refused for that."""
    a, b = mounted("wait=0")
    first, second = actors(), actors()
    for _ in range(200):
        for who in (first, second):
            fd = who.call("open", a / "a.img", WRITE)
            who.call("close", fd)
    del b


def test_a_refusal_comes_after_the_wait(mounted, actors) -> None:
    a, b = mounted("wait=0.5")
    holder, refused = actors(), actors()
    holder.call("open", a / "a.img", WRITE)
    for mount in (a, b):
        began = time.monotonic()
        assert refused.result("open", mount / "a.img", WRITE) == "EBUSY"
        assert time.monotonic() - began >= 0.5


# key= ----------------------------------------------------------------------------------------------


def test_where_locks_go_by_path_a_held_image_keeps_its_name(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, actors
) -> None:
    """Two hosts that mount at the same place, each in its namespace, would see the lock under the old name only."""
    lockspace = tmp_path / "lockspace"
    lockspace.mkdir()
    (storage / "a.img").write_text("image")
    (storage / "other").write_text("x")
    mount = host.mount(storage, tmp_path / "a", f"key=path,lockspace={lockspace},wait=0.3")
    owner = actors()
    fd = owner.call("open", mount / "a.img", WRITE)
    assert len(list(lockspace.iterdir())) == 1
    assert owner.result("rename", mount / "a.img", mount / "b.img") == "EBUSY"
    assert owner.result("renameat2", mount / "other", mount / "a.img", 2) == "EBUSY"
    assert owner.result("unlink", mount / "a.img") == "ok"
    owner.call("close", fd)
    assert owner.result("rename", mount / "other", mount / "b.img") == "ok"
    deadline = time.monotonic() + 5
    while list(lockspace.iterdir()):
        assert time.monotonic() < deadline


# managers= -----------------------------------------------------------------------------------------


@pytest.fixture
def manager(actors, tmp_path: Path) -> Actor:
    """A process whose program file has the name of a manager."""
    program = tmp_path / "virtqemud"
    shutil.copy(os.path.realpath(sys.executable), program)
    script = tmp_path / "run"
    script.write_text(f'#!/bin/sh\nshift\nPYTHONHOME={sys.base_prefix} exec {program} "$@"\n')
    script.chmod(0o755)
    return actors(script)


@pytest.mark.parametrize("data", ["gated"])
def test_a_manager_opens_what_others_hold_but_cannot_write(mounted, actors, manager: Actor, storage: Path) -> None:
    a, b = mounted("wait=0.3")
    holder = actors()
    fd = holder.call("open", a / "a.img", WRITE)
    for mount in (a, b):
        managed = manager.call("open", mount / "a.img", READ_WRITE)
        assert manager.call("read", managed, 5, 0) == "image"
        assert manager.result("write", managed, "x", 0) == "EBUSY"
        assert manager.result("ftruncate", managed, 0) == "EBUSY"
        assert manager.result("mmap", managed, 5) == "ENODEV"
        assert manager.call("fork_and", "open", str(mount / "a.img"), READ_WRITE) == 0
        assert manager.result("open", mount / "a.img", WRITE | os.O_TRUNC) == "EBUSY"
        manager.call("close", managed)
    assert (storage / "a.img").read_text() == "image"
    holder.call("close", fd)


def test_a_manager_takes_the_lock_with_its_first_write(mounted, actors, manager: Actor, storage: Path) -> None:
    a, b = mounted("wait=0.3")
    other = actors()
    managed = manager.call("open", a / "a.img", READ_WRITE)
    fd = other.call("open", b / "a.img", WRITE)
    other.call("close", fd)
    manager.call("write", managed, "I", 0)
    assert other.result("open", b / "a.img", WRITE) == "EBUSY"
    assert (storage / "a.img").read_text() == "Image"
    manager.call("close", managed)
    assert other.result("open", b / "a.img", WRITE) == "ok"


@pytest.mark.parametrize("data", ["passthrough"])
def test_a_manager_shares_what_is_held_beside_it(mounted, actors, manager: Actor) -> None:
    """The kernel takes no mix on one file: where it is open past the daemon, a manager's handle is such a one, too."""
    a, b = mounted("wait=0.3")
    holder, other = actors(), actors()
    fd = holder.call("open", a / "a.img", READ_WRITE)
    elsewhere = manager.call("open", b / "a.img", READ_WRITE)
    assert manager.result("write", elsewhere, "x", 0) == "EBUSY"
    here = manager.call("open", a / "a.img", READ_WRITE)
    holder.call("close", fd)
    assert other.result("open", b / "a.img", WRITE) == "EBUSY"
    manager.call("close", here)
    assert other.result("open", b / "a.img", WRITE) == "ok"


@pytest.mark.parametrize("data", ["passthrough"])
def test_a_manager_is_refused_what_is_held_elsewhere_and_open_here(mounted, actors, manager: Actor) -> None:
    a, b = mounted("wait=0.3")
    holder, reader = actors(), actors()
    holder.call("open", a / "a.img", READ_WRITE)
    reader.call("open", b / "a.img", READ)
    assert manager.result("open", b / "a.img", READ_WRITE) == "EBUSY"


def test_who_is_a_manager_can_be_chosen(mounted, actors, manager: Actor) -> None:
    a, b = mounted("wait=0.3,managers=")
    holder = actors()
    holder.call("open", a / "a.img", WRITE)
    assert manager.result("open", b / "a.img", READ_WRITE) == "EBUSY"


# The next-to-last line of defence: two owners in one process tree -----------------------------------


def test_a_handle_keeps_the_lock_while_any_copy_of_it_is_open(mounted, actors) -> None:
    a, b = mounted("wait=0.3")
    other = actors()
    fd = os.open(a / "a.img", READ_WRITE)
    child = os.fork()
    if child == 0:
        time.sleep(1.5)
        os._exit(0)
    os.close(fd)
    assert other.result("open", b / "a.img", WRITE) == "EBUSY"
    os.waitpid(child, 0)
    deadline = time.monotonic() + 5
    while other.result("open", b / "a.img", WRITE) == "EBUSY":
        assert time.monotonic() < deadline


def test_a_shared_mapping_keeps_the_lock_after_close(mounted, actors, storage: Path) -> None:
    import ctypes
    import mmap

    a, b = mounted("wait=0.3")
    other = actors()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(a / "a.img", READ_WRITE)
    address = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    assert other.result("open", b / "a.img", WRITE) == "EBUSY"
    ctypes.memmove(address, b"IMAGE", 5)
    libc.munmap(address, 4096)
    deadline = time.monotonic() + 5
    while other.result("open", b / "a.img", WRITE) == "EBUSY":
        assert time.monotonic() < deadline
    assert (storage / "a.img").read_text() == "IMAGE"
