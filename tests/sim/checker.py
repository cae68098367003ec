"""Who was allowed: sees every sector that lands and every write of a VM, and knows nothing of the engine.

It keeps books of its own from what lands on the storage: when each host's record was last renewed (counted from when that
write was issued), so until when the host may act.  Rules:

* At most one session that writes exclusively, and none beside shared ones, on one resource at any moment.  A session is
  there from its grant until it is given back, or until its host's lease has run out.
* No VM writes, and no lease is written, by a host whose lease has run out.
* What a VM wrote lands before anybody else is granted the resource.  Writes that are late beyond all bounds excepted:
  those must carry a lower token than the present holder's.
* Tokens grow from one exclusive session to the next; those of sanlock hosts are not looked at, as a late write of such a
  host may set them back.
* Nobody is granted what was retired.
* A host writes its own sectors, leaders and requests, and nobody else's, but to clear a shared hold of a dead host.
* lockfs hosts: no ballot block is ever zeroed, or written for an earlier version or with a lower ballot number.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.world import Machine, World

_Q = struct.Struct("<Q")
_EPSILON = 1e-6


class Violation(Exception):
    """Somebody did what was not allowed."""


@dataclass(eq=False)
class Session:
    """A grant to one host: who, what, how; `open` until it was given back or fenced."""

    machine: Machine
    incarnation: int
    resource: str
    exclusive: bool
    token: int
    granted: float
    open: bool = True


@dataclass
class Books:
    """What the checker knows of a host."""

    fence: float
    careful: bool
    """A lockfs host, not a sanlock one."""
    until: float = -1.0
    """When its lease runs out, in true time."""
    alive: bool = True
    ballots: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The last version and ballot number that it has written, for each lease."""


