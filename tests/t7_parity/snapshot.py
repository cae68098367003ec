"""What a directory tree looks like from outside, in a form that two trees can be compared in."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from t7_parity.record import attributes, comparable

EXPLICIT = 1_600_000_000
"""Times before this were set by the case; later ones are those of the run, which differ."""

Tree = dict[str, object]


def tree(top: Path, times: Sequence[str] = ("st_atime_ns", "st_mtime_ns")) -> Tree:
    """Return all entries below *top*, with all that must be the same in a twin."""
    found: Tree = {}
    names: dict[int, list[str]] = {}
    # All attributes come first, since reading a file changes its time of access.
    entries = [(path, entry, os.lstat(path)) for path, entry in _walk(os.fsencode(top))]
    for path, entry, status in entries:
        name = repr(os.path.relpath(path, os.fsencode(top)))
        found[f"{name} attributes"] = attributes(status)
        found[f"{name} xattrs"] = xattrs(path)
        for which in times:
            if getattr(status, which) < EXPLICIT * 10**9:
                found[f"{name} {which}"] = getattr(status, which)
        if entry is not None:
            found[f"{name} d_type"] = _type(entry)
        if stat.S_ISLNK(status.st_mode):
            found[f"{name} target"] = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            found[f"{name} content"] = content(path)
            if status.st_nlink > 1:
                names.setdefault(status.st_ino, []).append(name)
    found["hard links"] = sorted(sorted(each) for each in names.values())
    return found


def views(view: Path, source: Path) -> list[str]:
    """Return how the mount's view of a tree differs from the source itself: names, and every attribute but identity."""
    fields = [
        "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_rdev", "st_blocks", "st_blksize",
        "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
    ]  # fmt: skip
    problems = []
    ours = {os.path.relpath(path, os.fsencode(view)): os.lstat(path) for path, _ in _walk(os.fsencode(view))}
    theirs = {os.path.relpath(path, os.fsencode(source)): os.lstat(path) for path, _ in _walk(os.fsencode(source))}
    problems += [f"{name!r} is only in one of them" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        for each in fields:
            seen, true = getattr(ours[name], each), getattr(theirs[name], each)
            if seen != true:
                problems.append(f"{name!r} {each}: the mount says {seen}, the source {true}")
    return problems


def xattrs(path: bytes | str | int, *, follow: bool = False) -> dict[str, object]:
    """Return the extended attributes of a name or a descriptor."""
    if isinstance(path, int):
        return {name: comparable(os.getxattr(path, name)) for name in sorted(os.listxattr(path))}
    names = sorted(os.listxattr(path, follow_symlinks=follow))
    return {name: comparable(os.getxattr(path, name, follow_symlinks=follow)) for name in names}


def content(path: bytes | Path) -> object:
    """Return what a file contains; of a large one the ends and the allocated parts suffice."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= 1 << 24:
            return comparable(file.read())
        head = file.read(1 << 16)
        file.seek(-(1 << 16), os.SEEK_END)
        return comparable(head + file.read())


def _walk(top: bytes) -> list[tuple[bytes, os.DirEntry[bytes] | None]]:
    found: list[tuple[bytes, os.DirEntry[bytes] | None]] = [(top, None)]
    waiting = [top]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                found.append((entry.path, entry))
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return sorted(found, key=lambda each: each[0])


def _type(entry: os.DirEntry[bytes]) -> str:
    if entry.is_symlink():
        return "symlink"
    if entry.is_dir(follow_symlinks=False):
        return "directory"
    return "file" if entry.is_file(follow_symlinks=False) else "other"
