"""The hosts that share locks with this one, and an admin's word that one of them is dead."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

import trio

from lockfs.backend import Host
from lockfs.errors import Denied, LockfsError
from lockfs.linux import process
from lockfs.lockd.events import Events
from lockfs.lockd.share import Share
from lockfs.lockd.storage import Job
from lockfs.protocol import messages

log = logging.getLogger(__name__)


async def listed(shares: Iterable[Share], source: str) -> messages.HostList:
    """Return the hosts of all shares, or of the one with that source; a share that does not answer says so."""
    found: dict[int, messages.ShareHosts] = {}

    async def ask(share: Share) -> None:
        async def work(_: Job[Sequence[Host]]) -> Sequence[Host]:
            return await share.backend.hosts()

        try:
            hosts = await share.storage.run(share, work)
        except LockfsError as error:
            found[share.number] = messages.ShareHosts(share.source, share.backend_name, problem=error.message)
        else:
            infos = [_info(each) for each in hosts]
            found[share.number] = messages.ShareHosts(share.source, share.backend_name, infos)

    async with trio.open_nursery() as nursery:
        for share in shares:
            if source in ("", share.source):
                nursery.start_soon(ask, share)
    return messages.HostList([found[number] for number in sorted(found)])


def _info(host: Host) -> messages.HostInfo:
    return messages.HostInfo(
        name=host.name,
        state=host.state,
        number=host.number,
        last_seen=host.last_seen or 0.0,
        detail=host.detail,
        holds=list(host.holds),
        here=host.here,
    )


async def confirm_dead(
    shares: Iterable[Share], call: messages.ConfirmDead, pid: int, uid: int, events: Events
) -> messages.ConfirmedDead:
    """Have the backends of shares take an admin's word; who gave it stands in the log.

    Raises the first refusal if no share has taken it.
    """
    shares = [share for share in shares if call.source in ("", share.source)]
    if not shares:
        where = f"'{call.source}' is not mounted here" if call.source else "nothing is mounted here"
        raise Denied(f"{where}, so no host is known", hint="`lockfs status` lists what is mounted.")
    who = f"process {pid} ({process.command(pid)}) of user {uid}"
    refusals: list[LockfsError] = []
    done: list[tuple[Share, str]] = []
    for share in shares:
        try:
            name = await _confirm(share, call.host)
        except LockfsError as error:
            log.warning(
                "%s says that host %s is dead; not believed for %s: %s", who, call.host, share.source, error.message
            )
            refusals.append(error)
            continue
        log.warning(
            "%s says that host %s is dead (%s): its locks on %s are free now",
            who, name, call.reason or "no reason given", share.source,
        )  # fmt: skip
        reason = f"host {name} is dead, says {who}" + (f": {call.reason}" if call.reason else "")
        events.publish(messages.Event("confirmed-dead", time.time(), mountpoint=share.source, reason=reason))
        done.append((share, name))
    if not done:
        raise refusals[0]
    return messages.ConfirmedDead(done[0][1], [share.source for share, _ in done])


async def _confirm(share: Share, host: str) -> str:
    async def work(_: Job[str]) -> str:
        return await share.backend.confirm_dead(host)

    # It watches the host for as long as a live one needs to show itself, and gives up by itself.
    return await share.storage.finish(share, work)
