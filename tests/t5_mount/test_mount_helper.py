"""mount.lockfs: the calling form of mount(8), what is checked first, what a mount looks like, remounts."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import logs, mounts, processes
from harness.host import BIN, Host, Mount
from harness.waiting import wait_until

from lockfs.cli.mount import kernel_data
from lockfs.linux import mountinfo

USAGE, SYSTEM, INTERRUPTED, FAILED = 1, 2, 8, 32
PATIENCE = 20.0


@dataclass
class Here:
    """A host, a source and a mountpoint that are there."""

    host: Host
    source: Path
    mountpoint: Path

    def call(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Call the helper as it is."""
        return self.host.run("mount.lockfs", *arguments)

    def refused(self, code: int, *arguments: str | Path) -> str:
        """Call the helper; it must fail with *code*, and before it has started anything.  Return what it said."""
        done = self.call(*arguments)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("mount.lockfs: ")
        assert "Traceback" not in done.stderr
        assert not self.host.processes()
        return done.stderr


@pytest.fixture
def here(host: Host, storage: Path, tmp_path: Path) -> Here:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    return Here(host, storage, mountpoint)


@pytest.fixture
def bind() -> Iterator[Callable[[Path, Path], Path]]:
    """Make bind mounts, which are gone after the test."""
    made: list[Path] = []

    def make(source: Path, target: Path) -> Path:
        target.mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", source, target], check=True)
        made.append(target)
        return target

    yield make
    for target in reversed(made):
        mounts.umount(target)


def info(mount: Mount | Path) -> mountinfo.MountInfo:
    found = mountinfo.at(os.fsencode(mount))
    assert found is not None
    return found


# Calling form -------------------------------------------------------------------------------------


def test_it_starts_fast() -> None:
    heavy = "{'trio', 'pyfuse3', 'msgspec', 'lockfs.fs', 'lockfs.lockd'}"
    code = f"import sys, lockfs.cli.mount; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(host: Host, option: str) -> None:
    done = host.run("mount.lockfs", option)
    assert done.returncode == 0
    for text in ("SOURCE MOUNTPOINT", "-N NAMESPACE", "wait=SECONDS", "Options of the backend fcntl-lockd"):
        assert text in done.stdout


def test_version(host: Host) -> None:
    assert host.run("mount.lockfs", "--version").stdout == "mount.lockfs 0.1.0\n"


def test_fake_checks_the_options_and_does_nothing(here: Here, tmp_path: Path) -> None:
    assert here.call("-f", "/nowhere", "/nowhere", "-o", "rw,wait=3,backend=nop").returncode == 0
    assert here.call("-sfnv", here.source, here.mountpoint, "-o", "rw,sloppy=3").returncode == 0
    assert "wait=x" in here.refused(USAGE, "-f", here.source, here.mountpoint, "-o", "wait=x")
    assert not mounts.is_mounted(here.mountpoint)
    assert not here.host.processes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a source and a mountpoint"),
        (["/a"], "give a source and a mountpoint"),
        (["/a", "/b", "/c"], "give a source and a mountpoint"),
        (["-Z", "/a", "/b"], "-Z"),
        (["/a", "/b", "-o"], "-o"),
        (["/a", "/b", "-t", "ext4"], "not ext4"),
        (["/a", "/b", "-o", "waitt=3"], "did you mean 'wait'"),
        (["/a", "/b", "-o", "backend=zfs"], "Installed backends: "),
    ],
)
def test_wrong_use(here: Here, arguments: list[str], said: str) -> None:
    assert said in here.refused(USAGE, *arguments)


def test_the_hint_has_a_line_of_its_own(here: Here) -> None:
    said = here.refused(USAGE, "/a", "/b", "-o", "waitt=3")
    assert said.splitlines()[1] == "  `lockfs options` lists them all."


def test_only_root_may_mount(here: Here) -> None:
    os.chmod(here.host.run_dir, 0o755)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lockfs.cli.mount", here.source, here.mountpoint],
        env=here.host.environment, capture_output=True, text=True, check=False, user=65534, group=65534, cwd="/",
    )  # fmt: skip
    assert done.returncode == USAGE
    assert "only root can mount lockfs" in done.stderr
    assert "sudo" in done.stderr


