"""Two hosts that share a directory, for tests of one backend."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio

from lockfs.backend import Backend, Context, Grant, Holder, Image, Mode, find
from lockfs.lockd.sources import parse_options

MOUNTPOINT = "/mnt/images"


class Station:
    """A host with a backend of its own.  Each image it opens is an open file description of its own."""

    def __init__(self, host: str, backend: Backend, share: Path) -> None:
        self.host = host
        self.backend = backend
        self.share = share
        self.fds: list[int] = []

    def image(self, name: str = "img", flags: int = os.O_RDWR) -> Image:
        fd = os.open(self.share / name, flags | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.fds.append(fd)
        info = os.fstat(fd)
        path = f"{MOUNTPOINT}/{name}".encode()
        return Image(fd, info.st_dev, info.st_ino, name.encode(), path)

    def holder(self, mode: Mode, **more: object) -> Holder:
        known = {"pid": 4711, "command": "qemu-system-x86", "vm": "vm1", "since": 1.5e9, "path": f"{MOUNTPOINT}/img"}
        return Holder(self.host, mode, **{**known, **more})  # type: ignore[arg-type]

    async def acquire(self, mode: Mode = Mode.EXCLUSIVE, name: str = "img") -> Grant:
        return await self.backend.acquire(self.image(name), mode, self.holder(mode))

    async def release(self, grant: Grant) -> None:
        await self.backend.release(grant)

    async def holder_seen(self, name: str = "img") -> Holder | None:
        """Ask with a descriptor for reading, which is what who only looks has."""
        return await self.backend.inspect(self.image(name, os.O_RDONLY))


@asynccontextmanager
async def station(
    host: str,
    share: Path,
    name: str,
    options: dict[str, str],
    *,
    fstype: str = "ext4",
    fsoptions: dict[str, str] | None = None,
    run_dirs: Path | None = None,
    load: Callable[[Context], Backend] | None = None,
) -> AsyncIterator[Station]:
    """Start a backend as lockd does, and stop it at the end.  Each host has a run directory below *run_dirs*.

    *load* makes the backend, if it is not to be made as lockd does.
    """
    spec = find(name)
    source_fd = os.open(share, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        context = Context(
            source_fd=source_fd,
            source=os.fsencode(share),
            mountpoint=MOUNTPOINT.encode(),
            fstype=fstype,
            fsoptions=fsoptions or {},
            host=host,
            options=parse_options(spec, options),
            run_dir=str(run_dirs / host) if run_dirs else "/nonexistent",
        )
        backend = (load or spec.load)(context)
        await backend.start()
        made = Station(host, backend, share)
        try:
            yield made
        finally:
            with trio.CancelScope(shield=True):
                await backend.stop()
            for fd in made.fds:
                os.close(fd)
    finally:
        os.close(source_fd)


Open = Callable[[str], AbstractAsyncContextManager[Station]]
