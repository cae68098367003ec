"""What a lease is called: by the inode of its image or by its path, the same on all hosts."""

from __future__ import annotations

import hashlib

from lockfs.backend import Image
from lockfs_paxos_lease.given_names import libvirt_name
from lockfs_paxos_lease.options import LIBVIRT, LOCKFS

DIGEST_CHARS = 40
"""Hexadecimal digits of a path's SHA-256 that fit, with what is before them, into the 48 bytes of a lease's name."""


def lease_name(image: Image, key: str, names: str = LOCKFS) -> str:
    """Return the name of an image's lease; *key* is ``inode`` or ``path``.

    With *names* ``libvirt`` it is that which libvirt's sanlock driver goes by: of the path, whatever *key* is.
    """
    if names == LIBVIRT:
        return libvirt_name(image.path)
    if key == "inode":
        return f"i-{image.ino:x}"
    return f"p-{hashlib.sha256(image.path).hexdigest()[:DIGEST_CHARS]}"
