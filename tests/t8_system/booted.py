"""A systemd that is process 1 of namespaces of its own, on an overlay of this machine's files.

It has lockfs's units and the targets that they are ordered by, and no other: nothing of this machine is started, and
what is changed is gone with it.  Its sockets, mounts, processes and control groups are not this machine's.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from harness import mounts, processes
from harness.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
UNITS = sorted((REPOSITORY / "mount-helpers" / "systemd").glob("lockfs-lockd.*"))
SYSTEMD = Path("/lib/systemd/systemd")
TOOLS = ("nsenter", "unshare", "pivot_root", "systemctl", "systemd-analyze")
PATIENCE = 30.0
TARGETS = (
    "basic", "exit", "final", "local-fs", "local-fs-pre", "multi-user", "network", "network-online", "poweroff", "remote-fs",
    "remote-fs-pre", "shutdown", "sockets", "sysinit", "umount",
)  # fmt: skip
PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"

# $1: a directory to work in, $2: the repository, $3: where the Python is installed that has lockfs, $4: a terminal to
# be the console, $5: the units.
ENTER = r"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for each in null zero full random urandom tty fuse; do touch dev/$each; mount --bind /dev/$each dev/$each; done
touch dev/console
mount --bind "$4" dev/console
for each in run srv; do mount -t tmpfs -o mode=755 tmpfs $each; done
mkdir -p srv/source srv/images usr/local/lib ".$2" ".$3"
for each in "$2" "$3"; do mount --rbind "$each" ".$each"; done
ln -s "$3" usr/local/lib/lockfs
ln -sf "$3/bin/mount.lockfs" sbin/mount.lockfs
cp -r "$5" run/units
echo 0123456789abcdef0123456789abcdef > etc/machine-id
echo '/srv/source /srv/images lockfs _netdev,noauto,wait=0,x-systemd.requires=lockfs-lockd.socket 0 0' > etc/fstab
mkdir run/old
pivot_root . run/old
umount -l run/old
exec env -i container=lockfs SYSTEMD_UNIT_PATH=/run/units:/run/systemd/generator PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=multi-user.target --show-status=no --log-target=console --log-level=info \
    --default-standard-output=inherit
"""


class Unavailable(Exception):
    """This machine cannot do it; the message says what it lacks."""


class Booted:
    """See the module.  *drop_ins* are files to be added to units, by name.  Raises `Unavailable`."""

    def __init__(self, directory: Path, drop_ins: Mapping[str, str]) -> None:
        missing = [str(each) for each in (SYSTEMD, Path("/dev/fuse")) if not each.exists()]
        if missing := missing + [each for each in TOOLS if shutil.which(each) is None]:
            raise Unavailable(f"there is no {', '.join(missing)}")
        groups = [each.path for each in mounts.all_mounts() if each.fstype == "cgroup2"]
        if not groups:
            raise Unavailable("no cgroup2 is mounted")
        units, space = directory / "units", directory / "space"
        space.mkdir()
        _make_units(units, drop_ins)
        self._group = groups[0] / f"lockfs-test-{os.getpid()}"
        self._group.mkdir()
        # systemd writes to its console only if that is a terminal, and would wait where nobody reads.
        self._console, terminal = os.openpty()
        self._said = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        command = [
            "sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', self._group,
            "unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc", "--cgroup", "--propagation", "private",
            "sh", "-c", ENTER, "enter", space, REPOSITORY, sys.prefix, os.ttyname(terminal), units,
        ]  # fmt: skip
        self._outer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal)
        os.close(terminal)
        try:
            self.pid = wait_until(self._first_process, PATIENCE, "systemd to be process 1")
            wait_until(self._is_up, PATIENCE, "systemd to be up")
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        try:
            while data := os.read(self._console, 4096):
                self._said += data
        except OSError as error:
            if error.errno != errno.EIO:  # nobody has the terminal open any more
                raise

    @property
    def console(self) -> str:
        """What was said on the console so far."""
        return self._said.decode(errors="replace").replace("\r\n", "\n")

    def _first_process(self) -> int:
        """Return the process that is systemd, as this machine knows it; 0 if it is not there yet."""
        if self._outer.poll() is not None:
            raise Unavailable(f"no namespaces for systemd: {self.console}")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text()
        for pid in map(int, children.split()):
            if processes.command_line(pid)[:1] == [str(SYSTEMD)]:
                return pid
        return 0

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    @property
    def prefix(self) -> list[str]:
        """What makes a command run in there."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd"]

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in there, and return how it ended."""
        return subprocess.run(
            [*self.prefix, "env", "-i", PATH, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )

    def systemctl(self, *arguments: str) -> str:
        """Run systemctl; return what it printed.  Raises RuntimeError if it failed."""
        done = self.run("systemctl", *arguments)
        if done.returncode != 0:
            raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.systemctl("show", "--property", name, "--value", unit).strip()

    def shut_down(self) -> str:
        """Shut down in an orderly way; return what was said on the console."""
        self.run("systemctl", "exit")
        self._outer.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return self.console

    def close(self) -> None:
        """End all that is left of it."""
        if self._outer.poll() is None:
            self._outer.kill()  # and with it process 1, and with that all others
        self._outer.wait(PATIENCE)
        self._reader.join(PATIENCE)
        os.close(self._console)
        wait_until(self._group_is_gone, PATIENCE, "the control group to be empty")

    def _group_is_gone(self) -> bool:
        try:
            for directory, _, _ in os.walk(self._group, topdown=False):
                os.rmdir(directory)
        except OSError:
            return False
        return True

    def __enter__(self) -> Booted:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _make_units(directory: Path, drop_ins: Mapping[str, str]) -> None:
    directory.mkdir()
    for each in (*(f"{target}.target" for target in TARGETS), "systemd-exit.service"):
        shutil.copy(SYSTEMD.parent / "system" / each, directory)
    for unit in UNITS:
        shutil.copy(unit, directory)
    for name, text in drop_ins.items():
        (directory / f"{name}.d").mkdir()
        (directory / f"{name}.d" / "test.conf").write_text(text)
    (directory / "sockets.target.wants").mkdir()
    (directory / "sockets.target.wants" / "lockfs-lockd.socket").symlink_to("../lockfs-lockd.socket")