def test_selinux_labels_are_quoted_for_the_kernel() -> None:
    labels = {"context": "u:r:t:s0:c1,c2", "rootcontext": "u:r:t"}
    assert kernel_data(labels) == 'context="u:r:t:s0:c1,c2",rootcontext="u:r:t"'


# What is checked first ----------------------------------------------------------------------------


def test_what_is_missing_for_passthrough_is_said_in_one_line(here: Here, expect_log: logs.Expected) -> None:
    expect_log("no data=passthrough here: The kernel module is switched off")
    here.host.variables["LOCKFS_KERNEL"] = "off"
    done = here.call(here.source, here.mountpoint, "-o", "data=passthrough")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr.splitlines() == [
        "mount.lockfs: no data=passthrough here: The kernel module is switched off (LOCKFS_KERNEL=off).",
        "  Use data=auto or data=gated.",
    ]
    assert not os.path.ismount(here.mountpoint)


def test_a_missing_source(here: Here) -> None:
    said = here.refused(FAILED, here.source / "no", here.mountpoint)
    assert f"the source '{here.source}/no' does not exist" in said
    assert "Is the shared storage mounted?" in said


def test_a_missing_mountpoint(here: Here) -> None:
    assert f"mkdir -p {here.mountpoint}/no" in here.refused(FAILED, here.source, here.mountpoint / "no")


