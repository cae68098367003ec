"""Runs `minifs.py` on a real mount, and talks to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.waiting import wait_until

from lockfs.linux import mount

PROGRAM = Path(__file__).with_name("minifs.py")
SECONDS = 20
WATCHDOG = 'read -t 60; exec 2>/dev/null; umount -f "$1"; umount -l "$1"'
"""Unmounts when the test is over, and after a minute at the latest.

A call on a mount that nobody serves waits for good, and pytest with it, in a state where no signal and no thread of
its own helps: so another process ends the connection by force.
"""


@dataclass
class MiniMount:
    """A mount, the daemon that serves it, and what the daemon said when it began."""

    source: Path
    path: Path
    fuse_fd: int
    environment: Mapping[str, str] = field(default_factory=dict)
    daemon: subprocess.Popen[str] | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    errors: str = ""
    status: int | None = None

    def start(self, *words: str, **options: object) -> None:
        """Start a daemon and wait until it serves, or says why it does not."""
        command = [sys.executable, str(PROGRAM), str(self.source), str(self.fuse_fd), json.dumps(options), *words]
        self.daemon = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[self.fuse_fd],
            env={**os.environ, **self.environment},
        )  # fmt: skip
        assert self.daemon.stdout is not None
        line = self.daemon.stdout.readline()
        assert line, self.daemon.communicate()[1]
        self.hello = json.loads(line)

    def counts(self) -> dict[str, int]:
        """Return what the daemon was asked so far."""
        counts: dict[str, int] = json.loads(os.getxattr(self.path, "user.statistics"))
        return counts

    def wait_for(self, name: str, count: int) -> None:
        """Wait until the daemon was asked something so many times."""
        wait_until(lambda: self.counts().get(name, 0) >= count, SECONDS, f"{count} of {name}")

    def end(self) -> None:
        """Unmount, and collect what the daemon has to say."""
        if os.path.ismount(self.path):
            # By force, since a mount namespace that somebody has made meanwhile keeps the mount alive.
            mount.umount(os.fsencode(self.path), mount.MNT_DETACH | mount.MNT_FORCE)
        if self.daemon is not None:
            try:
                out, self.errors = self.daemon.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.communicate()
                raise
            self.last = json.loads(out.splitlines()[-1]) if out.strip() else {}
            self.status = self.daemon.returncode
            self.daemon = None


@contextmanager
def attached(source: Path, path: Path, **environment: str) -> Iterator[MiniMount]:
    """Mount, without a daemon yet; whatever the test leaves is ended."""
    path.mkdir(exist_ok=True)
    fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse_fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    mini = MiniMount(source, path, fuse_fd, environment)
    watchdog = subprocess.Popen(["bash", "-c", WATCHDOG, "watchdog", path], stdin=subprocess.PIPE)
    try:
        mount.mount(b"mini", os.fsencode(path), "fuse.mini", mount.MS_NODEV, options)
        yield mini
    finally:
        os.close(fuse_fd)
        try:
            mini.end()
        finally:
            watchdog.communicate()


@contextmanager
def serving(source: Path, path: Path, **options: object) -> Iterator[MiniMount]:
    """Mount and serve; check afterwards that the daemon ended well and complained about nothing."""
    with attached(source, path) as mini:
        mini.start(**options)
        assert "error" not in mini.hello, mini.hello
        yield mini
        mini.end()
        assert (mini.status, mini.errors) == (0, "")
