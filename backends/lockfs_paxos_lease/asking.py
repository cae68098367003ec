"""What other hosts ask of the leases that are held here: sanlock's request records.

Who wants a lease that another host holds may write so beside it, and have its own record call that host, which then
looks at all the leases that it holds exclusively (those that are shared cannot be asked for).  A request is for a
version later than the one that is held, so one that was answered is none any more; nobody removes it.

* By force: the holder is to be ended.  Its grant is told lost, lockd fences the image and kills who has it open for
  writing; so it is closed, and the lease given back.  That is what sanlock does, by SIGKILL.
* Gracefully: the holder is asked to let go.  sanlock runs a program that the holder has named, or sends SIGTERM.  A
  virtual machine knows nothing of its lease, and to end it so would be no more graceful than by force; so it is told to
  people, once for each version, and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lockfs import text
from lockfs.backend import Mode
from lockfs_paxos_lease.engine import requests
from lockfs_paxos_lease.engine.errors import BadArea, EngineError
from lockfs_paxos_lease.format.request import FORCE
from lockfs_paxos_lease.in_use import Held, LeasesInUse
from lockfs_paxos_lease.lockspace import Lockspace

log = logging.getLogger(__name__)


class Asked:
    """Looks at the leases in use, and has *lose* tell the grant of one lost that somebody demands."""

    def __init__(self, in_use: LeasesInUse, lose: Callable[[Held], None]) -> None:
        self._in_use = in_use
        self._lose = lose
        self._looking = False

    async def look(self, joined: Lockspace, callers: Sequence[str]) -> None:
        """Look at all of them; *callers* are the hosts that ask for that, which do not say for which.

        They ask again with each of their renewals for a while; so a look that cannot be had is left to the next one.
        """
        if self._looking:
            return
        self._looking = True
        try:
            for held in self._in_use.all():
                if held.grant is not None and not held.lost and held.mode is Mode.EXCLUSIVE:
                    await self._look_at(joined, held, ", ".join(callers))
        except EngineError as error:
            log.info("cannot look at what %s asks for: %s", ", ".join(callers), error.message)
        finally:
            self._looking = False

    async def _look_at(self, joined: Lockspace, held: Held, callers: str) -> None:
        try:
            request = await joined.run(requests.pending(held.lease), held.area)
        except BadArea as error:
            log.warning("%s: what is asked for cannot be read: %s", held.area.where, error.message)
            return
        grant = held.grant
        # It may have been given back, and its area closed, while it was looked at.
        if request is None or grant is None or self._in_use.of(grant) is not held:
            return
        path = text.from_bytes(grant.image.path)
        if request.force_mode == FORCE:
            if not held.lost:
                log.error("host %s demands %s: it is fenced, and who has it open is killed", callers, path)
                grant.forced = True
                self._lose(held)
        elif held.asked < request.lver:
            held.asked = request.lver
            log.warning(
                "host %s asks that %s be given up, which is held here: nothing is done about it", callers, path
            )