def test_a_file_is_no_directory(here: Here, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert f"the source '{file}' is not a directory" in here.refused(FAILED, file, here.mountpoint)
    assert f"the mountpoint '{file}' is not a directory" in here.refused(FAILED, here.source, file)


def test_a_name_cannot_forge_a_message(here: Here) -> None:
    assert "no\\x0amount.lockfs: fine" in here.refused(FAILED, "/no\nmount.lockfs: fine", here.mountpoint)


def test_a_mountpoint_inside_the_source(here: Here, tmp_path: Path) -> None:
    inside = here.source / "in"
    inside.mkdir()
    link = tmp_path / "link"
    link.symlink_to(inside)
    for path in (inside, link, here.source / ".." / here.source.name / "in"):
        assert "lies inside the source" in here.refused(FAILED, here.source, path)


def test_a_source_inside_the_mountpoint(here: Here) -> None:
    inside = here.mountpoint / "in"
    inside.mkdir()
    assert "lies inside the mountpoint" in here.refused(FAILED, inside, here.mountpoint)


def test_a_bind_mount_does_not_hide_it(here: Here, tmp_path: Path, bind: Callable[[Path, Path], Path]) -> None:
    (here.source / "in").mkdir()
    other = bind(here.source, tmp_path / "other")
    part = bind(here.source / "in", tmp_path / "part")
    assert "lies inside the source" in here.refused(FAILED, here.source, other / "in")
    assert "lies inside the source" in here.refused(FAILED, here.source, part)
    assert "lies inside the source" in here.refused(FAILED, other, here.source / "in")
    assert "lies inside the mountpoint" in here.refused(FAILED, part, here.source)


def test_a_sibling_whose_name_begins_alike_is_not_inside(here: Here) -> None:
    sibling = here.source.with_name(here.source.name + "-2")
    mount = here.host.mount(here.source, sibling)
    mount.umount()


def test_no_fuse_in_the_kernel(here: Here) -> None:
    script = 'mount -t tmpfs none /dev && exec "$@"'
    program = BIN / "mount.lockfs"
    done = here.host.run(
        "unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", program, here.source, here.mountpoint
    )
    assert done.returncode == SYSTEM
    assert "/dev/fuse cannot be opened" in done.stderr
    assert "modprobe fuse" in done.stderr
    assert not here.host.processes()


# Mounting -----------------------------------------------------------------------------------------


def test_a_mount_serves_when_the_helper_returns(here: Here) -> None:
    (here.source / "file").write_text("content")
    mount = here.host.mount(here.source, here.mountpoint)
    assert (mount / "file").read_text() == "content"
    there = info(mount)
    assert (there.fstype, there.source) == ("fuse.lockfs", os.fsencode(here.source))
    assert {"nosuid", "nodev"} <= set(there.options)


def test_the_source_is_listed_as_it_was_typed(here: Here, tmp_path: Path) -> None:
    link = tmp_path / "a link"
    link.symlink_to(here.source)
    mount = here.host.mount(link, here.mountpoint)
    assert info(mount).source == os.fsencode(link)


@pytest.mark.parametrize(
    ("options", "has", "lacks"),
    [
        ("ro", {"ro", "nosuid", "nodev"}, {"rw"}),
        ("suid,dev", {"rw"}, {"nosuid", "nodev"}),
        ("noexec,noatime", {"noexec", "noatime", "nosuid"}, {"relatime"}),
        ("ro,rw", {"rw"}, {"ro"}),
    ],
)
def test_mount_flags(here: Here, options: str, has: set[str], lacks: set[str]) -> None:
    mount = here.host.mount(here.source, here.mountpoint, options)
    flags = set(info(mount).options)
    assert has <= flags
    assert not lacks & flags


def test_options_may_come_before_and_after_and_more_than_once(here: Here) -> None:
    done = here.call("-v", "-o", "noexec", here.source, "-r", here.mountpoint, "-o", "noatime,wait=2", "-t", "lockfs")
    try:
        assert done.returncode == 0, done.stderr
        assert {"ro", "noexec", "noatime"} <= set(info(here.mountpoint).options)
        for step in ("mounting", "lockd runs", "started the mount daemon", "is mounted"):
            assert step in done.stderr
    finally:
        mounts.umount(here.mountpoint)


def test_a_directory_over_itself(here: Here) -> None:
    (here.source / "file").write_text("content")
    mount = here.host.mount(here.source, here.source)
    assert (mount / "file").read_text() == "content"
    assert "is already mounted" in here.call(here.source, here.source).stderr


def test_a_bind_mount_of_the_source_is_as_good_as_the_source(
    here: Here, tmp_path: Path, bind: Callable[[Path, Path], Path]
) -> None:
    (here.source / "file").write_text("content")
    mount = here.host.mount(here.source, bind(here.source, tmp_path / "other"))
    assert (mount / "file").read_text() == "content"
    mount.umount()


def test_one_source_on_two_mountpoints(here: Here, tmp_path: Path) -> None:
    one = here.host.mount(here.source, here.mountpoint)
    two = here.host.mount(here.source, tmp_path / "two")
    (one / "file").write_text("content")
    assert (two / "file").read_text() == "content"


def test_names_of_any_bytes(here: Here, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a,b \\ \xff\n=")
    source = odd / "source"
    source.mkdir(parents=True)
    (source / "file").write_text("content")
    mount = here.host.mount(source, odd / "mnt")
    assert (mount / "file").read_text() == "content"
    assert info(mount).source == os.fsencode(source)


def test_already_mounted(here: Here) -> None:
    here.host.mount(here.source, here.mountpoint)
    done = here.call(here.source, here.mountpoint)
    assert done.returncode == FAILED
    assert f"'{here.source}' is already mounted on '{here.mountpoint}'" in done.stderr
    assert len(mounts.below(here.mountpoint)) == 1


def test_a_mountpoint_that_has_another_mount(here: Here, tmp_path: Path) -> None:
    here.host.mount(here.source, here.mountpoint)
    other = tmp_path / "other"
    other.mkdir()
    done = here.call(other, here.mountpoint)
    assert done.returncode == FAILED
    assert f"umount {here.mountpoint}" in done.stderr


def test_no_mount_upon_a_mount(here: Here, tmp_path: Path) -> None:
    mount = here.host.mount(here.source, here.mountpoint)
    (mount / "in").mkdir()
    for source in (mount.path, mount / "in"):
        done = here.call(source, tmp_path)
        assert done.returncode == FAILED
        assert "is itself on a lockfs mount" in done.stderr


def test_what_lockd_refuses_reaches_the_person(here: Here, tmp_path: Path, expect_log: logs.Expected) -> None:
    expect_log("is already mounted on .* with backend nop, not fcntl-lockd")
    here.host.mount(here.source, here.mountpoint, "backend=nop")
    (tmp_path / "two").mkdir()
    done = here.call(here.source, tmp_path / "two", "-o", "backend=fcntl-lockd")
    assert done.returncode == FAILED
    assert str(here.mountpoint) in done.stderr
    assert not mounts.is_mounted(tmp_path / "two")


def test_a_mount_whose_daemon_was_killed_for_good(here: Here) -> None:
    here.host.variables["LOCKFS_RESTARTS"] = "0"
    mount = here.host.mount(here.source, here.mountpoint)
    processes.end([mount.daemon()], signal.SIGKILL, PATIENCE)
    with pytest.raises(OSError, match=r"Transport endpoint is not connected|Software caused connection abort"):
        os.stat(mount)
    done = here.call(here.source, here.mountpoint)
    assert done.returncode == FAILED
    assert f"umount {here.mountpoint}" in done.stderr
    assert not mounts.umount(mount.path)
    here.host.mount(here.source, here.mountpoint)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_mount_leaves_nothing(here: Here, tmp_path: Path, how: signal.Signals) -> None:
    # A lockd that is stopped keeps the next mount waiting.
    here.host.mount(here.source, here.mountpoint)
    lockd = here.host.lockd()
    two = tmp_path / "two"
    two.mkdir()
    os.kill(lockd, signal.SIGSTOP)
    try:
        helper = subprocess.Popen(
            [BIN / "mount.lockfs", here.source, two], env=here.host.environment, stderr=subprocess.PIPE, text=True
        )
        with helper:
            wait_until(lambda: len(here.host.processes("lockfs.fs")) == 2, PATIENCE, "the second daemon")
            helper.send_signal(how)
            _, said = helper.communicate(timeout=PATIENCE)
        assert helper.returncode == INTERRUPTED, said
        assert "interrupted" in said
        assert not mounts.is_mounted(two)
        assert len(here.host.processes("lockfs.fs")) == 1
    finally:
        os.kill(lockd, signal.SIGCONT)


def test_another_mount_namespace(here: Here) -> None:
    (here.source / "file").write_text("content")
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "slave", "sleep", "600"], env={"PATH": os.environ["PATH"]}
    ) as keeper:
        try:
            own = os.readlink("/proc/self/ns/mnt")
            wait_until(lambda: os.readlink(f"/proc/{keeper.pid}/ns/mnt") != own, PATIENCE, "a namespace")
            done = here.call(here.source, here.mountpoint, "-N", str(keeper.pid))
            assert done.returncode == 0, done.stderr
            assert not mounts.is_mounted(here.mountpoint)
            assert Path(f"/proc/{keeper.pid}/root{here.mountpoint}/file").read_text() == "content"
            done = here.call(here.source, here.mountpoint, "-N", f"/proc/{keeper.pid}/ns/mnt")
            assert "is already mounted" in done.stderr
        finally:
            # The daemon is in that namespace too, so it would outlive all others.
            here.host.run("nsenter", "-t", str(keeper.pid), "-m", "umount", here.mountpoint)
            keeper.kill()
    assert not processes.wait_until_gone(here.host.processes("lockfs.fs"), PATIENCE)


