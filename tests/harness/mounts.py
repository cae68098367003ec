"""Mounts as the kernel lists them: read without help of lockfs, so that a bug there hides no left-over."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

MNT_DETACH = 2
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo."""

    path: Path
    fstype: str
    source: str


def _unescape(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)


def all_mounts() -> list[MountPoint]:
    """Return every mount in this mount namespace, oldest first."""
    found = []
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            before, _, after = line.partition(b" - ")
            fstype, source, *_ = after.split()
            path = _unescape(before.split()[4])
            found.append(MountPoint(Path(os.fsdecode(path)), fstype.decode(), os.fsdecode(_unescape(source))))
    return found


def below(directory: Path) -> list[MountPoint]:
    """Return the mounts at or below *directory*, oldest first."""
    return [mount for mount in all_mounts() if mount.path.is_relative_to(directory)]


def holding(path: Path) -> MountPoint:
    """Return the mount that *path*, absolute and without symlinks, lies on."""
    candidates = [mount for mount in all_mounts() if path.is_relative_to(mount.path)]
    return max(reversed(candidates), key=lambda mount: len(mount.path.parts))


def is_mounted(path: Path) -> bool:
    """Say whether something is mounted exactly there."""
    return any(mount.path == path for mount in all_mounts())


def umount(path: Path, *, lazy: bool = False) -> str:
    """Unmount; return what umount(8) had to complain about, which is nothing if it worked."""
    command = ["umount", *(["--lazy"] if lazy else []), "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"umount exited with {done.returncode}"
