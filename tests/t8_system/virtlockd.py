"""A real virtlockd with a run directory of its own, and a client that asks it for locks as libvirtd does.

The protocol is libvirt's: XDR over a Unix socket (libvirt: src/locking/lock_protocol.x, docs/kbase/internals/rpc).
"""

from __future__ import annotations

import itertools
import socket
import struct
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import processes
from harness.waiting import wait_until

from lockfs.protocol.start import short_path

PROGRAM = "/usr/sbin/virtlockd"
NUMBER, VERSION = 0xEA7BEEF, 1
REGISTER, NEW, ACQUIRE, RELEASE, CREATE_LOCKSPACE = 1, 3, 6, 7, 8
SHARED, AUTOCREATE = 1, 2
HEADER = struct.Struct(">IIIIIII")

# virtlockd, run by root, always uses /run/libvirt: it gets a /run of its own.
IN_NAMESPACE = 'mount -t tmpfs none /run && mkdir /run/libvirt && mount --bind "$1" /run/libvirt && exec "$2" -f "$3" -p "$4"'


class Refused(Exception):
    """virtlockd said no, and why."""


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data + b"\0" * (-len(data) % 4)


class Client:
    """A connection that takes locks for one owner: a process, as libvirtd does for a virtual machine."""

    def __init__(self, run_dir: Path, owner: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        with short_path(str(run_dir), "virtlockd-sock") as address:
            self.socket.connect(address)
        self.serial = itertools.count(1)
        identity = uuid.uuid4().bytes + string(f"vm{owner}") + struct.pack(">II", 1, owner)
        self.call(REGISTER, identity + struct.pack(">I", 0))

    def call(self, procedure: int, arguments: bytes) -> None:
        """Raises `Refused`."""
        size = HEADER.size + len(arguments)
        self.socket.sendall(HEADER.pack(size, NUMBER, VERSION, procedure, 0, next(self.serial), 0) + arguments)
        (size,) = struct.unpack(">I", self.receive(4))
        reply = self.receive(size - 4)
        status = struct.unpack_from(">I", reply, 20)[0]
        if status:
            _code, _domain, present = struct.unpack_from(">iii", reply, 24)
            length = struct.unpack_from(">I", reply, 36)[0] if present else 0
            raise Refused(reply[40 : 40 + length].decode())

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError("virtlockd hung up")
            data += part
        return data

    def create_lockspace(self, directory: Path) -> None:
        self.call(CREATE_LOCKSPACE, string(str(directory)))

    def acquire(self, name: str, *, lockspace: str = "", shared: bool = False) -> None:
        """Lock an image (its path), or a name in a lockspace.  Raises `Refused`."""
        flags = (SHARED if shared else 0) | (AUTOCREATE if lockspace else 0)
        self.call(ACQUIRE, string(lockspace) + string(name) + struct.pack(">I", flags))

    def release(self, name: str, *, lockspace: str = "") -> None:
        self.call(RELEASE, string(lockspace) + string(name) + struct.pack(">I", 0))


@contextmanager
def virtlockd(directory: Path) -> Iterator[tuple[Path, int]]:
    """Run one; yield its run directory and its process id."""
    run_dir = directory / "virtlockd"
    run_dir.mkdir()
    config = directory / "virtlockd.conf"
    config.write_text(f'log_outputs = "1:file:{directory}/virtlockd.log"\n')
    arguments = [run_dir, PROGRAM, config, directory / "virtlockd.pid"]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", IN_NAMESPACE, "sh", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            # Both unshare and sh turn into the next program: the process id stays.
            wait_until((run_dir / "virtlockd-sock").exists, 20, "virtlockd listens")
            yield run_dir, process.pid
        finally:
            process.terminate()
            process.wait(20)
    assert not processes.running(process.pid)


@contextmanager
def client(run_dir: Path, owner: int) -> Iterator[Client]:
    made = Client(run_dir, owner)
    try:
        yield made
    finally:
        made.socket.close()