@pytest.mark.parametrize("namespace", ["999999999", "/nowhere", "/dev/null"])
def test_no_such_namespace(here: Here, namespace: str) -> None:
    assert "cannot be entered" in here.refused(FAILED, here.source, here.mountpoint, "-N", namespace)


# Remounting ---------------------------------------------------------------------------------------


def test_a_remount_changes_the_flags_that_it_names(here: Here) -> None:
    mount = here.host.mount(here.source, here.mountpoint, "noexec,wait=2")
    assert here.call(here.source, mount.path, "-o", "ro,remount").returncode == 0
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(info(mount).options)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        (mount / "file").touch()
    done = here.call(here.source, mount.path, "-o", "rw,remount,exec,nosuid,user_id=0,group_id=0,allow_other")
    assert done.returncode == 0, done.stderr
    assert {"rw", "nosuid", "nodev"} <= set(info(mount).options)
    assert "noexec" not in info(mount).options
    (mount / "file").touch()


def test_a_remount_changes_no_option_of_lockfs(here: Here) -> None:
    mount = here.host.mount(here.source, here.mountpoint, "wait=2")
    done = here.call(here.source, mount.path, "-o", "ro,remount,wait=3")
    assert done.returncode == FAILED
    assert "a remount cannot change wait" in done.stderr
    assert f"umount {here.mountpoint}" in done.stderr
    assert "rw" in info(mount).options


def test_a_remount_may_repeat_the_options_that_are_there(here: Here) -> None:
    mount = here.host.mount(here.source, here.mountpoint, "wait=2")
    done = here.call(here.source, mount.path, "-o", "ro,remount,backend=fcntl-lockd,wait=2.0,key=inode,_netdev")
    assert done.returncode == 0, done.stderr
    assert "ro" in info(mount).options


