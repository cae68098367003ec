"""``lockfs who``: who holds an image, on whatever host.

The mount answers, by the extended attribute ``user.lockfs.holder`` of the image, so any user who may read the image
may ask.  A path in the directory behind a mount is looked up on that mount.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

from lockfs.cli.output import GREEN, RED, YELLOW, coloured, columns, fields, moment, print_json, printable
from lockfs.cli.preflight import DEAD, FSTYPE
from lockfs.errors import EXIT_HELD, EXIT_OK, EXIT_SYSTEM, LockfsError, SystemError_, UsageError
from lockfs.linux import mountinfo
from lockfs.protocol.messages import HolderInfo
from lockfs.text import from_bytes, to_bytes

ATTRIBUTE = "user.lockfs.holder"
COLOURS = {"free": GREEN, "held": RED, "unknown": YELLOW}


class Answer(msgspec.Struct, frozen=True):
    """What a mount says of an image."""

    state: Literal["free", "held", "unknown"]
    holders: list[HolderInfo]
    image: str = ""
    reason: str = ""


def run(paths: Sequence[str], run_dir: str, *, as_json: bool, check: bool) -> int:
    """Answer for each of *paths*, and return the exit code; an image that nobody can tell about counts most."""
    codes = {EXIT_OK}
    documents: list[object] = []
    for path in paths:
        shown = from_bytes(os.fsencode(path))
        try:
            answer = ask(os.fsencode(path), run_dir)
        except LockfsError as error:
            codes.add(error.exit_code)
            documents.append({"path": shown, "error": error.message, "hint": error.hint})
            if not as_json:
                print(f"lockfs: {error.message}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
            continue
        codes.add({"free": EXIT_OK, "held": EXIT_HELD if check else EXIT_OK, "unknown": EXIT_SYSTEM}[answer.state])
        document = fields(answer)
        documents.append({"path": shown, **document} if isinstance(document, dict) else document)
        if not as_json:
            print(describe(shown, answer), end="")
    if as_json:
        print_json({"images": documents})
    return next((code for code in sorted(codes) if code not in (EXIT_OK, EXIT_HELD)), max(codes))


def ask(path: bytes, run_dir: str) -> Answer:
    """Return what is known of the image at *path*.  Raises `LockfsError`."""
    shown = from_bytes(path)
    try:
        value = os.getxattr(_on_mount(path, run_dir), ATTRIBUTE)
    except OSError as error:
        raise _failed(error, shown) from error
    try:
        return msgspec.json.decode(value, type=Answer)
    except msgspec.MsgspecError as error:
        raise SystemError_(f"the mount of '{shown}' gives an answer that cannot be read: {error}") from error


def _failed(error: OSError, shown: str) -> LockfsError:
    if error.errno == errno.ENODATA:
        hint = "A mount guards regular files, and of those what its option images= says."
        return UsageError(f"'{shown}' is not a guarded image", hint=hint)
    if error.errno in DEAD:
        hint = "Unmount it and mount it again."
        return SystemError_(f"'{shown}' is on a mount whose daemon has died", hint=hint)
    kind = UsageError if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES) else SystemError_
    return kind(f"'{shown}': {error.strerror}")


def _on_mount(path: bytes, run_dir: str) -> bytes:
    """Return *path*, or the path of the same file on the mount that guards it.  Raises OSError, `UsageError`."""
    real = os.path.realpath(path, strict=True)
    if mountinfo.find(real).fstype == FSTYPE:
        return real
    # Here and not above: it brings in trio, which most questions do without.
    from lockfs.cli import query

    status = query.status(run_dir) if os.access(run_dir, os.X_OK) else None
    for each in status.mounts if status else ():
        source = to_bytes(each.mount.source)
        if real.startswith(source.rstrip(b"/") + b"/"):
            return os.path.join(to_bytes(each.mount.mountpoint), os.path.relpath(real, source))
    raise UsageError(
        f"'{from_bytes(path)}' is neither on a lockfs mount nor in the directory behind one",
        hint="`lockfs status` lists the mounts of this host.",
    )


def describe(path: str, answer: Answer) -> str:
    """Return an answer for people."""
    lines = f"{path}: {coloured(answer.state, COLOURS[answer.state])}\n"
    if answer.reason:
        lines += f"  {printable(answer.reason)}\n"
    return lines + "".join(_describe_holder(each) for each in answer.holders)


def _describe_holder(holder: HolderInfo) -> str:
    process = f"{holder.pid or ''} {holder.command}".strip()
    rows = [
        ("host", holder.host + (" (this host)" if holder.here else "")),
        ("process", process),
        ("VM", holder.vm),
        ("mode", holder.mode),
        ("since", moment(holder.since)),
        ("as", holder.path),
    ]
    return columns([(name, printable(value)) for name, value in rows if value], indent="  ")
