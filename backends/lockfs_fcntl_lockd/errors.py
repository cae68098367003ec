"""What an errno of the storage means for the lock service."""

from __future__ import annotations

import errno

from lockfs.errors import LockUnavailable

_MEANING = {
    errno.ENOLCK: "it has no lock service, or that is out of locks",
    errno.EOPNOTSUPP: "it has no byte locks",
    errno.ENOSYS: "it has no byte locks",
    errno.EINVAL: "it has no byte locks of this kind",
    errno.EBADF: "the file could not be opened in the way the lock needs",
    errno.ESTALE: "the file is gone on the server",
}


def unavailable(what: str, error: OSError) -> LockUnavailable:
    """Return the error for a storage call that failed; *what* is what was attempted."""
    meaning = _MEANING.get(error.errno or 0)
    detail = f"{meaning} ({error.strerror})" if meaning else error.strerror
    return LockUnavailable(f"cannot {what}: {detail}")