def test_a_remount_read_only_waits_for_no_writer(here: Here) -> None:
    mount = here.host.mount(here.source, here.mountpoint)
    with open(mount / "file", "w"):
        done = here.call(here.source, mount.path, "-o", "ro,remount")
    assert done.returncode == FAILED
    assert "lockfs locks" in done.stderr


def test_a_remount_of_no_mount(here: Here) -> None:
    said = here.refused(FAILED, here.source, here.mountpoint, "-o", "ro,remount")
    assert f"'{here.mountpoint}' is not a mount of lockfs" in said


# mount(8) -----------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> None:
    """The helper is where mount(8) looks for it."""
    if not os.path.exists("/sbin/mount.lockfs"):
        pytest.skip("/sbin/mount.lockfs is not there; tests/run puts it there")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("fstype", ["lockfs", "fuse.lockfs"])
def test_mount_and_umount_by_fstab(here: Here, tmp_path: Path, fstype: str) -> None:
    fstab = tmp_path / "fstab"
    options = r'images="*.img:a\,b",shareable=s,_netdev,nofail,x-systemd.automount,context=u:r:t'
    fstab.write_text(f"{here.source} {here.mountpoint} {fstype} {options} 0 0\n")
    done = here.host.run("mount", "-T", fstab, "-a")
    assert done.returncode == 0, done.stderr
    try:
        [listed] = here.host.json("status")["mounts"]
        assert listed["mount"]["options"] == {"images": "*.img:a,b", "shared": "s"}
        # A second "mount -a" finds it mounted, and does not mount it twice.
        assert here.host.run("mount", "-T", fstab, "-a").returncode == 0
        assert len(mounts.below(here.mountpoint)) == 1
        done = here.host.run("mount", "-T", fstab, "-o", "remount,ro", here.mountpoint)
        assert done.returncode == 0, done.stderr
        assert "ro" in info(here.mountpoint).options
    finally:
        done = here.host.run("umount", here.mountpoint)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("installed")
def test_mount_passes_the_exit_code_and_the_message_on(here: Here) -> None:
    done = here.host.run("mount", "-t", "lockfs", "-o", "waitt=3", here.source, here.mountpoint)
    assert done.returncode == USAGE
    assert "did you mean 'wait'" in done.stderr


@pytest.mark.usefixtures("installed")
def test_remount_without_fstab(here: Here, tmp_path: Path) -> None:
    mount = here.host.mount(here.source, here.mountpoint, "wait=2")
    empty = tmp_path / "fstab"
    empty.touch()
    done = here.host.run("mount", "-T", empty, "-o", "remount,ro", here.mountpoint)
    assert done.returncode == 0, done.stderr
    assert {"ro", "nosuid", "nodev"} <= set(info(mount).options)


def test_of_many_helpers_at_once_one_mounts(host: Host, storage: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    command = [BIN / "mount.lockfs", storage, mountpoint]
    helpers = [
        subprocess.Popen(command, env=host.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    errors = [helper.communicate(timeout=60)[1] for helper in helpers]
    assert sorted(helper.returncode for helper in helpers) == [0, 32, 32, 32, 32, 32]
    assert sum("already mounted" in error for error in errors) == 5
    stack = [each for each in mountinfo.read() if each.mountpoint == os.fsencode(mountpoint)]
    assert len(stack) == 1
    subprocess.run(["umount", mountpoint], check=True)


def test_defaults_of_this_host(here: Here, tmp_path: Path) -> None:
    file = tmp_path / "lockfs.toml"
    here.host.variables["LOCKFS_CONFIG"] = str(file)
    file.write_text("[options]\nwait = 'x'\n")
    assert f"{file}: option wait=x: must be" in here.refused(USAGE, here.source, here.mountpoint)
    file.write_text("[options]\nbackend = 'nop'\nwait = 3\n")
    mount = here.host.mount(here.source, here.mountpoint, "wait=2")
    status = json.loads(here.host.run("lockfs", "status", "--json").stdout)
    assert [(each["mount"]["backend"], each["mount"]["options"]["wait"]) for each in status["mounts"]] == [("nop", "2")]
    file.write_text("what was mounted needs it no more")
    assert here.call("-o", "remount,ro", here.source, here.mountpoint).returncode == 0
    mount.umount()
