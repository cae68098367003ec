"""Where the daemons log: the journal where there is one, else a file in the run directory.

The environment variable ``LOCKFS_LOG`` overrides: ``stderr``, ``file``, ``journal``.  The file is bounded,
since a run directory lies in memory: one old generation is kept.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import socket
import struct
import sys

JOURNAL = "/run/systemd/journal/socket"
FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s[%(process)d]: %(message)s"
LOG_BYTES = 4 << 20


class JournalHandler(logging.Handler):
    """Send records to the journal by its native protocol (systemd: docs/JOURNAL_NATIVE_PROTOCOL.md)."""

    def __init__(self, identifier: str) -> None:
        super().__init__()
        self.identifier = identifier
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a journal that is full or gone must not stop a daemon."""
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}.get(record.levelname, 5)
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(priority),
            "SYSLOG_IDENTIFIER": self.identifier,
            "CODE_MODULE": record.name,
        }
        try:
            self.socket.sendto(b"".join(_field(*each) for each in fields.items()), JOURNAL)
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
        super().close()


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def set_up(component: str, run_dir: str) -> None:
    """Make the root logger of a daemon write where it should; *component* names the log file and the
    journal identifier.
    """
    where = os.environ.get("LOCKFS_LOG") or ("journal" if os.path.exists(JOURNAL) else "file")
    handler: logging.Handler
    if where == "journal":
        handler = JournalHandler(f"lockfs-{component}")
        handler.setFormatter(logging.Formatter("%(message)s"))
    elif where == "file":
        directory = os.path.join(run_dir, "log")
        os.makedirs(directory, mode=0o700, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            os.path.join(directory, f"{component}.log"), maxBytes=LOG_BYTES, backupCount=1
        )
        handler.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%dT%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%dT%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(os.environ.get("LOCKFS_LOG_LEVEL", "INFO").upper())
    logging.captureWarnings(True)
