"""A mount whose daemon died with lockd is seen off once, whoever notices first that it is dead."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from t4_lockd.fakes import DEV, Lab
from t4_lockd.test_adoption import Return
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.lockd.claims import Claim
from lockfs.lockd.lock import Lock
from lockfs.lockd.orphans import Orphans
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.share import Mounted


class Places:
    """No other mount is there; burying one takes until `may_end`."""

    def __init__(self) -> None:
        self.buried: list[str] = []
        self.back: set[str] = set()
        self.may_end = trio.Event()

    def is_back(self, mount_id: str) -> bool:
        return mount_id in self.back

    def serves(self, dev: int) -> bool:
        return False

    def ghost(self, claim: Claim) -> Mounted | None:
        return None

    async def free(self, ghost: Mounted, locks: Sequence[Lock]) -> None:
        raise AssertionError("there is none")

    def is_kept(self, mount_id: str) -> bool:
        return False

    async def revive(self, claim: Claim) -> bool:
        return False

    async def bury(self, claim: Claim) -> None:
        self.buried.append(claim.mount_id)
        await self.may_end.wait()


async def test_two_who_notice_that_a_mount_is_dead(autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery) -> None:
    back, places = Return(lab, nursery), Places()
    orphans = Orphans(nursery, lab.table, back.claims, back.adoption, Recorder(), places)
    claim = next(each for each in back.claims.all() if each.mount_id == "a")
    ended: list[int] = []

    async def notice(number: int) -> None:
        await orphans.see_off(claim)
        ended.append(number)

    async with trio.open_nursery() as both:
        both.start_soon(notice, 1)
        await wait_all_tasks_blocked()
        both.start_soon(notice, 2)
        await wait_all_tasks_blocked()
        assert ended == []
        places.may_end.set()
    assert places.buried == ["a"]
    assert sorted(ended) == [1, 2]
    assert [each.mount_id for each in back.claims.all()] == ["b"]
    assert back.claims.holders((DEV, 2)) == []


async def test_one_that_came_back_and_died_again(autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery) -> None:
    back, places = Return(lab, nursery), Places()
    orphans = Orphans(nursery, lab.table, back.claims, back.adoption, Recorder(), places)
    claim = next(each for each in back.claims.all() if each.mount_id == "a")
    places.may_end.set()
    places.back.add("a")
    await orphans.see_off(claim)
    assert places.buried == []
    assert len(back.claims) == 2
    places.back.clear()
    await orphans.see_off(claim)
    assert places.buried == ["a"]
    assert len(back.claims) == 1
