"""By which rule leases are named on a share: one for all its hosts, written down in ``SOURCE/.lockfs/naming``.

Two hosts that go by different names for an image do not exclude each other.  So the first one to mount writes down what
it goes by, and one that goes by something else is not let in.  To change it, unmount on all hosts and remove the file.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping

from lockfs.errors import LockUnavailable, MountError
from lockfs.linux import files
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.place import FILE_TIMEOUT

PLACE = (".lockfs", "naming")
MOST = 1 << 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_CANNOT_WRITE = (errno.EROFS, errno.EACCES)
"""A share that cannot be written to has no images that could be, on this host."""


async def check(lane: Lane, source_fd: int, source: str, rule: Mapping[str, str]) -> None:
    """See that the share goes by *rule*; write it down if nothing is.  Raises `MountError`, `LockUnavailable`."""
    wanted = "".join(f"{name}: {value}\n" for name, value in rule.items())
    where = "/".join((source.rstrip("/"), *PLACE))
    try:
        there = await lane.call(lambda: _agree(source_fd, wanted), FILE_TIMEOUT)
    except Overdue as error:
        raise LockUnavailable(f"cannot look at {where}: {error}") from error
    except OSError as error:
        raise MountError(f"cannot look at {where}: {error.strerror}") from error
    if there != wanted:
        raise MountError(
            f"leases of {source} are named in another way than this mount would: {_difference(there, rule)}",
            hint=f"All hosts must agree on it. To change it, unmount {source} on all hosts, and remove {where}.",
        )


def _difference(there: str, rule: Mapping[str, str]) -> str:
    found = dict(line.split(": ", 1) for line in there.splitlines() if ": " in line)
    wrong = [f"{name}: {found.get(name, 'nothing')}, not {rule.get(name, 'nothing')}"
             for name in {**rule, **found} if found.get(name) != rule.get(name)]  # fmt: skip
    return "; ".join(wrong) or "it is not readable"


def _agree(source_fd: int, wanted: str) -> str:
    """Return what is written down, after writing *wanted* down if nothing was."""
    try:
        try:
            os.mkdir(PLACE[0], 0o755, dir_fd=source_fd)
        except FileExistsError:
            pass
        directory = os.open(PLACE[0], _DIRECTORY, dir_fd=source_fd)
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            return wanted
        raise
    try:
        return _read(directory) or _write(directory, wanted)
    finally:
        os.close(directory)


def _read(directory: int) -> str:
    try:
        fd = os.open(PLACE[1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return ""
    with open(fd, "rb") as file:
        return file.read(MOST).decode(errors="replace")


def _write(directory: int, wanted: str) -> str:
    """Write it whole, then give it its name, unless somebody else has been faster; return what there is then."""
    temporary = f".{PLACE[1]}.{secrets.token_hex(8)}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            return wanted
        raise
    try:
        with open(fd, "wb") as file:
            file.write(wanted.encode())
            file.flush()
            os.fsync(fd)
        try:
            os.link(temporary, PLACE[1], src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename(directory, temporary)
        os.fsync(directory)
    finally:
        try:
            os.unlink(temporary, dir_fd=directory)
        except FileNotFoundError:
            pass
    return _read(directory)


def _rename(directory: int, temporary: str) -> None:
    try:
        files.rename(directory, os.fsencode(temporary), directory, os.fsencode(PLACE[1]), files.RENAME_NOREPLACE)
    except FileExistsError:
        pass
