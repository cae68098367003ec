"""mount-helpers/quickstart, in a mount namespace where it may write to /sbin and /usr/local/bin."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import processes
from harness.waiting import wait_until

CHECKOUT = Path(__file__).parents[2]
PARTS = ("lockfs", "backends", "mount-helpers", "pyproject.toml", "constraints.txt", "README.md")
PATIENCE = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMESPACE = """
set -e
# This machine has no mounts of lockfs; a copy of one would also keep its daemon alive.
findmnt -rn -t fuse.lockfs -o TARGET | xargs -r umount -l
mount -t tmpfs none "$1"
for directory in "$(readlink -f /sbin)" /usr/local/bin /usr/local/share; do
    layers="$1$directory"
    mkdir -p "$layers/upper" "$layers/work"
    mount -t overlay -o "lowerdir=$directory,upperdir=$layers/upper,workdir=$layers/work" none "$directory"
    rm -f "$directory/mount.lockfs" "$directory/mount.fuse.lockfs" "$directory/lockfs"
done
echo ready
exec sleep 3600
"""


@dataclass
class Machine:
    """A mount namespace, where lockfs is to be installed, a checkout, and the files of both."""

    keeper: int
    checkout: Path
    prefix: Path
    temporary: Path

    def command(self, *arguments: str | Path) -> list[str]:
        """Return the command line that runs *arguments* on this machine."""
        return ["nsenter", "-t", str(self.keeper), "-m", "--", *map(str, arguments)]

    @property
    def program(self) -> Path:
        """The program under test."""
        return self.checkout / "mount-helpers" / "quickstart"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command on this machine."""
        return {
            **os.environ,
            "LOCKFS_PREFIX": str(self.prefix),
            "LOCKFS_RUN_DIR": str(self.temporary / "run"),
            "LOCKFS_IDLE_EXIT": "1",
            "LOCKFS_LOG": "file",
            "TMPDIR": str(self.temporary),
        }

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine."""
        return subprocess.run(
            self.command(*arguments), env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=500, check=False,
        )  # fmt: skip

    def quickstart(self, *arguments: str | Path) -> str:
        """Run quickstart, which must work, and return what it said."""
        done = self.run(self.program, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def mounts(self) -> list[str]:
        """Return the mountpoints of lockfs on this machine."""
        lines = Path(f"/proc/{self.keeper}/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if " fuse.lockfs " in line]

    def daemons(self) -> list[int]:
        """Return the processes of lockfs that came from here."""
        wanted = f"TMPDIR={self.temporary}".encode()
        return [
            pid
            for pid in processes.everyone()
            if wanted in processes.environment(pid) and str(self.prefix) in " ".join(processes.command_line(pid)[:1])
        ]

    def leftovers(self) -> list[str]:
        """Return what a demonstration left behind, once its daemons had the time to end."""
        stay = processes.wait_until_gone(self.daemons(), 10)
        files = self.temporary.glob("lockfs-demo*")
        return [*self.mounts(), *map(processes.describe, stay), *map(str, files)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    layers = tmp_path_factory.mktemp("layers")
    # A copy: one that is edited during the tests would be installed anew.
    checkout = tmp_path_factory.mktemp("checkout")
    subprocess.run(["cp", "-a", *(CHECKOUT / part for part in PARTS), checkout], check=True)
    temporary = tmp_path_factory.mktemp("tmp")
    prefix = tmp_path_factory.mktemp("prefix") / "lockfs"
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "slave", "bash", "-c", NAMESPACE, "bash", layers],
        stdout=subprocess.PIPE, text=True,
    ) as keeper:  # fmt: skip
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == "ready\n"
            yield Machine(keeper.pid, checkout, prefix, temporary)
        finally:
            keeper.kill()


def test_the_demonstration_on_a_machine_with_nothing_prepared(machine: Machine) -> None:
    said = machine.quickstart()
    order = [
        "Installing lockfs in",
        "/sbin/mount.lockfs -> ",
        "Demonstration in",
        "hostA starts a virtual machine",
        "refused: Device or resource busy",
        "vm.img: held",
        "host     hostA",
        "hostB may read it",
        "hostB has written to it",
        "in /etc/fstab:",
        "unmounted and removed",
    ]
    places = [said.find(each) for each in order]
    assert -1 not in places
    assert places == sorted(places)
    assert not machine.leftovers()


def test_the_demonstration_without_qemu(machine: Machine) -> None:
    hide = 'program=$(command -v qemu-io) || exit 0; mount --bind /dev/null "$program"'
    assert machine.run("sh", "-c", hide).returncode == 0
    try:
        said = machine.quickstart()
    finally:
        machine.run("sh", "-c", "! mountpoint -q /usr/bin/qemu-io || umount /usr/bin/qemu-io")
    for each in ("refused: Device or resource busy", "host     hostA", "hostB has written to it"):
        assert each in said
    assert "qemu-io" not in said.partition("host     hostA")[2].partition("mode")[0]
    assert not machine.leftovers()


def test_a_second_run_does_only_what_is_missing(machine: Machine) -> None:
    said = machine.quickstart("--install")
    assert "up to date" in said
    assert "Installing" not in said
    assert ".TH MOUNT.LOCKFS 8" in machine.run("cat", "/usr/local/share/man/man8/mount.lockfs.8").stdout
    link = machine.run("readlink", "/sbin/mount.fuse.lockfs")
    assert link.stdout == f"{machine.prefix}/bin/mount.lockfs\n"


def test_what_is_mounted_can_be_used(machine: Machine, tmp_path: Path) -> None:
    source, directory = tmp_path / "source", tmp_path / "mnt"
    done = machine.run(machine.program, source, directory)
    assert done.returncode == 1
    assert f"the source '{source}' is missing" in done.stderr
    source.mkdir()
    done = machine.run(machine.program, source, directory)
    assert done.returncode == 1
    assert f"mkdir -p '{directory}'" in done.stderr
    directory.mkdir()
    said = machine.quickstart(source, directory, "backend=nop,wait=2")
    try:
        assert machine.mounts() == [str(directory)]
        assert f"{source}  {directory}  lockfs  backend=nop,wait=2,_netdev  0 0" in said
        done = machine.run(machine.program, "--uninstall")
        assert done.returncode == 1
        assert f"unmount first: {directory}" in done.stderr
    finally:
        done = machine.run("umount", directory)
    assert done.returncode == 0, done.stderr
    assert not machine.leftovers()


def test_an_interrupted_demonstration_leaves_nothing(machine: Machine) -> None:
    with subprocess.Popen(
        machine.command(machine.program), env=machine.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "hostB tries" in line:
                assert len(machine.mounts()) == 2
                os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE)
    assert process.returncode == 130, "".join(lines)
    assert not machine.leftovers()


def test_only_root(machine: Machine) -> None:
    done = subprocess.run(
        ["bash", CHECKOUT / "mount-helpers" / "quickstart"],
        capture_output=True, text=True, check=False, user=65534, group=65534,
    )  # fmt: skip
    assert done.returncode == 1
    assert "sudo" in done.stderr


@pytest.mark.parametrize("arguments", [["--bogus"], ["one"], ["a", "b", "c", "d"], ["--install", "x"]])
def test_wrong_use(machine: Machine, arguments: list[str]) -> None:
    done = machine.run(machine.program, *arguments)
    assert done.returncode == 1
    assert "quickstart SOURCE DIRECTORY" in done.stderr


def test_a_directory_that_is_not_ours_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    done = machine.run("env", f"LOCKFS_PREFIX={tmp_path}", machine.program, "--install")
    assert done.returncode == 1
    assert "not ours" in done.stderr
    machine.run("env", f"LOCKFS_PREFIX={tmp_path}", machine.program, "--uninstall")
    assert (tmp_path / "precious").exists()


def test_uninstall(machine: Machine) -> None:
    wait_until(lambda: not machine.daemons(), PATIENCE, "the end of the daemons")
    said = machine.quickstart("--uninstall")
    assert f"removed {machine.prefix}" in said
    assert not machine.prefix.exists()
    links = "/sbin/mount.lockfs /sbin/mount.fuse.lockfs /usr/local/bin/lockfs /usr/local/share/man/man8/lockfs.8"
    assert machine.run("sh", "-c", f"ls {links}").stdout == ""
    machine.quickstart("--uninstall")
