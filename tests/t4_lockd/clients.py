"""Clients of a real lockd: one that behaves, as a mount daemon would, and a bare socket that need not."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from lockfs.protocol import messages as m
from lockfs.protocol.client import LockdClient
from lockfs.protocol.start import SOCKET, short_path


@dataclass
class FakeMount:
    """What the mount daemon of one mount does with lockd."""

    client: LockdClient
    source: Path
    registered: m.Registered

    def image(self, name: str = "img") -> m.Image:
        path = self.source / name
        path.touch()
        info = path.stat()
        return m.Image(info.st_dev, info.st_ino, name, f"/mnt/{name}")

    async def acquire(
        self, owner: str, name: str = "img", mode: m.ModeName = "exclusive", wait: float = 0.0
    ) -> list[int]:
        """Return what is to be kept, which the test has to close."""
        image = self.image(name)
        fd = os.open(self.source / name, os.O_RDWR | os.O_CLOEXEC)
        try:
            who = m.Owner(owner, pid=os.getpid(), command=f"command-{owner}")
            call = m.Acquire(self.registered.mount_id, image, mode, who, wait)
            _, keep = await self.client.call(call, m.Acquired, [fd])
        finally:
            os.close(fd)
        return keep

    async def release(self, owner: str, name: str = "img", mode: m.ModeName = "exclusive") -> None:
        image = self.image(name)
        call = m.Release(self.registered.mount_id, image.dev, image.ino, mode, owner)
        await self.client.call(call, m.Released)

    async def holders(self, name: str = "img") -> list[m.HolderInfo]:
        image = self.image(name)
        fd = os.open(self.source / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            answer, _ = await self.client.call(m.Inspect(self.registered.mount_id, image), m.Inspected, [fd])
        finally:
            os.close(fd)
        return answer.holders


@asynccontextmanager
async def client(run_dir: Path) -> AsyncIterator[LockdClient]:
    made = await LockdClient.connect(str(run_dir))
    try:
        yield made
    finally:
        with trio.CancelScope(shield=True):
            await made.aclose()


@asynccontextmanager
async def mounted(
    run_dir: Path, source: Path, backend: str = "fcntl-lockd", mountpoint: str = "/mnt", **options: str
) -> AsyncIterator[FakeMount]:
    """Register a mount, and be its daemon within the context."""
    async with client(run_dir) as made:
        fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mount = m.Mount(str(source), mountpoint, "ext4", {}, backend, options)
            registered, _ = await made.register(m.Register(mount), fd)
        finally:
            os.close(fd)
        yield FakeMount(made, source, registered)


class Bare:
    """A socket connected to lockd.  What it sends need not make sense."""

    def __init__(self, run_dir: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        with short_path(str(run_dir), SOCKET) as address:
            self.socket.connect(address)
        self.buffer = b""

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([data], rights)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def call(self, method: str, parameters: object = None, **more: object) -> None:
        self.send(msgspec.json.encode({"method": method, "parameters": parameters or {}, **more}) + b"\0")

    def receive(self) -> Any:
        """Return the next reply, None at the end."""
        while b"\0" not in self.buffer:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return msgspec.json.decode(message)


@contextmanager
def bare(run_dir: Path) -> Any:
    made = Bare(run_dir)
    try:
        yield made
    finally:
        made.socket.close()
