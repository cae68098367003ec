"""One wrong byte on the real storage: who asks is told where, others go on, it is found, and mended if that is safe.

Every byte is tried in `t1_pure` (`test_lease_corruption` by hosts, `test_lease_check` by the check); this is the whole
way, with a sample of each record.
"""

from __future__ import annotations

import os
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
from lockfs_paxos_lease.cli import mend, places, survey
from t3_backends.stations import Open, Station, station

from lockfs.backend import Busy
from lockfs.errors import LockUnavailable

SECTOR = 512
LEASE, LOCKSPACE = "lease", "lockspace"
REFUSED, UNTOUCHED = "refused", "untouched"
HELD = "held by host-a"
MENDED, LEFT = "mended", "left to a person"

DAMAGE = [
    *((LEASE, offset, REFUSED, LEFT) for offset in (0, 32, 48, 152, 168)),  # the leader record
    *((LEASE, SECTOR + offset, UNTOUCHED, MENDED) for offset in (0, 12)),  # the request record
    *((LEASE, 2 * SECTOR + offset, REFUSED, LEFT) for offset in (16, 48)),  # the block of the owner, host 1
    *((LEASE, 3 * SECTOR + offset, REFUSED, MENDED) for offset in (0, 50)),  # that of who asks, host 2
    *((LEASE, 4 * SECTOR + offset, REFUSED, MENDED) for offset in (40,)),  # that of a host that never was
    *((LOCKSPACE, 2 * SECTOR + offset, UNTOUCHED, MENDED) for offset in (0, 40)),  # a third host's record
]


@pytest.fixture
def host(leaves_nothing: None, storage: Path, tmp_path: Path) -> Open:
    return partial(station, share=storage, name="paxos-lease", options={"takeover": "16"}, run_dirs=tmp_path / "run")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 0x10
        file.seek(offset)
        file.write(bytes([byte]))
        os.fsync(file.fileno())


def look(leases: Path) -> survey.Survey:
    return survey.take(places.areas(places.parse(str(leases))))


def mended(taken: survey.Survey) -> bool:
    """Do what ``lockfs lease repair`` does, but for the wait: nobody is at work on what is damaged."""
    steps = mend.plan(taken)
    done = mend.carry_out(taken, steps, sleep=lambda seconds: None)
    assert [step.why_not for step in steps if not step.why_not] == [""] * len(done)
    return bool(done)


async def outcome(station: Station) -> str:
    """Try to get the image that another host has; say how it went."""
    try:
        await station.acquire()
    except Busy as busy:
        return f"held by {busy.holder.host}"
    except LockUnavailable as error:
        return str(error)
    return "granted"


async def test_a_wrong_byte_is_told_found_and_mended_if_that_is_safe(host: Open, storage: Path) -> None:
    leases = storage / ".lockfs" / "leases"
    async with host("host-a") as a, host("host-b") as b:
        grant = await a.acquire()
        assert await outcome(b) == HELD
        files = {LEASE: leases / f"i-{grant.image.ino:x}.lease", LOCKSPACE: leases / "lockspace"}
        assert look(leases).findings == []
        for where, offset, effect, remedy in DAMAGE:
            what = f"byte {offset} of the {where}"
            flip(files[where], offset)
            taken = look(leases)
            assert taken.findings, what
            assert {area.path for area, _ in taken.findings} == {os.fsencode(files[where])}
            said = await outcome(b)
            if effect == UNTOUCHED:
                assert said == HELD, what
            else:
                assert f"{files[where]} is damaged: at byte {offset // SECTOR * SECTOR} " in said, what
                assert "lockfs lease check" in said
            await b.release(await b.acquire(name="another"))
            assert mended(taken) is (remedy == MENDED), what
            if remedy == LEFT:
                flip(files[where], offset)
            assert look(leases).findings == [], what
            assert await outcome(b) == HELD, what
        await a.release(grant)
        await b.release(await b.acquire())


async def test_a_host_whose_record_is_damaged_fences_and_others_go_on(host: Open, storage: Path) -> None:
    """What it holds is lost for it, and nobody gets it before its time is over."""
    leases = storage / ".lockfs" / "leases"
    async with host("host-a") as a, host("host-b") as b:
        await a.acquire()
        mine = await b.acquire(name="another")
        flip(leases / "lockspace", 40)
        async with aclosing(a.backend.lost()) as losses:  # type: ignore[type-var]
            lost = await anext(losses)
        assert lost.image.relative == b"img"
        assert "damaged" in await outcome(b)
        await b.release(mine)
        await b.release(await b.acquire(name="another"))
