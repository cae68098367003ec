"""What is done to take a lease and to give it back, each as one operation: so it takes one turn of one thread.

Invariants:
* Nothing is made or written before it is certain how the image calls its lease; who then has the lease looks again,
  since the image may have got another name meanwhile, or the file of the lease been removed because nobody used it.
  As long as the lease is held neither can happen.
* The card is there before anybody else is refused because of the lease that it is about, and gone before anybody else
  can have that.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockfs.backend import Holder, Image
from lockfs.errors import LockUnavailable
from lockfs_paxos_lease.disk.call import Steps, call
from lockfs_paxos_lease.disk.lane import Overdue
from lockfs_paxos_lease.engine import lease as engine
from lockfs_paxos_lease.engine.errors import BadArea
from lockfs_paxos_lease.in_use import Held
from lockfs_paxos_lease.naming import Naming
from lockfs_paxos_lease.people import People
from lockfs_paxos_lease.place import FILE_TIMEOUT, Place


class Moved(Exception):
    """The lease is not the image's, or not any more; it is called *name*, if that is known."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Taking:
    """Makes the operations of one share."""

    naming: Naming
    place: Place
    people: People

    def take(self, held: Held, mode: engine.Mode, image: Image, holder: Holder) -> Steps[int]:
        """Take a lease, the area of which is not open yet, and leave the card; return its version.

        Raises what `Lease.acquire` does, `LockUnavailable`, and `Moved`.
        """
        yield from self._look(held, image)
        yield from self._open(held)
        try:
            token = yield from held.lease.acquire(mode)
        except BadArea:
            if (yield from self._is_current(held)):
                raise
            raise Moved from None
        if not (yield from self._is_current(held)):
            raise Moved
        yield from self._look(held, image)
        yield from self.people.note(image, holder)
        return token

    def give_back(self, held: Held, image: Image) -> Steps[int]:
        """Do as `Lease.release`; then nothing is open any more."""
        yield from self.people.forget(image)
        code = yield from held.lease.release()
        if not held.lease.untidy:
            try:
                yield from call(held.area.close_now, FILE_TIMEOUT, held.area.lane)
            except (OSError, Overdue):
                pass
        return code

    def _look(self, held: Held, image: Image) -> Steps[None]:
        name = yield from self.naming.look(image)
        if name != held.name:
            raise Moved(name)

    def _open(self, held: Held) -> Steps[None]:
        area = held.area
        try:
            yield from call(area.open_now, FILE_TIMEOUT, area.lane)
        except OSError as error:
            raise LockUnavailable(f"cannot open {area.where}: {error.strerror}") from error
        except Overdue as error:
            raise LockUnavailable(f"cannot open {area.where}: {error}") from error

    def _is_current(self, held: Held) -> Steps[bool]:
        area, name = held.area, held.name
        try:
            return (yield from call(lambda: self.place.is_current(name, area), FILE_TIMEOUT, area.lane))
        except OSError as error:
            raise LockUnavailable(f"cannot look at the lease {area.where}: {error.strerror}") from error
        except Overdue as error:
            raise LockUnavailable(f"cannot look at the lease {area.where}: {error}") from error
