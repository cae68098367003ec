"""``lockfs fence``: make every further I/O on what is open of an image fail, at once and for good.

Who needs this may have a mount daemon that hangs, or a storage, so neither is touched here: an image is known by the
path by which it was opened.
"""

from __future__ import annotations

import os
from collections.abc import Container, Sequence

from lockfs.cli import query
from lockfs.cli.output import GREEN, RED, coloured, fields, print_json, printable
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, EXIT_USAGE, LockUnavailable, UsageError
from lockfs.protocol.messages import FenceResult, FenceTarget, MountInfo
from lockfs.text import from_bytes, to_bytes


def run(paths: Sequence[str], inodes: Sequence[str], reason: str, run_dir: str, *, as_json: bool) -> int:
    """Fence images, say how it went, and return the exit code.  Raises `LockfsError`."""
    if not paths and not inodes:
        raise UsageError("no image was named", hint="lockfs fence IMAGE...; `lockfs locks` lists those that are held.")
    wanted = [_inode(each) for each in inodes]
    status = query.status(run_dir)
    if status is None:
        raise LockUnavailable(f"no lockd is running in {run_dir}", hint="Without it nothing can be fenced.")
    wanted += [FenceTarget(from_bytes(on_storage(os.fsencode(path), status.mounts))) for path in paths]
    results = query.fence(run_dir, wanted, reason)
    if as_json:
        print_json({"images": fields(results)})
    else:
        print("".join(map(describe, results)), end="")
    return max((_exit_code(each) for each in results), default=EXIT_OK)


def _exit_code(result: FenceResult) -> int:
    if result.fenced:
        return EXIT_OK
    # Without a mountpoint nothing was done: it is not held here, or not clear which one is meant.
    return EXIT_SYSTEM if result.mountpoint else EXIT_USAGE


def _inode(text: str) -> FenceTarget:
    dev, _, ino = text.partition(":")
    if not (dev.isascii() and dev.isdigit() and ino.isascii() and ino.isdigit()):
        raise UsageError(f"'{text}' is no inode: it must be DEV:INO", hint="`lockfs locks --json` has both numbers.")
    return FenceTarget(dev=int(dev), ino=int(ino))


def on_storage(path: bytes, mounts: Sequence[MountInfo]) -> bytes:
    """Return the path behind *path*, which may be on one of *mounts*; what lies on them or behind is not looked at."""
    sources = {to_bytes(each.mount.source) for each in mounts}
    mountpoints = {to_bytes(each.mount.mountpoint): to_bytes(each.mount.source) for each in mounts}
    place, rest = _resolve(os.path.abspath(path), sources | mountpoints.keys())
    return os.path.join(mountpoints.get(place, place), *rest)


def _resolve(path: bytes, stops: Container[bytes]) -> tuple[bytes, list[bytes]]:
    """Follow symbolic links until one of *stops* is reached; return where that is, and what is left."""
    place, rest = b"/", [part for part in path.split(b"/") if part]
    links = 0
    while rest:
        if place in stops:
            if b".." not in rest:
                break
            # The target of a link that leads in and out again.  What lies there is not looked at, so by its names.
            place, rest = b"/", [part for part in os.path.normpath(os.path.join(place, *rest)).split(b"/") if part]
        part, *rest = rest
        if part in (b".", b".."):
            place = os.path.dirname(place) if part == b".." else place
            continue
        below = os.path.join(place, part)
        try:
            target = os.readlink(below) if below not in stops and links < 40 else None
        except OSError:
            target = None  # no link, or nothing at all
        if target is None:
            place = below
            continue
        links += 1
        rest = [each for each in target.split(b"/") if each] + rest
        if target.startswith(b"/"):
            place = b"/"
    return place, rest


def describe(result: FenceResult) -> str:
    """Return a result for people."""
    state = coloured("fenced", GREEN) if result.fenced else coloured("not fenced", RED)
    lines = [f"{printable(result.image)}: {state}"]
    lines += [f"  problem: {printable(each)}" for each in result.problems]
    if result.daemon_killed:
        lines.append(f"  the mount daemon of {printable(result.mountpoint)} did not answer, and was killed")
    for each in result.killed:
        lines.append(f"  killed process {each.pid} ({printable(each.command)}), which {each.why}")
    if result.fenced and not result.drained:
        lines.append("  what was being written at that moment may still get to the storage")
    return "\n".join(lines) + "\n"
