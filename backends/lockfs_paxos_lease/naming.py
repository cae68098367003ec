"""What a lease is called, the same on all hosts: by what somebody has said, else by the inode of its image or its path.

Invariants:
* Who has taken a lease looks again whether the image is still called so (`Naming.now`): a name is changed only by who
  holds the image under the old one, so a name that is right then stays right as long as the lease is held.
* All hosts of a share go by one rule: the first one to mount writes down what it goes by (`Naming.rule`), and one that
  goes by another is not let in (`lockfs_paxos_lease.rule`).
"""

from __future__ import annotations

import errno
import hashlib
import os

from lockfs import text
from lockfs.backend import Context, Image
from lockfs.errors import LockUnavailable, MountError, UsageError
from lockfs_paxos_lease import driver
from lockfs_paxos_lease.disk.call import Steps, call
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.given_names import ATTRIBUTE, GivenNames, parse_map
from lockfs_paxos_lease.options import LIBVIRT
from lockfs_paxos_lease.place import FILE_TIMEOUT

DIGEST_CHARS = 40
"""Hexadecimal digits of a path's SHA-256 that fit, with what is before them, into the 48 bytes of a lease's name."""
THREADS = 8
MAP_BYTES = 16 << 20
_NONE = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS)


class Naming:
    """How the images of one share are called."""

    def __init__(self, context: Context) -> None:
        options = context.options
        self._mountpoint = context.mountpoint
        self._by_inode = options["key"] == "inode"
        self._libvirt = options["names"] == LIBVIRT
        self._map = str(options["lease_map"])
        self._given = GivenNames(libvirt=self._libvirt)
        self._lane = Lane(THREADS)

    async def open(self) -> None:
        """Read the map, once: a change of it counts from the next time.  Raises `MountError`, `LockUnavailable`."""
        if not self._map:
            return
        try:
            content = await self._lane.call(lambda: _contents(self._map), FILE_TIMEOUT)
            self._given = GivenNames(parse_map(content), libvirt=self._libvirt)
        except Overdue as error:
            raise LockUnavailable(f"cannot read the map of leases {self._map}: {error}") from error
        except OSError as error:
            raise MountError(f"cannot read the map of leases {self._map}: {error.strerror}") from error
        except UsageError as error:
            raise MountError(f"{self._map}: {error.message}", hint=error.hint) from error

    @property
    def rule(self) -> dict[str, str]:
        """What all hosts must agree on, by the names of options."""
        key = "names=libvirt" if self._libvirt else "key=inode" if self._by_inode else "key=path"
        rule = {"leases are named by": key, "lease_map": _digest_of(self._given) if self._map else "none"}
        if key != "key=inode":
            rule["mountpoint"] = text.from_bytes(self._mountpoint)
        return rule

    async def of(self, image: Image) -> str:
        """Return the name of an image's lease as it is now.

        Raises `LockUnavailable` for an attribute that is no name, and where the storage does not say.
        """
        return await driver.run(self.look(image), {})

    def expected(self, image: Image) -> str:
        """Return what an image's lease is called unless the image itself has a name for it: without any I/O."""
        return self._given.of(image.relative, image.path, None) or lease_name(image, by_inode=self._by_inode)

    def look(self, image: Image) -> Steps[str]:
        """Do as `of`, within an operation."""
        try:
            return (yield from call(lambda: self.now(image), FILE_TIMEOUT, self._lane))
        except Overdue as error:
            raise _unknown(image, str(error)) from error

    def now(self, image: Image) -> str:
        """Do as `of`, in a thread of the caller's."""
        try:
            given = self._given.of(image.relative, image.path, _attribute(image.fd))
        except UsageError as error:
            raise LockUnavailable(error.message, hint=error.hint) from error
        except OSError as error:
            raise _unknown(image, error.strerror or str(error)) from error
        return given or lease_name(image, by_inode=self._by_inode)


def _unknown(image: Image, why: str) -> LockUnavailable:
    return LockUnavailable(f"cannot tell how the lease on {text.from_bytes(image.path)} is called: {why}")


def lease_name(image: Image, *, by_inode: bool = True) -> str:
    """Return the name of the lease of an image that nobody has named."""
    if by_inode:
        return f"i-{image.ino:x}"
    return f"p-{hashlib.sha256(image.path).hexdigest()[:DIGEST_CHARS]}"


def _attribute(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, ATTRIBUTE)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise


def _contents(path: str) -> str:
    with open(path, "rb") as file:
        data = file.read(MAP_BYTES + 1)
    if len(data) > MAP_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return data.decode(errors="surrogateescape")


def _digest_of(given: GivenNames) -> str:
    digest = hashlib.sha256()
    for path in sorted(given.by_path):
        digest.update(path + b"\0" + given.by_path[path].encode() + b"\n")
    return digest.hexdigest()[:DIGEST_CHARS]
