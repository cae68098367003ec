"""A mount that comes back hands over what it holds: what the table makes of it."""

from __future__ import annotations

import os

import pytest
import trio
from t4_lockd.fakes import DEV, Lab, StorageError
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.backend import Mode
from lockfs.lockd.adoption import AGAIN, Adoption
from lockfs.lockd.claims import Claims
from lockfs.lockd.fence import Fencer
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.share import Mounted
from lockfs.lockd.state import HoldIs, MountIs, State
from lockfs.protocol.errors import HeldError
from lockfs.protocol.messages import HeldBy, HeldImage, Image, ModeName, Mount, Owner


class Return:
    """A lab whose mounts ``a`` and ``b`` come back; each held image 1 exclusively, by owner x, and ``a`` also image 2."""

    def __init__(self, lab: Lab, nursery: trio.Nursery) -> None:
        self.lab = lab
        state = State()
        for name, inodes in (("a", (1, 2)), ("b", (1,))):
            state.apply(MountIs(name, Mount("/srv", f"/mnt/{name}", "ext4", {}, "fake"), 1, 1, (DEV, 1), 1.0))
            for ino in inodes:
                state.apply(HoldIs(name, image(ino), HeldBy(Owner("x", 1), "exclusive", nodes=[ino], since=3.0)))
        self.claims = Claims(state, "this-host")
        lab.table._claims = self.claims
        self.fencer = Fencer(nursery, lab.table, lab.events)
        self.adoption = Adoption(lab.table, self.claims, self.fencer, Recorder(), "this-host")

    def fd(self) -> int:
        fd = os.open("/dev/null", os.O_RDWR)
        self.lab.fds.append(fd)
        return fd

    async def hand_over(self, mounted: Mounted, ino: int = 1, owner: str = "x", mode: ModeName = "exclusive") -> None:
        held = HeldImage(image(ino), [HeldBy(Owner(owner, 1), mode, nodes=[ino])], lock_fd=0, token=7)
        await self.adoption.take_up(mounted, [(held, self.fd(), [])])


def image(ino: int) -> Image:
    return Image(DEV, ino, "img", "/mnt/img")


@pytest.fixture
def back(lab: Lab, nursery: trio.Nursery) -> Return:
    return Return(lab, nursery)


async def test_two_mounts_of_one_owner_take_up_one_lock(autojump_clock: MockClock, lab: Lab, back: Return) -> None:
    await back.hand_over(lab.a)
    await back.hand_over(lab.b)
    assert lab.backend.calls == ["adopt exclusive 1"]
    assert lab.backend.granted[1].token == 7
    back.adoption.finish(lab.a)
    back.adoption.finish(lab.b)
    assert len(back.claims) == 0
    with pytest.raises(HeldError) as caught:
        await lab.acquire("y")
    assert caught.value.holder.since == 3.0
    await lab.release("x")
    await lab.release("x", mounted=lab.b)
    assert lab.backend.calls[-1] == "release 1"


async def test_what_a_mount_does_not_mention_is_free(autojump_clock: MockClock, lab: Lab, back: Return) -> None:
    await back.hand_over(lab.a)
    await back.hand_over(lab.b)
    back.adoption.finish(lab.a)
    await lab.acquire("y", 2)
    await lab.release("y", 2)
    await lab.release("x")
    await lab.release("x", mounted=lab.b)


async def test_until_all_mounts_are_back_nobody_else_gets_it(autojump_clock: MockClock, lab: Lab, back: Return) -> None:
    """Not even after one of them has let go."""
    await back.hand_over(lab.a)
    back.adoption.finish(lab.a)
    await lab.release("x")
    got: list[float] = []

    async def want() -> None:
        await lab.acquire("y")
        got.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(want)
        begin = trio.current_time()
        await trio.sleep(2)
        assert got == []
        back.adoption.finish(lab.b)
    assert got[0] - begin >= 2
    await lab.release("y")


async def test_a_storage_that_cannot_say_is_asked_again(autojump_clock: MockClock, lab: Lab, back: Return) -> None:
    lab.backend.fail[1] = StorageError("it hangs")

    async def recover() -> None:
        await trio.sleep(2.5 * AGAIN)
        del lab.backend.fail[1]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(recover)
        await back.hand_over(lab.a)
    assert lab.backend.calls == ["adopt exclusive 1"] * 4
    back.adoption.finish(lab.a)
    back.adoption.finish(lab.b)
    await lab.release("x")


async def test_while_it_cannot_say_the_image_is_refused_and_the_rest_goes_on(
    autojump_clock: MockClock, lab: Lab, back: Return
) -> None:
    lab.backend.hang[1] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(back.hand_over, lab.a)
        await wait_all_tasks_blocked()
        await back.hand_over(lab.a, 2)
    # The call has been answered, for it took too long; what hangs is claimed still.
    back.adoption.finish(lab.a)
    back.adoption.finish(lab.b)
    assert back.claims.strongest((DEV, 1)) is Mode.EXCLUSIVE
    assert lab.backend.calls == ["adopt exclusive 1", "adopt exclusive 2"]
    lab.backend.hang.pop(1).set()
    await lab.a.adopting.done()
    assert len(back.claims) == 0
    await lab.release("x")
    await lab.release("x", 2)


async def test_two_owners_that_both_say_they_hold_it_are_both_fenced(
    autojump_clock: MockClock, lab: Lab, back: Return
) -> None:
    """It cannot be; if it is all the same, nobody is to write any more."""
    await back.hand_over(lab.a)
    await back.hand_over(lab.b, owner="y")
    back.adoption.finish(lab.a)
    back.adoption.finish(lab.b)
    assert next(iter(lab.table.locks.values())).lost
    await trio.sleep(2)  # the fence
    await lab.release("x")
    await lab.release("y", mounted=lab.b)


async def test_what_is_lost_is_never_given_back(autojump_clock: MockClock, lab: Lab, back: Return) -> None:
    """The backend does not know of it; whoever has it elsewhere must not lose it by us."""
    lab.backend.gone.add(1)
    await back.hand_over(lab.a)
    back.adoption.finish(lab.a)
    back.adoption.finish(lab.b)
    lock = next(iter(lab.table.locks.values()))
    assert (lock.lost, lock.backed) == (True, False)
    await trio.sleep(2)  # the fence
    await lab.release("x")
    assert not [call for call in lab.backend.calls if call.startswith("release")]
    assert lab.backend.calls[-1] == "fenced 1", "nobody can write by it now"
    lab.backend.gone.clear()
    await lab.acquire("y")
    await lab.release("y")
