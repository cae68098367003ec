"""Holder cards: small files on the share that say who holds an image, for people on other hosts.

Nobody is granted or refused anything because of a card; it only gives a name to a holder whose lock was
seen.  A card may be stale, missing, or written by anybody who may write to the share, so what it says is
checked and shown with care.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import msgspec

from lockfs.backend import Holder, Host, Mode
from lockfs.linux import procfs

CARD_BYTES = 4096
MOST = 1000
"""Cards that are read to tell what hosts hold."""
SUFFIX = ".json"
CUT = 24
"""Characters of a host's name that every backend keeps; a longer one may be cut off."""
PLACE = (".lockfs", "holders")
_PATH_CHARS = 1024
_NAME_CHARS = 128

log = logging.getLogger(__name__)
Text = Annotated[str, msgspec.Meta(max_length=CARD_BYTES)]


class Card(msgspec.Struct, frozen=True):
    """What a card says; `id` tells the cards of one host apart, so that each removes only its own."""

    host: Text
    mode: Mode
    id: Text = ""
    pid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    command: Text = ""
    vm: Text = ""
    since: Annotated[float, msgspec.Meta(ge=0, le=1e11)] = 0.0
    path: Text = ""


_decoder = msgspec.json.Decoder(Card)


class Cards:
    """The cards of one share.  *source_fd* is its top, *source* its name for messages.

    *writer* is who writes them, among all on this machine; a later one of that name has the cards of an earlier one.
    """

    def __init__(self, source_fd: int, source: str, writer: str) -> None:
        self._source_fd = source_fd
        self._source = source
        self._directory = -1
        self._id = _identity(writer)
        self._complained = False

    def open(self) -> None:
        """Find or make the directory of the cards; without it there are none."""
        try:
            parent = _enter(self._source_fd, PLACE[0])
            try:
                self._directory = _enter(parent, PLACE[1])
            finally:
                os.close(parent)
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        """Close the directory."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def write(self, ino: int, holder: Holder) -> None:
        """Say who holds an image.  Never raises OSError: a lock does not depend on its card."""
        if self._directory < 0:
            return
        data = _encode(holder, self._id)
        temporary = f".{ino:x}.{self._id}.{secrets.token_hex(4)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o644, dir_fd=self._directory)
            try:
                try:
                    written = os.write(fd, data)
                finally:
                    os.close(fd)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.rename(temporary, _name(ino), src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except BaseException:
                os.unlink(temporary, dir_fd=self._directory)
                raise
        except OSError as error:
            self._complain(error)

    def remove(self, ino: int) -> None:
        """Remove the card of an image if it is still ours."""
        if self._directory < 0:
            return
        card = self._read(ino)
        if card is None or card.id != self._id:
            return
        try:
            os.unlink(_name(ino), dir_fd=self._directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain(error)

    def read(self, ino: int) -> Holder | None:
        """Return what the card of an image says, made fit to be shown; None without a card that makes
        sense.
        """
        card = self._read(ino)
        return None if card is None else _holder(card)

    def all(self) -> list[Holder]:
        """Return what the cards say, those of the first `MOST` images."""
        if self._directory < 0:
            return []
        try:
            names = [name for name in os.listdir(self._directory) if name.endswith(SUFFIX) and name[0] != "."]
        except OSError:
            return []
        cards = (self._read_file(name) for name in sorted(names)[:MOST])
        return [_holder(card) for card in cards if card is not None]

    def _read(self, ino: int) -> Card | None:
        return self._read_file(_name(ino))

    def _read_file(self, name: str) -> Card | None:
        if self._directory < 0:
            return None
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=self._directory)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return None
                data = os.read(fd, CARD_BYTES + 1)
            finally:
                os.close(fd)
            return _decoder.decode(data) if len(data) <= CARD_BYTES else None
        except (OSError, ValueError, RecursionError):
            return None

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.info(
                "%s: no holder cards can be kept in %s (%s); locks work, but other hosts cannot say who has them",
                self._source,
                "/".join(PLACE),
                error.strerror,
            )


def _identity(writer: str) -> str:
    """Return what no other machine, and no other boot of this one, has for a writer of that name."""
    boot = procfs.contents("/proc/sys/kernel/random/boot_id")
    return hashlib.sha256(boot + writer.encode(errors="surrogateescape")).hexdigest()[:16]


def _enter(parent: int, name: str) -> int:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        pass
    except OSError:
        # A share that we may not write to may have the directory all the same.
        pass
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _name(ino: int) -> str:
    return f"{ino:x}{SUFFIX}"


def _holder(card: Card) -> Holder:
    """Return what a card says, made fit to be shown."""
    return Holder(
        host=_show(card.host),
        mode=card.mode,
        pid=card.pid,
        command=_show(card.command),
        vm=_show(card.vm),
        since=card.since,
        path=_show(card.path),
    )


def with_holds(hosts: Sequence[Host], holders: Sequence[Holder]) -> list[Host]:
    """Return hosts with what the cards say that they hold."""
    return [replace(host, holds=[each.path for each in holders if _is_of(each.host, host.name)]) for host in hosts]


def _is_of(name: str, host: str) -> bool:
    # The records of leases have room for so much of a host's name.
    return name == host or (len(host) >= CUT and name.startswith(host))


def _encode(holder: Holder, identity: str) -> bytes:
    path = holder.path
    while True:
        card = Card(
            host=holder.host[:_NAME_CHARS],
            mode=holder.mode,
            id=identity,
            pid=max(holder.pid, 0),
            command=holder.command[:_NAME_CHARS],
            vm=holder.vm[:_NAME_CHARS],
            since=holder.since,
            path=path,
        )
        data = msgspec.json.encode(card) + b"\n"
        if len(data) <= CARD_BYTES or not path:
            return data
        path = "\u2026" + path[-_PATH_CHARS:] if len(path) > _PATH_CHARS + 1 else ""


def _show(text: str) -> str:
    """Escape what could drive a terminal or forge a line of a log."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
