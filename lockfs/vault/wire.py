"""What lockd and the vault say to each other: messages of a SOCK_SEQPACKET socket, whose descriptors ride along.  Pure.

A message is lines of a word, the number of descriptors that belong to it, and an argument; an answer to `TAKE` may be
many messages.  This form and `TAKE`, `KEPT`, `ALL` stay as they are for ever: by them a lockd gets what the vault of
another version has, which it then replaces.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

SOCKET, LOCK = "vault.sock", "vault.lock"
"""Names in the run directory.  Who holds the flock on the second is the vault."""
MAX_FDS = 250
"""Descriptors of one message; the kernel takes 253 (SCM_MAX_FD)."""
MAX_BYTES = 1 << 16
"""Of one message: well below what a socket's buffer holds."""

PUT, DROP, FORGET = "put", "drop", "forget"
"""Keep descriptors under a key, in place of what was there; close them; close all that is kept of a mount."""
TAKE, KEPT, ALL = "take", "kept", "all"
"""Send copies of all: under each key `KEPT`; `ALL` follows, with the version."""
START = "start"
"""How lockd is started: JSON."""
ALIVE, END = "alive", "end"
"""Said once a second, and answered; close all, and leave."""

_ROOM = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Item(NamedTuple):
    """One line."""

    word: str
    fds: int = 0
    what: str = ""


def encode(items: Iterable[Item]) -> bytes:
    """Return a message."""
    return "\n".join(f"{item.word} {item.fds} {item.what}" for item in items).encode()


def decode(message: bytes) -> list[Item]:
    """Return the lines of a message.  Raises ValueError for what is none."""
    items = []
    for line in message.decode().split("\n"):
        word, count, what = line.split(" ", 2)
        items.append(Item(word, int(count), what))
    return items


def deal(items: Sequence[Item], fds: Sequence[int]) -> Iterator[tuple[Item, list[int]]]:
    """Yield each line with its descriptors.  Raises ValueError before the first if their number is another."""
    if sum(item.fds for item in items) != len(fds):
        raise ValueError("a message came with another number of descriptors than it says")
    at = 0
    for item in items:
        yield item, list(fds[at : at + item.fds])
        at += item.fds


def mount_key(mount_id: str) -> str:
    """Return the key of what is kept of a mount: connection, root, source and mount namespace, in this order."""
    return f"mount/{mount_id}"


def nameless_key(mount_id: str, node: int) -> str:
    """Return the key of an open file without a name."""
    return f"nameless/{mount_id}/{node}"


def whole_key(mount_id: str) -> str:
    """Return the key, of no descriptors, that says of a mount: a lock that is not kept is not held through it."""
    return f"whole/{mount_id}"


def lock_key(dev: int, ino: int) -> str:
    """Return the key of what a lock lives in: the descriptor it was put on, and those to keep with it."""
    return f"lock/{dev}/{ino}"


def group(key: str) -> str:
    """Return what a key belongs to: a mount, or a device of the storage."""
    return key.split("/")[1]


def send(sock: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """Send a message.  Raises OSError; BlockingIOError from a socket without room for it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([message], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Return a message and its descriptors, which are the caller's; an empty one at the end.  Raises OSError."""
    data, ancillary, _, _ = sock.recvmsg(2 * MAX_BYTES, _ROOM, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)
