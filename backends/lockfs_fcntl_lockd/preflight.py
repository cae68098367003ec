"""Whether the locks of a filesystem reach the other hosts at all.

On one host everything works also where locks are local, and data is lost when the second host writes; so a
mount that is known to keep its locks to itself is refused before anything is done.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping

from lockfs.errors import MountError
from lockfs.linux import ofd

PROBE = ".lockfs-probe-"
_NFS = ("nfs", "nfs4")
_CIFS = ("cifs", "smb3")


def check_options(source: str, fstype: str, options: Mapping[str, str]) -> None:
    """Raise `MountError` if a filesystem of this type and these options keeps byte locks on this host.

    The options are those that /proc/self/mountinfo shows (nfs(5), mount.cifs(8), gfs2(5)).
    """
    wrong = _local_locks(fstype, options)
    if wrong:
        raise MountError(
            f"{source} ({fstype}) is mounted with {wrong}: other hosts do not see its locks",
            hint=f"Mount it without {wrong}, on all hosts; see: findmnt -T {source}",
        )


def _local_locks(fstype: str, options: Mapping[str, str]) -> str:
    """Return the option that makes byte locks local, "" if there is none."""
    if fstype in _NFS:
        # local_lock=flock is about flock(2) only.
        if options.get("local_lock") in ("all", "posix"):
            return f"local_lock={options['local_lock']}"
        if "nolock" in options:
            return "nolock"
    if fstype in _CIFS and "nobrl" in options:
        return "nobrl"
    if fstype == "gfs2":
        if "localflocks" in options:
            return "localflocks"
        if options.get("lockproto") == "lock_nolock":
            return "lockproto=lock_nolock"
    return ""


def probe(directory: int, where: str) -> bool:
    """Take and drop a lock on a file made for it in *directory*.  Return False if no file can be made there.

    Raises `MountError` if there are no locks.
    """
    try:
        fd = _make_file(directory)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
            return False
        raise MountError(f"cannot make a file in {where}: {error.strerror}") from error
    try:
        if not ofd.lock(fd, exclusive=True, start=0, length=1):
            raise MountError(f"a new file in {where} is locked already: its locks cannot be trusted")
        ofd.unlock(fd, start=0, length=1)
    except OSError as error:
        raise MountError(
            f"byte locks do not work in {where}: {error.strerror}",
            hint="On NFS version 3, rpcbind and rpc.statd must run on this host and the server.",
        ) from error
    finally:
        os.close(fd)
    return True


def _make_file(directory: int) -> int:
    """Return a new file without a name, or one whose name was removed at once."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(".", os.O_TMPFILE | flags, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    name = PROBE + secrets.token_hex(8)
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | flags, 0o600, dir_fd=directory)
    try:
        os.unlink(name, dir_fd=directory)
    except BaseException:
        os.close(fd)
        raise
    return fd
