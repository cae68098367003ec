"""The command ``lockfs fence``."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until

from lockfs.cli import fence
from lockfs.protocol.messages import FenceResult, KilledProcess, MountInfo
from lockfs.protocol.messages import Mount as MountMessage

OK, USAGE, SYSTEM = 0, 1, 2


@pytest.fixture
def holder(mount: Mount, expect_log: Expected) -> Actor:
    """A process that has an image open for writing, which is going to be fenced."""
    expect_log("lost the lock|fenced")
    with Actor() as actor:
        fd = actor.call("open", mount / "vm.img", os.O_RDWR | os.O_CREAT)
        actor.call("write", fd, "data", 0)
        actor.fd = fd  # type: ignore[attr-defined]
        yield actor


def fails(holder: Actor) -> bool:
    return holder.result("write", holder.fd, "more", 0) == "EIO"  # type: ignore[attr-defined]


def test_it_says_how_it_went(host: Host, mount: Mount, holder: Actor) -> None:
    done = host.run("lockfs", "fence", mount / "vm.img")
    assert (done.returncode, done.stdout, done.stderr) == (OK, f"{mount / 'vm.img'}: fenced\n", "")
    assert fails(holder)
    # What is fenced may be fenced again.
    assert host.run("lockfs", "fence", mount / "vm.img").returncode == OK


def test_json(host: Host, mount: Mount, holder: Actor) -> None:
    done = host.run("lockfs", "fence", "--json", "--reason", "a drill", mount / "vm.img", mount / "other.img")
    assert done.returncode == USAGE
    assert json.loads(done.stdout) == {"images": [
        {"image": str(mount / "vm.img"), "mountpoint": str(mount.path), "fenced": True, "drained": True,
         "daemon_killed": False, "killed": [], "problems": []},
        {"image": str(mount.source / "other.img"), "mountpoint": "", "fenced": False, "drained": False,
         "daemon_killed": False, "killed": [], "problems": ["this host does not hold it"]},
    ]}  # fmt: skip
    assert "a drill" in host.log()
    assert fails(holder)


def test_by_the_path_on_the_storage(host: Host, mount: Mount, holder: Actor) -> None:
    assert host.run("lockfs", "fence", mount.source / "vm.img").returncode == OK
    assert fails(holder)


def test_by_its_inode(host: Host, mount: Mount, holder: Actor) -> None:
    found = os.stat(mount.source / "vm.img")
    assert host.run("lockfs", "fence", "--inode", f"{found.st_dev}:{found.st_ino}").returncode == OK
    assert fails(holder)


def test_by_a_link_to_the_mount(host: Host, mount: Mount, holder: Actor, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mount.path)
    assert host.run("lockfs", "fence", tmp_path / "link" / "vm.img").returncode == OK
    assert fails(holder)


@pytest.mark.usefixtures("succession")
def test_it_waits_for_no_daemon_that_hangs(host: Host, mount: Mount, holder: Actor, expect_log: Expected) -> None:
    expect_log("does not fence .*: it is killed|is dead")
    os.kill(mount.daemon(), signal.SIGSTOP)
    done = host.run("lockfs", "fence", mount / "vm.img", timeout=20)
    assert done.returncode == OK
    assert "the mount daemon of" in done.stdout
    assert holder.result("write", holder.fd, "more", 0) == "EIO"  # type: ignore[attr-defined]
    holder.result("close", holder.fd)  # type: ignore[attr-defined]
    wait_until(lambda: not host.locks(), 10, "the image to be free")
    assert (mount / "vm.img").read_text() == "data"  # another daemon serves
    mount.umount()
    assert (mount.source / "vm.img").read_text() == "data"


@pytest.mark.parametrize(("arguments", "complaint"), [
    ([], "no image was named"), (["--inode", "5"], "must be DEV:INO"), (["--inode", "a:b"], "must be DEV:INO"),
])  # fmt: skip
def test_wrong_use(host: Host, mount: Mount, arguments: list[str], complaint: str) -> None:
    done = host.run("lockfs", "fence", *arguments)
    assert done.returncode == USAGE
    assert complaint in done.stderr


def test_without_lockd(host: Host) -> None:
    host.run_dir.mkdir(exist_ok=True)
    done = host.run("lockfs", "fence", "/mnt/vm.img")
    assert done.returncode == SYSTEM
    assert "no lockd is running" in done.stderr


# The path ------------------------------------------------------------------------------------------


def mounts(*pairs: tuple[Path, Path]) -> list[MountInfo]:
    return [
        MountInfo("id", MountMessage(str(source), str(mountpoint), "ext4", {}, "nop"), 1, 0.0, 0)
        for source, mountpoint in pairs
    ]


def test_no_name_on_a_mount_is_looked_up(tmp_path: Path) -> None:
    mountpoint, source = tmp_path / "mnt", tmp_path / "storage"
    mountpoint.mkdir()
    # Neither is this link followed, which lies where the mount is.
    (mountpoint / "link").symlink_to("/elsewhere")
    known = mounts((source, mountpoint))

    def found(path: Path | str) -> str:
        return os.fsdecode(fence.on_storage(os.fsencode(path), known))

    assert found(mountpoint / "link" / "a") == str(source / "link" / "a")
    assert found(source / "dir" / "a") == str(source / "dir" / "a")
    (tmp_path / "to").symlink_to("mnt/../mnt")
    assert found(tmp_path / "to" / "a") == str(source / "a")
    (tmp_path / "loop").symlink_to("loop")
    assert found(tmp_path / "loop" / "a") == str(tmp_path / "loop" / "a")
    assert found("/no/such/place") == "/no/such/place"


def test_a_path_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnt").mkdir()
    monkeypatch.chdir(tmp_path / "mnt")
    found = fence.on_storage(b"a", mounts((tmp_path / "storage", tmp_path / "mnt")))
    assert found == os.fsencode(tmp_path / "storage" / "a")


# Printing ------------------------------------------------------------------------------------------


def test_what_could_not_be_stopped() -> None:
    result = FenceResult(
        "/mnt/a\x1b", "/mnt", daemon_killed=True, killed=[KilledProcess(7, "fio", "has it mapped")], problems=["it hangs"]
    )
    assert fence.describe(result).splitlines() == [
        "/mnt/a\\x1b: not fenced",
        "  problem: it hangs",
        "  the mount daemon of /mnt did not answer, and was killed",
        "  killed process 7 (fio), which has it mapped",
    ]


def test_what_may_still_arrive() -> None:
    assert "may still get to the storage" in fence.describe(FenceResult("/mnt/a", "/mnt", fenced=True))
