"""New lockspaces, indexes and leases.  What is there already is not overwritten unawares."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lockfs.errors import UsageError
from lockfs.text import from_bytes
from lockfs_paxos_lease.check import lockspace as lockspace_check
from lockfs_paxos_lease.check.area import Kind
from lockfs_paxos_lease.cli.places import Area, Place, failed, opened, read_area
from lockfs_paxos_lease.disk.file import DiskFile
from lockfs_paxos_lease.format import names, rindex
from lockfs_paxos_lease.format.fresh import fresh_lease, fresh_lockspace, fresh_rindex
from lockfs_paxos_lease.format.size import Geometry


@dataclass(frozen=True, slots=True)
class Making:
    """What to make, and where; the version words say with which timing it is used."""

    place: Place
    geometry: Geometry
    lockspace: bytes
    delta_version: int
    lease_version: int
    io_timeout: int = 10
    overwrite: bool = False


def lockspace(wanted: Making) -> str:
    """Make a lockspace, and return what was done.  Raises `LockfsError`."""
    start = wanted.place.offset or 0
    with _prepared(wanted, start + wanted.geometry.align) as file:
        area, first = fresh_lockspace(wanted.geometry, wanted.lockspace, wanted.io_timeout, wanted.delta_version)
        _write(file, wanted, start, area)
        # Only now it is one: a half is never taken for a whole.
        _write(file, wanted, start, first)
    return f"{wanted.place}: lockspace {names.shown(wanted.lockspace)} for {wanted.geometry.max_hosts} hosts"


def volume(wanted: Making, max_leases: int) -> str:
    """Make a lockspace, and behind it an index for leases, on a device or in a file.  Raises `LockfsError`."""
    start, align = wanted.place.offset or 0, wanted.geometry.align
    header = rindex.Header.of(wanted.geometry, wanted.lockspace, start + align, max_leases)
    guard = fresh_lease(wanted.geometry, wanted.lockspace, rindex.LEASE_NAME, version=wanted.lease_version)
    with _prepared(wanted, start + 3 * align, last=start + (3 + header.resources) * align) as file:
        _write(file, wanted, start + align, fresh_rindex(header))
        _write(file, wanted, start + 2 * align, guard)
        area, first = fresh_lockspace(wanted.geometry, wanted.lockspace, wanted.io_timeout, wanted.delta_version)
        _write(file, wanted, start, area)
        _write(file, wanted, start, first)
    return f"{wanted.place}: lockspace {names.shown(wanted.lockspace)}, and room for {header.resources} leases"


def lease(wanted: Making, name: bytes, num_hosts: int) -> str:
    """Make a lease, and return what was done.  Raises `LockfsError`."""
    start = wanted.place.offset or 0
    with _prepared(wanted, start + wanted.geometry.align) as file:
        area = fresh_lease(wanted.geometry, wanted.lockspace, name, num_hosts, wanted.lease_version)
        _write(file, wanted, start, area)
    return f"{wanted.place}: lease {names.shown(name)} of {names.shown(wanted.lockspace)}"


class _Prepared:
    """A file or device that is long enough, and has nothing that must not be overwritten."""

    def __init__(self, wanted: Making, end: int, last: int) -> None:
        self._wanted = wanted
        self._end = end
        self._last = last
        self._context = opened(wanted.place.path, write=True)

    def __enter__(self) -> DiskFile:
        file, size = self._context.__enter__()
        try:
            size = self._lengthen(file, size)
            start, align = self._wanted.place.offset or 0, self._wanted.geometry.align
            if start % align:
                raise UsageError(f"the offset {start} is not a multiple of the area size {align}")
            for offset in range(start, self._end, align):
                _refuse_to_overwrite(read_area(file, self._wanted.place.path, offset, size), self._wanted.overwrite)
        except BaseException:
            self._context.__exit__(None, None, None)
            raise
        return file

    def __exit__(self, *exc: object) -> None:
        self._context.__exit__(None, None, None)

    def _lengthen(self, file: DiskFile, size: int) -> int:
        if size >= self._end:
            return size
        path = self._wanted.place.path
        if not os.path.isfile(path):
            raise UsageError(f"'{from_bytes(path)}' has {size} bytes; {self._end} are needed")
        try:
            os.ftruncate(file.fd, max(size, self._last))
        except OSError as error:
            raise failed(error, path) from error
        return max(size, self._last)


def _prepared(wanted: Making, end: int, last: int = 0) -> _Prepared:
    if not os.path.exists(wanted.place.path):
        try:
            os.close(os.open(wanted.place.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise failed(error, wanted.place.path) from error
    return _Prepared(wanted, end, max(end, last))


def _refuse_to_overwrite(area: Area, overwrite: bool) -> None:
    if area.kind is Kind.EMPTY:
        return
    if area.kind is Kind.LOCKSPACE:
        records = lockspace_check.records(area.data, area.geometry)
        used = [number + 1 for number, (record, _) in enumerate(records) if record.timestamp]
        if used:
            raise UsageError(
                f"{area.where} is a lockspace that hosts are in: {' '.join(map(str, used))}",
                hint="Unmount there first. `lockfs lease dump` shows who they are; erase it yourself if they are gone "
                "for good and the leases are of no use any more.",
            )
    if not overwrite:
        what = "data that is nobody's lease" if area.kind is Kind.UNKNOWN else f"a {area.kind.value}"
        raise UsageError(f"{area.where} has {what} already", hint="Say --overwrite if it is to be lost.")


def _write(file: DiskFile, wanted: Making, offset: int, data: bytes) -> None:
    try:
        file.write(offset, data)
    except OSError as error:
        raise failed(error, wanted.place.path) from error
