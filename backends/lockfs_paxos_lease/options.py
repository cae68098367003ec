"""The mount options of the backend, typed; light, for the mount helper."""

from __future__ import annotations

from collections.abc import Sequence

from lockfs.options import Option, absolute_path, one_of

SANLOCK = "sanlock"
LOCKFS = "lockfs"
LIBVIRT = "libvirt"
MAX_HOST_ID = 2000
MAX_TAKEOVER = 6553.5
"""What fits into the version word of a record; `format.version` has it from there."""
MIN_TAKEOVER = 2.0


def _path(text: str) -> str:
    return absolute_path(text) if text else ""


def _host_id(text: str) -> int:
    """Parse a host id; 0 stands for any."""
    if text == "auto":
        return 0
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_HOST_ID:
        return int(text)
    raise ValueError(f"auto, or a number from 1 to {MAX_HOST_ID}")


def _takeover(text: str) -> float:
    """Parse the takeover time in seconds; 0 stands for sanlock's timing."""
    if text == SANLOCK:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not MIN_TAKEOVER <= value <= MAX_TAKEOVER:
        raise ValueError(f"{SANLOCK}, or a number of seconds from {MIN_TAKEOVER:g} to {MAX_TAKEOVER:g}")
    return value


def _io_timeout(text: str) -> int:
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= 255:
        return int(text)
    raise ValueError("a whole number of seconds from 1 to 255")


ENGINES = ("own", SANLOCK)

OPTIONS: Sequence[Option] = (
    Option("engine", one_of(*ENGINES), "own", "|".join(ENGINES),
           "who handles the leases: lockfs itself, or this host's sanlock daemon, which goes by takeover=sanlock"),
    Option("leases", _path, "", "DIR|DEVICE",
           "directory on shared storage for the leases, or a volume that `lockfs lease format --index` has made; "
           "by default SOURCE/.lockfs/leases"),
    Option("host_id", _host_id, "auto", "auto|N",
           "number of this host among those that share the leases; auto finds the one that it had, or a free one"),
    Option("takeover", _takeover, "16", "SECONDS|sanlock",
           "within which time others may have the images of a host that died; the same on all hosts. "
           "sanlock: by its timing, needed where sanlock uses the same leases"),
    Option("io_timeout", _io_timeout, "10", "SECONDS",
           "with takeover=sanlock: seconds for one call to the storage; takeover takes 8 times that and 60 s"),
    Option("names", one_of(LOCKFS, LIBVIRT), LOCKFS, f"{LOCKFS}|{LIBVIRT}",
           "how leases are named; libvirt: as by its sanlock driver (auto_disk_leases), to exclude hosts that use it"),
    Option("lease_map", _path, "", "FILE",
           "file that names the leases of images, the same on all hosts: lines with a path below the source, and a "
           "name; an image's attribute user.lockfs.lease comes before it"),
    Option("watchdog", _path, "", "DEVICE",
           "watchdog device, as /dev/watchdog: it resets this host if lockd or a fence fails while images are held"),
)  # fmt: skip
