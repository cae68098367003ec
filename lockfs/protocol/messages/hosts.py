"""The hosts that share locks with this one."""

from __future__ import annotations

import msgspec


class Hosts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask for the hosts that share locks with this one; of one source directory only, if it is named."""

    source: str = ""


class HostInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A host, and how it is judged: ``live``, ``failing``, ``dead``, ``free`` or ``unknown``.

    `number` is its host id, 0 where there are none.  `last_seen` is 0 if it is not known.  `holds` says what it holds,
    as far as this host can tell; `here` is true for this host.
    """

    name: str
    state: str
    number: int = 0
    last_seen: float = 0.0
    detail: str = ""
    holds: list[str] = []
    here: bool = False


class ShareHosts(msgspec.Struct, frozen=True, omit_defaults=True):
    """The hosts of one source directory.  With a `problem` they could not be asked for."""

    source: str
    backend: str
    hosts: list[HostInfo] = []
    problem: str = ""


class HostList(msgspec.Struct, frozen=True):
    shares: list[ShareHosts]


class ConfirmDead(msgspec.Struct, frozen=True, omit_defaults=True):
    """An admin answers for it that a host, by name or number, is dead: what it held is free at once.

    Without *source* it is meant wherever that host is known.
    """

    host: str
    source: str = ""
    reason: str = ""


class ConfirmedDead(msgspec.Struct, frozen=True):
    """Where it was done: source directories."""

    host: str
    sources: list[str]