class Checker:
    """See the module."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.books: dict[int, Books] = {}
        self.sessions: dict[str, list[Session]] = {}
        self.tokens: dict[str, tuple[int, int]] = {}
        """The highest token of each resource: of all sessions, of exclusive ones."""
        self.orphans: set[str] = set()
        """Resources whose holder has died."""
        self.retired: set[str] = set()
        """Resources that are never to be had again."""
        self.grants = 0
        self.takeovers = 0
        self.late = 0
        self.data = 0

    def register(self, machine: Machine, fence: float, *, careful: bool) -> None:
        """Take a host into the books; *fence* is how long a renewal is good for, on its clock."""
        self.books[machine.number] = Books(fence, careful)

    # What hosts tell.

    def grant(self, machine: Machine, incarnation: int, resource: str, exclusive: bool, token: int) -> Session:
        """A host was granted a resource."""
        self._may_act(machine, f"is granted {resource}")
        if resource in self.retired:
            raise self._violation(f"host {machine.number} is granted {resource}, which was retired")
        session = Session(machine, incarnation, resource, exclusive, token, self.world.now)
        self._exclude(session)
        self.sessions.setdefault(resource, []).append(session)
        self.grants += 1
        if resource in self.orphans:
            self.orphans.remove(resource)
            self.takeovers += 1
        self._token(session)
        return session

    def change(self, session: Session, exclusive: bool, token: int) -> None:
        """A host has changed the mode of what it holds."""
        session.exclusive, session.token = exclusive, token
        if exclusive:
            session.granted = self.world.now
            self._may_act(session.machine, f"converts {session.resource}")
            self._exclude(session)
            self._token(session)

    def end(self, session: Session) -> None:
        """A host has stopped to act under a session, for good."""
        session.open = False

    def retire(self, session: Session) -> None:
        """A host has ended a session, and the resource with it."""
        self.end(session)
        self.retired.add(session.resource)

    def died(self, machine: Machine) -> None:
        """A host lost its power; a daemon that dies alone does not count."""
        for sessions in self.sessions.values():
            for session in sessions:
                if session.machine is machine and session.open:
                    session.open = False
                    self.orphans.add(session.resource)
        self.books[machine.number].until = -1.0

    def data_issued(self, session: Session) -> None:
        """A VM writes."""
        if not session.open:
            raise self._violation(f"host {session.machine.number} writes {session.resource} without holding it")
        self._may_act(session.machine, f"writes {session.resource}")
        self.data += 1

    def data_landed(self, session: Session, *, late: bool) -> None:
        """What a VM wrote has reached the storage; *late*: beyond all bounds."""
        for other in self.sessions.get(session.resource, []):
            if other is session or not (other.exclusive or session.exclusive) or not self._acts(other):
                continue
            if other.granted > session.granted and late and session.token < other.token:
                self.late += 1
                continue
            raise self._violation(
                f"what host {session.machine.number} wrote to {session.resource} under token {session.token} lands "
                f"while host {other.machine.number} holds it under token {other.token}"
            )

    # What the storage shows.

    def issued(self, area: str, machine: Machine) -> None:
        """A write is handed to the storage."""
        books = self.books[machine.number]
        if area != "lockspace" and books.careful:
            self._may_act(machine, f"writes to the lease {area}")

    def landed(self, area: str, sector: int, data: bytes, machine: Machine, issued: float) -> None:
        """A sector was written."""
        books = self.books[machine.number]
        if area == "lockspace":
            if sector + 1 != machine.number:
                raise self._violation(f"host {machine.number} writes the record of host {sector + 1}")
            timestamp = _Q.unpack_from(data, 152)[0]
            if self.world.trace is not None:
                generation = _Q.unpack_from(data, 40)[0]
                self.world.note(f"host {machine.number} lockspace: generation {generation} time {timestamp}")
            until = issued + books.fence / machine.rate
            books.until = max(books.until, until) if timestamp else -1.0
            return
        if self.world.trace is not None:
            self.world.note(f"host {machine.number} {area} sector {sector}: {_describe(sector, data)}")
        if sector >= 2:
            self._host_sector(area, sector - 1, data, machine, books)

    def _host_sector(self, area: str, host_id: int, data: bytes, machine: Machine, books: Books) -> None:
        shared = data[128] & 1
        if host_id != machine.number:
            if shared:
                raise self._violation(f"host {machine.number} notes a shared hold for host {host_id}")
            if any(
                session.machine.number == host_id and not session.exclusive and self._acts(session)
                for session in self.sessions.get(area, [])
            ):
                raise self._violation(f"host {machine.number} clears the shared hold of host {host_id}, which lives")
            return
        if not books.careful:
            return
        mbal, lver = _Q.unpack_from(data, 0)[0], _Q.unpack_from(data, 40)[0]
        if not mbal:
            raise self._violation(f"host {machine.number} zeroes its ballot block in {area}")
        before = books.ballots.get(area, (0, 0))
        if (lver, mbal) < before:
            raise self._violation(f"host {machine.number} falls back to ballot {(lver, mbal)} from {before} in {area}")
        books.ballots[area] = (lver, mbal)

    # Judgement.

    def _acts(self, session: Session) -> bool:
        """Say whether a session is there: open, and its host's lease runs."""
        return session.open and self.world.now < self.books[session.machine.number].until

    def _may_act(self, machine: Machine, what: str) -> None:
        until = self.books[machine.number].until
        if self.world.now > until + _EPSILON:
            raise self._violation(f"host {machine.number} {what} although its lease ran out at {until:.3f}")

    def _exclude(self, session: Session) -> None:
        for other in self.sessions.get(session.resource, []):
            if other is session or not (other.exclusive or session.exclusive):
                continue
            if self._acts(other):
                raise self._violation(
                    f"host {session.machine.number} is granted {session.resource} "
                    f"({'exclusive' if session.exclusive else 'shared'}, token {session.token}) while host "
                    f"{other.machine.number} holds it ({'exclusive' if other.exclusive else 'shared'}, "
                    f"token {other.token})"
                )
            if other.open and other.machine is not session.machine:
                self.takeovers += 1
        self.sessions[session.resource] = [
            other for other in self.sessions.get(session.resource, []) if other is session or self._acts(other)
        ]

    def _token(self, session: Session) -> None:
        if not self.books[session.machine.number].careful:
            return
        any_mode, exclusive = self.tokens.get(session.resource, (0, 0))
        before = any_mode if session.exclusive else exclusive
        if session.token <= before:
            raise self._violation(
                f"host {session.machine.number} gets token {session.token} for {session.resource} after {before}"
            )
        highest = max(any_mode, session.token)
        self.tokens[session.resource] = (highest, session.token if session.exclusive else exclusive)

    def _violation(self, text: str) -> Violation:
        self.world.note(f"VIOLATION: {text}")
        return Violation(f"at {self.world.now:.3f}: {text}")


def _describe(sector: int, data: bytes) -> str:
    """Return a line for the trace."""
    if sector == 0:
        owner, generation, lver = struct.unpack_from("<QQQ", data, 32)
        timestamp, write_id = _Q.unpack_from(data, 152)[0], _Q.unpack_from(data, 176)[0]
        return f"leader version {lver} owner {owner}/{generation} time {timestamp} written by {write_id}"
    if sector == 1:
        return "request"
    mbal, bal, inp, inp2, inp3, lver = struct.unpack_from("<6Q", data, 0)
    flags = " RELEASED" if data[52] & 1 else ""
    shared = " SHARED" if data[128] & 1 else ""
    return f"version {lver} mbal {mbal} bal {bal} value {inp}/{inp2}/{inp3}{flags}{shared}"
