"""Changing the flags of a mount that is there: ``mount -o remount,...``.

Only the kernel's flags can change; what lockfs itself promises is fixed until the mount is unmounted.
"""

from __future__ import annotations

import errno
import os

from lockfs.cli.preflight import FSTYPE, Place
from lockfs.errors import MountError
from lockfs.linux import mount
from lockfs.linux.mountinfo import MountInfo
from lockfs.options import MountOptions, join, parse


def remount(place: Place, text: str, run_dir: str, *, sloppy: bool = False) -> None:
    """Give the mount at *place* the flags in the ``-o`` string *text*; those not named stay as they are.

    Raises `LockfsError` if there is no lockfs mount, a lockfs option would change, or the kernel refuses.
    """
    if not place.is_lockfs_mountpoint:
        hint = "findmnt -t fuse.lockfs lists them."
        raise MountError(f"'{place.shown}' is not a mount of lockfs", hint=hint)
    wanted = _checked(place, text, run_dir, sloppy)
    flags = mount.flags_of(wanted.flags, current_flags(place.mount))
    try:
        mount.mount(place.mount.source, place.path, FSTYPE, flags | mount.MS_REMOUNT)
    except OSError as error:
        hint = "Files are open for writing: lockfs locks" if error.errno == errno.EBUSY else ""
        raise MountError(f"'{place.shown}' cannot be remounted: {error.strerror}", hint=hint) from error


def current_flags(info: MountInfo) -> int:
    """Return the flag word of a mount as the kernel lists it."""
    return mount.flags_of(name for name in info.fsoptions if name in mount.MS_FLAGS)


def _checked(place: Place, text: str, run_dir: str, sloppy: bool) -> MountOptions:
    """Parse *text* on top of the options that the mount has now, and refuse what would change one of them."""
    there = _options_now(place, run_dir)
    if there is None:
        wanted = parse(text, sloppy=sloppy)
        if wanted.text:
            raise MountError(
                f"the options that '{place.shown}' has are not known: lockd in {run_dir} does not know the mount",
                hint="Remount with mount flags only, or unmount it and mount it again.",
            )
        return wanted
    now = parse(there)
    wanted = parse(f"{there},{text}", sloppy=sloppy)
    before, after = {**now.values, **now.backend}, {**wanted.values, **wanted.backend}
    changed = sorted(name for name in after if before.get(name) != after[name])
    if changed:
        raise MountError(
            f"a remount cannot change {', '.join(changed)} of '{place.shown}'",
            hint=f"Unmount it, then mount it with the new options: umount {place.shown}",
        )
    return wanted


def _options_now(place: Place, run_dir: str) -> str | None:
    """Return the lockfs options of a mount as lockd knows them, or None if it does not."""
    # Here and not above: it brings in trio, and this is the one thing that the mount helper needs it for.
    from lockfs.cli import query
    from lockfs.text import to_bytes

    status = query.status(run_dir)
    for each in status.mounts if status else ():
        if to_bytes(each.mount.mountpoint) == place.path:
            given = {name: os.fsdecode(to_bytes(value)) for name, value in each.mount.options.items()}
            return join({**given, "backend": each.mount.backend})
    return None


