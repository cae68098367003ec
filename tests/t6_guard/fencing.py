"""Mounts and processes of the tests of the fence."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import mounts
from harness.host import Host, Mount
from harness.waiting import wait_until
from t6_guard.ways import Attempt, Way

SERVING, STOPPED, DEAD, REPLACED = "serving", "stopped", "dead", "replaced"
"""How the daemon of a mount is when an image is fenced.  With `REPLACED` it is stopped, too, but gets a successor."""


def mounts_of(host: Host) -> dict[str, dict[str, Any]]:
    """Return what lockd says of each mount, by mountpoint."""
    return {each["mount"]["mountpoint"]: each for each in host.json("status").get("mounts", [])}


def disturb(mount: Mount, how: str) -> None:
    """Stop or kill the daemon of a mount, which has something open."""
    pid = mount.daemon()
    if how in (STOPPED, REPLACED):
        os.kill(pid, signal.SIGSTOP)
    elif how == DEAD:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: daemon_gone(mount), 10, "lockd to notice that the daemon is gone")


def daemon_gone(mount: Mount) -> bool:
    """Say whether lockd keeps the mount in place of its daemon."""
    return bool(mounts_of(mount.host).get(str(mount.path), {}).get("daemon_gone"))


def fence(host: Host, *paths: Path, code: int = 0) -> dict[str, dict[str, Any]]:
    """Fence images as an admin would; return what became of each, by its path."""
    done = host.run("lockfs", "fence", "--json", *paths)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return {each["image"]: each for each in json.loads(done.stdout)["images"]}


def unmount_dead(mount: Mount) -> None:
    """Unmount what has no daemon any more."""
    assert mounts.umount(mount.path) == ""
    mount.host.mounts.remove(mount)


@dataclass
class Scene:
    """A mount with one image and one process for each way, before and after a fence of them all."""

    mount: Mount
    storage: Path
    data: str
    how: str
    ways: Sequence[Way]
    attempts: dict[str, Attempt] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    content: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def play(self, *, repeating: Iterable[Way] = ()) -> None:
        for way in self.ways:
            self.attempts[way.name] = attempt = Attempt(way, self.mount.path, self.storage)
            attempt.begin()
            if way in repeating:
                attempt.repeat()
        disturb(self.mount, self.how)
        # "lockfs fence" goes by the path by which an image was opened, which a rename does not change.
        paths = {name: self.mount / _opened_as(attempt) for name, attempt in self.attempts.items()}
        found = fence(self.mount.host, *paths.values())
        self.results = {name: found[str(path)] for name, path in paths.items()}
        self.content = {name: attempt.content() for name, attempt in self.attempts.items()}

    def end(self) -> None:
        for attempt in self.attempts.values():
            attempt.end()
        wait_until(lambda: not self.mount.host.locks(), 10, "the images to be closed, also by children")
        if self.how not in (SERVING, REPLACED) and mounts.is_mounted(self.mount.path):
            wait_until(lambda: str(self.mount.path) not in mounts_of(self.mount.host), 10, "lockd to let go of the mount")
            unmount_dead(self.mount)


def _opened_as(attempt: Attempt) -> str:
    return attempt.name + (".link" if "link" in attempt.way.setup and "os.link" in attempt.way.setup else "")

