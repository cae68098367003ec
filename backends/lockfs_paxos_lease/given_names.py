"""Names of leases that others give: libvirt's sanlock driver, and administrators.  Pure.

* libvirt's sanlock driver (``lock_manager = "sanlock"``, ``auto_disk_leases = 1``) names a lease by the MD5 of the path
  of the disk, exactly as the domain's XML has it, in the lockspace ``__LIBVIRT__DISKS__``; lockspace and leases are
  files of those names in ``disk_lease_dir`` (libvirt: src/locking/lock_driver_sanlock.c).  So all hosts must use the
  same path.
* An image may carry its lease's name in the extended attribute `ATTRIBUTE`, which goes with it when it is renamed.
* A map says names by path, for storage without extended attributes::

      # path below the source          name of the lease
      vm1.qcow2                         vm1-disk
      "with blanks.img"                 vm2-disk
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from lockfs.errors import UsageError
from lockfs.text import from_bytes, to_bytes
from lockfs_paxos_lease.format import names

ATTRIBUTE = "user.lockfs.lease"
MOST = names.SIZE - 1
"""Characters of a name.  One more would fit into a record, but sanlock (3.8.5) misses the end of such a name."""
LIBVIRT_LOCKSPACE = "__LIBVIRT__DISKS__"
RESERVED = (LIBVIRT_LOCKSPACE, "rindex_lease")


@dataclass(frozen=True, slots=True)
class GivenNames:
    """Where the name of a lease comes from, in this order: the attribute of the image, the map, the path for libvirt.

    `by_path` has the map: paths below the source, in bytes.
    """

    by_path: Mapping[bytes, str] = field(default_factory=dict)
    libvirt: bool = False

    def of(self, relative: bytes, path: bytes, attribute: bytes | None) -> str | None:
        """Return the name of an image's lease, None if nobody has given it one.

        *relative* is its path below the source, *path* that which programs use, *attribute* the value of `ATTRIBUTE`,
        None without one.  Raises `UsageError` for an attribute that is no name.
        """
        if attribute is not None:
            return checked(from_bytes(attribute), f"the attribute {ATTRIBUTE} of {from_bytes(path)}")
        if relative in self.by_path:
            return self.by_path[relative]
        return libvirt_name(path) if self.libvirt else None


def libvirt_name(path: bytes) -> str:
    """Return the name that libvirt's sanlock driver gives the lease of the disk at *path*."""
    return hashlib.md5(path, usedforsecurity=False).hexdigest()


def parse_map(text: str) -> dict[bytes, str]:
    """Return the names that a map gives, by path below the source.

    Raises `UsageError` with the line for what is not a path and a name, for a path or a name that comes twice (two
    images with one lease would keep each other out), and for a name that cannot be one.
    """
    found: dict[bytes, str] = {}
    taken: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"line {number} of the map of leases: {error}") from None
        if not words:
            continue
        if len(words) != 2 or words[0].startswith("/"):
            hint = "A path with blanks stands in quotes; paths are below the source."
            raise UsageError(f"line {number} of the map of leases is not a path and a name", hint=hint)
        path, name = to_bytes(words[0]), checked(words[1], f"line {number} of the map of leases")
        if path in found:
            raise UsageError(f"line {number} of the map of leases: '{from_bytes(path)}' has a name already")
        if name in taken:
            raise UsageError(f"line {number} of the map of leases: line {taken[name]} has the name '{name}' already")
        found[path], taken[name] = name, number
    return found


def checked(name: str, where: str) -> str:
    """Return *name* if a lease can be called so, also where it is the name of a file.  Raises `UsageError`."""
    if not name or name.startswith(".") or not name.isascii() or not name.isprintable() or set(name) & set("/: \\"):
        raise UsageError(
            f"{where}: '{from_bytes(name.encode(errors='surrogateescape'))}' cannot be the name of a lease",
            hint="Letters, digits, and signs other than / : \\ and blank; not a dot at the beginning.",
        )
    if name in RESERVED:
        raise UsageError(f"{where}: '{name}' is the name of something else among leases")
    if len(name) > MOST:
        raise UsageError(f"{where}: '{name}' is longer than {MOST} characters")
    return name
