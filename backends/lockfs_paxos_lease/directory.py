"""Leases in a directory that all hosts share: a file ``lockspace``, and a file ``NAME.lease`` for each lease.

Each file is one area.  A new one is written whole under a temporary name and then linked to its own in one step, so
that of two hosts which make it at once both use the same, and none is ever seen half made.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from lockfs.errors import LockUnavailable, MountError
from lockfs.linux import files
from lockfs_paxos_lease.disk.area import AreaIO, open_area
from lockfs_paxos_lease.disk.file import RawFile, Storage
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.actions import Clock, DiskError
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.fresh import fresh_lease, fresh_lockspace
from lockfs_paxos_lease.format.size import MIB, Geometry
from lockfs_paxos_lease.given_names import LIBVIRT_LOCKSPACE
from lockfs_paxos_lease.place import FILE_TIMEOUT, LEASE_THREADS, LOCKSPACE_THREADS, Space, hosts_of

LOCKSPACE = "lockspace"
SUFFIX = ".lease"
DEFAULT = (".lockfs", "leases")
"""Below the source; the mount does not show it."""
_PAGE = 4096
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

T = TypeVar("T")


class LeaseDirectory:
    """See the module.  *path* is the directory; where it is empty it is the default one below *source_fd*.

    The lockspace has threads of its own: a renewal must not wait behind calls for leases.  *libvirt*: files are named,
    and the lockspace too, as libvirt's sanlock driver has them.
    """

    def __init__(
        self, storage: Storage, clock: Clock, timing: Timing, source_fd: int, source: str, path: str,
        *, libvirt: bool = False,
    ) -> None:  # fmt: skip
        self.where = path or "/".join((source.rstrip("/"), *DEFAULT))
        self._storage = storage
        self._lane = Lane(LEASE_THREADS)
        self._lockspace_lane = Lane(LOCKSPACE_THREADS)
        self._clock = clock
        self._timing = timing
        self._source_fd = source_fd
        self._path = path
        self._fd = -1
        self._space: Space | None = None
        self._libvirt = libvirt
        self._lockspace = self.lockspace_file = LIBVIRT_LOCKSPACE if libvirt else LOCKSPACE
        self._suffix = "" if libvirt else SUFFIX

    async def open(self) -> Space:
        """Find the directory and the lockspace, or make them.  Raises `MountError`, `LockUnavailable`."""
        try:
            self._fd = await self._call(self._enter, "open the directory of the leases", undo=os.close)
            self._space = await self._call(self._open_lockspace, "open the lockspace")
        except OSError as error:
            await self.close()
            raise self._unusable(error) from error
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.close()
            raise
        return self._space

    def _unusable(self, error: OSError) -> MountError:
        hint = "All hosts must share this directory, and be able to write to it."
        if error.errno == errno.EINVAL:
            hint = "Leases need direct I/O: use another directory with leases=DIR, or another backend."
        return MountError(f"no leases can be kept in {self.where}: {error.strerror}", hint=hint)

    def _enter(self) -> int:
        if self._path:
            return os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        parent = _enter(self._source_fd, DEFAULT[0])
        try:
            return _enter(parent, DEFAULT[1])
        finally:
            os.close(parent)

    def _open_lockspace(self) -> Space:
        if not self._exists(self._lockspace):
            self._make_lockspace()
        file = self._storage.open(self._lockspace, self._fd)
        try:
            first = file.read(0, _PAGE)
        finally:
            file.close()
        info = os.stat(self._lockspace, dir_fd=self._fd, follow_symlinks=False)
        where = f"{self.where}/{self._lockspace}"
        return Space.of(first, (info.st_dev, info.st_ino, 0), self._timing, where)

    def _make_lockspace(self) -> None:
        name = (LIBVIRT_LOCKSPACE if self._libvirt else f"lockfs-{secrets.token_hex(8)}").encode()
        geometry = self._geometry()
        area, first = fresh_lockspace(geometry, name, self._timing.stored, self._timing.delta_version)
        self._make(self._lockspace, (area, first))

    def _geometry(self) -> Geometry:
        """Return the smallest sizes that the storage can write in one piece."""
        probe = f".probe.{secrets.token_hex(8)}"
        fd = os.open(probe, _NEW, 0o600, dir_fd=self._fd)
        try:
            try:
                os.write(fd, bytes(2 * _PAGE))
                os.fsync(fd)
            finally:
                os.close(fd)
            file = self._storage.open(probe, self._fd)
            try:
                for sector in (512, _PAGE):
                    try:
                        file.write(sector, bytes(sector))
                        file.read(sector, sector)
                    except OSError as error:
                        if error.errno != errno.EINVAL or sector == _PAGE:
                            raise
                    else:
                        return Geometry(sector, MIB)
            finally:
                file.close()
        finally:
            os.unlink(probe, dir_fd=self._fd)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def lease_file(self, name: str) -> str:
        """Return the name of the file of a lease."""
        return name + self._suffix

    async def lockspace(self) -> AreaIO:
        """Open the area of the lockspace.  Raises `LockUnavailable`."""
        return await self._open(self._lockspace, self._lockspace_lane)

    async def find(self, name: str) -> AreaIO | None:
        """Open the area of a lease; None if there is none.  Raises `LockUnavailable`."""
        try:
            return await self._open(name + self._suffix, self._lane)
        except FileNotFoundError:
            return None

    async def lease(self, name: str) -> AreaIO:
        """Return the area of a lease, not open yet; to open it makes it if there is none."""
        return AreaIO(lambda: self._open_or_make(name), self._lane, self._clock, self._file(name))

    def _open_or_make(self, name: str) -> RawFile:
        try:
            return self._storage.open(name + self._suffix, self._fd)
        except FileNotFoundError:
            pass
        try:
            self._make_lease(name)
        except OSError as error:
            raise LockUnavailable(f"cannot make the lease {self._file(name)}: {error.strerror}") from error
        return self._storage.open(name + self._suffix, self._fd)

    async def make(self, name: str) -> None:
        """Make a lease if there is none.  Raises `LockUnavailable`."""
        area = await self.lease(name)
        try:
            await area.open(FILE_TIMEOUT)
        except OSError as error:
            raise LockUnavailable(f"cannot open {area.where}: {error.strerror}") from error
        except DiskError as error:
            raise LockUnavailable(str(error)) from error
        finally:
            with trio.CancelScope(shield=True):
                await area.close()

    def is_current(self, name: str, area: AreaIO) -> bool:
        """Say whether an area that was opened is that of the file that has the name now.  In a thread; OSError."""
        try:
            info = os.stat(name + self._suffix, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return area.identity == (info.st_dev, info.st_ino)

    async def remove(self, name: str, area: AreaIO, until: float) -> bool:
        """Remove the file of a lease that is marked as deleted, if it is still that of *area*; say whether it was.

        Raises `LockUnavailable` if that cannot begin before *until*; OSError.
        """
        file = name + self._suffix

        def work() -> bool:
            info = os.stat(file, dir_fd=self._fd, follow_symlinks=False)
            if (info.st_dev, info.st_ino) != area.identity:
                return False
            if self._clock() > until:
                raise LockUnavailable(f"it took too long to remove {self._file(name)}: it stays, marked as deleted")
            os.unlink(file, dir_fd=self._fd)
            os.fsync(self._fd)
            return True

        return await self._call(work, f"remove the lease {name}")

    async def age(self, name: str) -> float:
        """Return for how many seconds a lease has not been written to, by the clock of the storage.  Raises OSError."""

        def work() -> float:
            probe = f".age.{secrets.token_hex(8)}"
            fd = os.open(probe, _NEW, 0o600, dir_fd=self._fd)
            try:
                os.write(fd, b"now")
                now = os.fstat(fd).st_mtime
            finally:
                os.close(fd)
                os.unlink(probe, dir_fd=self._fd)
            return now - os.stat(name + self._suffix, dir_fd=self._fd, follow_symlinks=False).st_mtime

        return await self._call(work, f"look at the lease {name}")

    def _make_lease(self, name: str) -> None:
        space, timing = self._space, self._timing
        if space is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        hosts = hosts_of(timing, space.geometry)
        self._make(
            name + self._suffix, (fresh_lease(space.geometry, space.name, name.encode(), hosts, timing.lease_version),)
        )

    async def close(self) -> None:
        """Close the directory."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                await self._lane.call(lambda: os.close(fd), FILE_TIMEOUT)
            except (OSError, Overdue):
                pass

    def _make(self, name: str, writes: Sequence[bytes]) -> None:
        """Make a file with these writes at its start, one after the other, unless it is there."""
        temporary = f".{name}.{secrets.token_hex(8)}"
        fd = os.open(temporary, _NEW, 0o600, dir_fd=self._fd)
        try:
            try:
                for data in writes:
                    _write_all(fd, data)
                os.fsync(fd)
                # Everybody reads past the page cache: nothing of it is wanted there.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
            self._give_name(temporary, name)
        finally:
            try:
                os.unlink(temporary, dir_fd=self._fd)
            except FileNotFoundError:
                pass
        os.fsync(self._fd)

    def _give_name(self, temporary: str, name: str) -> None:
        try:
            os.link(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                files.rename(self._fd, os.fsencode(temporary), self._fd, os.fsencode(name), files.RENAME_NOREPLACE)
            except FileExistsError:
                return

    def _exists(self, name: str) -> bool:
        try:
            info = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, f"{name} is not a regular file")
        return True

    def _file(self, name: str) -> str:
        return f"{self.where}/{name}{self._suffix}"

    async def _open(self, name: str, lane: Lane) -> AreaIO:
        try:
            area = await open_area(self._storage, lane, self._clock, name, dir_fd=self._fd, timeout=FILE_TIMEOUT)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LockUnavailable(f"cannot open {self.where}/{name}: {error.strerror}") from error
        except DiskError as error:
            raise LockUnavailable(f"in {self.where}: {error}") from error
        area.where = f"{self.where}/{name}"
        return area

    async def _call(self, work: Callable[[], T], what: str, undo: Callable[[T], None] | None = None) -> T:
        try:
            return await self._lane.call(work, FILE_TIMEOUT, undo=undo)
        except Overdue as error:
            raise LockUnavailable(f"cannot {what} in {self.where}: {error}") from error


def _enter(parent: int, name: str) -> int:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        pass
    return os.open(name, _DIRECTORY, dir_fd=parent)


def _write_all(fd: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)
