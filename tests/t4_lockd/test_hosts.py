"""The hosts that lockd tells of, and an admin's word about one; and what a backend hears of a fence."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
from harness.host import Host as Machine
from harness.logs import Expected
from t4_lockd import clients
from t4_lockd.fakes import FakeBackend, Lab

from lockfs.backend import Host
from lockfs.errors import Denied, LockUnavailable
from lockfs.lockd import hosts
from lockfs.lockd.fence import Fencer
from lockfs.lockd.lock import Lock
from lockfs.lockd.share import Share
from lockfs.lockd.target import Target
from lockfs.protocol import messages as m

HERE = Host("this-host", "live", 1.5e9, here=True, number=1)
OTHER = Host("other-host", "failing", number=2, holds=("/mnt/img",))


def word(host: str, source: str = "") -> m.ConfirmDead:
    return m.ConfirmDead(host, source, "the power is off")


async def say(lab: Lab, call: m.ConfirmDead, *shares: Share) -> m.ConfirmedDead:
    return await hosts.confirm_dead(shares or [lab.share], call, os.getpid(), 0, lab.events)


async def test_hosts_are_listed_by_share(lab: Lab, nursery: trio.Nursery) -> None:
    lab.backend.others = [HERE, OTHER]
    empty = lab.make_share("/other", FakeBackend(), nursery)
    listed = await hosts.listed([lab.share, empty], "")
    assert [share.source for share in listed.shares] == ["/srv", "/other"]
    assert listed.shares[0].hosts == [
        m.HostInfo("this-host", "live", 1, 1.5e9, here=True),
        m.HostInfo("other-host", "failing", 2, holds=["/mnt/img"]),
    ]
    assert [share.source for share in (await hosts.listed([lab.share, empty], "/other")).shares] == ["/other"]


async def test_a_share_that_cannot_say_hides_no_other(
    lab: Lab, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = lab.make_share("/silent", FakeBackend(), nursery)

    async def no_answer() -> None:
        raise LockUnavailable("the storage is gone")

    monkeypatch.setattr(silent.backend, "hosts", no_answer)
    listed = await hosts.listed([silent, lab.share], "")
    assert {share.source: share.problem for share in listed.shares} == {"/srv": "", "/silent": "the storage is gone"}


async def test_the_word_of_an_admin_is_taken_and_logged(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.backend.others = [HERE, OTHER]
    with lab.events.watch(lambda: None) as events:
        assert await say(lab, word("other-host")) == m.ConfirmedDead("other-host", ["/srv"])
        event = await anext(events)
    assert lab.backend.calls == ["confirm-dead other-host"]
    assert (event.kind, event.mountpoint) == ("confirmed-dead", "/srv")
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    said = record.getMessage()
    assert f"process {os.getpid()} (" in said
    assert "of user 0 says that host other-host is dead (the power is off): its locks on /srv are free" in said


async def test_a_host_that_only_one_share_knows(lab: Lab, nursery: trio.Nursery) -> None:
    lab.backend.others = [OTHER]
    empty = lab.make_share("/empty", FakeBackend(), nursery)
    assert (await say(lab, word("other-host"), empty, lab.share)).sources == ["/srv"]
    with pytest.raises(Denied, match="there is no host 'other-host'"):
        await say(lab, word("other-host", "/empty"), empty, lab.share)
    with pytest.raises(Denied, match="'/nowhere' is not mounted here"):
        await say(lab, word("other-host", "/nowhere"))


async def test_a_refusal_is_logged_too(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Denied, match="there is no host 'nobody'"):
        await say(lab, word("nobody"))
    assert "says that host nobody is dead; not believed for /srv: there is no host 'nobody'" in caplog.text


async def test_a_backend_hears_when_nobody_can_write_any_more(lab: Lab, nursery: trio.Nursery) -> None:
    """Not before: another host may get the image from that moment on."""
    lock = await lab.acquire("owner")
    assert lock.grant is not None
    fencer = Fencer(nursery, lab.table, lab.events)
    fencer.lose(lab.share, lock.grant)
    # Nobody listens to orders, so the fence is not certain.
    with lab.events.watch(lambda: None) as events:
        async for event in events:
            if event.kind == "fenced":
                break
    await trio.testing.wait_all_tasks_blocked()
    assert not [call for call in lab.backend.calls if call.startswith("fenced")]
    await lab.release("owner")


@pytest.mark.parametrize("drained", [True, False])
async def test_a_backend_hears_of_a_fence_when_what_was_under_way_has_ended(
    lab: Lab, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, drained: bool
) -> None:
    lock = await lab.acquire("owner")
    assert lock.grant is not None
    fencer = Fencer(nursery, lab.table, lab.events)
    fenced = trio.Event()

    async def fence(locks: Iterable[Lock], reason: str, *, loss: bool) -> list[Target]:
        targets = [Target.of(lock, lab.a) for lock in locks]
        for target in targets:
            target.stopped, target.drained = True, drained
        fenced.set()
        return targets

    monkeypatch.setattr(fencer, "fence", fence)
    fencer.lose(lab.share, lock.grant)
    await fenced.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert ("fenced 1" in lab.backend.calls) == drained
    await lab.release("owner")


async def test_over_the_wire(lockd: Machine, storage: Path, expect_log: Expected) -> None:
    async with clients.client(lockd.run_dir) as client:
        assert (await client.call(m.Hosts(), m.HostList))[0].shares == []
        with pytest.raises(Denied, match="nothing is mounted here"):
            await client.call(word("other-host"), m.ConfirmedDead)
    async with clients.mounted(lockd.run_dir, storage) as mounted:
        (share,) = (await mounted.client.call(m.Hosts(), m.HostList))[0].shares
        assert (share.source, [host.name for host in share.hosts]) == (str(storage), ["host-a"])
        with pytest.raises(Denied, match="does not judge whether hosts live"):
            await mounted.client.call(word("other-host"), m.ConfirmedDead)
    expect_log("says that host other-host is dead; not believed")
