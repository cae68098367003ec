"""What a lease is called: by the inode of its image or by its path, the same on all hosts."""

from __future__ import annotations

import hashlib

from lockfs.backend import Image

DIGEST_CHARS = 40
"""Hexadecimal digits of a path's SHA-256 that fit, with what is before them, into the 48 bytes of a lease's name."""


def lease_name(image: Image, key: str) -> str:
    """Return the name of an image's lease; *key* is ``inode`` or ``path``."""
    if key == "inode":
        return f"i-{image.ino:x}"
    return f"p-{hashlib.sha256(image.path).hexdigest()[:DIGEST_CHARS]}"
