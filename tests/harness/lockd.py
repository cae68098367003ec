"""lockd asked directly: a test that polls must not start a program each time."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


def status(run_dir: Path) -> dict[str, Any]:
    """Return what ``GetStatus`` answers.  Raises OSError without lockd."""
    return _ask(run_dir, "GetStatus")


def locks(run_dir: Path) -> list[dict[str, Any]] | None:
    """Return the locks, as many as fit into one answer; None while no lockd answers."""
    try:
        found: list[dict[str, Any]] = _ask(run_dir, "ListLocks")["locks"]
    except OSError:
        return None
    return found


def _ask(run_dir: Path, method: str) -> dict[str, Any]:
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(f"/proc/self/fd/{directory}/lockd.sock")
            sock.sendall(b'{"method": "io.lockfs.Lockd.%s"}\0' % method.encode())
            answer = b""
            while not answer.endswith(b"\0"):
                part = sock.recv(1 << 16)
                if not part:
                    raise ConnectionResetError("lockd hung up")
                answer += part
    finally:
        os.close(directory)
    found: dict[str, Any] = json.loads(answer[:-1])["parameters"]
    return found
