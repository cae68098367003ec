"""The mounts of this process, read from /proc/self/mountinfo (proc(5), kernel: fs/proc_namespace.c).

Only the id of a mount tells which mount a path is on: two mounts may show one directory, and one mountpoint
may carry several mounts on top of each other.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

PATH = "/proc/self/mountinfo"
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One mount.  `root` is the directory of the filesystem that shows at `mountpoint`; `dev` its ``st_dev``.

    `options` are the mount's, `super_options` the filesystem's; a word without value has the value "".
    """

    mount_id: int
    parent_id: int
    dev: int
    root: bytes
    mountpoint: bytes
    options: Mapping[str, str]
    fstype: str
    source: bytes
    super_options: Mapping[str, str]

    @property
    def fsoptions(self) -> dict[str, str]:
        """All options; where both have one, that of the mount (a read-only view of a writable one)."""
        merged = {**self.super_options, **self.options}
        if "ro" in self.options or "ro" in self.super_options:
            merged.pop("rw", None)
        return merged


def parse(data: bytes) -> list[MountInfo]:
    """Parse the text of a mountinfo file, in its order: a later mount may cover an earlier one."""
    # Not splitlines(): the kernel escapes a line feed in a name, but no carriage return.
    return [_parse_line(line) for line in data.split(b"\n") if line]


def _parse_line(line: bytes) -> MountInfo:
    # Not split(): an empty source leaves two spaces in a row.
    fields = line.split(b" ")
    separator = fields.index(b"-", 6)
    major, _, minor = fields[2].partition(b":")
    return MountInfo(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        dev=os.makedev(int(major), int(minor)),
        root=_unescape(fields[3]),
        mountpoint=_unescape(fields[4]),
        options=_options(fields[5]),
        fstype=os.fsdecode(_unescape(fields[separator + 1])),
        source=_unescape(fields[separator + 2]),
        super_options=_options(b" ".join(fields[separator + 3 :])),
    )


def _unescape(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match.group(1), 8) & 0xFF]), field)


def _options(field: bytes) -> dict[str, str]:
    # Commas inside a value are escaped too, so the split comes first.
    found: dict[str, str] = {}
    for option in field.split(b","):
        name, _, value = option.partition(b"=")
        if name:
            found[os.fsdecode(_unescape(name))] = os.fsdecode(_unescape(value))
    return found


def read() -> list[MountInfo]:
    """Return the mounts that this process can see.  Raises OSError."""
    with open(PATH, "rb") as file:
        return parse(file.read())


def mount_id(where: int | str | bytes) -> int:
    """Return the id of the mount that a descriptor or a path is on.  Raises OSError."""
    if not isinstance(where, int):
        fd = os.open(where, os.O_PATH | os.O_CLOEXEC)
        try:
            return mount_id(fd)
        finally:
            os.close(fd)
    with open(f"/proc/self/fdinfo/{where}", "rb") as file:
        for line in file:
            name, _, value = line.partition(b":")
            if name == b"mnt_id":
                return int(value)
    raise OSError(errno.ENOSYS, "the kernel does not say which mount a descriptor is on")


def find(where: int | str | bytes) -> MountInfo:
    """Return the mount that a descriptor or a path is on.

    Raises OSError: ENOENT if there is no such path, or its mount is not among those that this process can see
    (unmounted lazily, or of another mount namespace).
    """
    wanted = mount_id(where)
    for each in read():
        if each.mount_id == wanted:
            return each
    raise OSError(errno.ENOENT, "its mount is not in " + PATH, where)


def at(mountpoint: bytes) -> MountInfo | None:
    """Return the topmost mount on *mountpoint* (an absolute path without symbolic links), or None."""
    stack = [each for each in read() if each.mountpoint == mountpoint]
    covered = {each.parent_id for each in stack}
    return next((each for each in stack if each.mount_id not in covered), None)
