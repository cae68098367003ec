"""The backend that grants everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from t3_backends.stations import Station, station

from lockfs.backend import Mode


@pytest.fixture
async def a(leaves_nothing: None, storage: Path) -> AsyncIterator[Station]:
    async with station("host-a", storage, "nop", {}) as made:
        yield made


async def test_all_get_everything(a: Station, storage: Path) -> None:
    async with station("host-b", storage, "nop", {}) as b:
        grants = [await host.acquire(mode) for host in (a, b) for mode in Mode]
        assert [grant.mode for grant in grants] == [*Mode, *Mode]
        assert await b.holder_seen() is None
        for grant in grants:
            await a.backend.convert(grant, Mode.EXCLUSIVE, a.holder(Mode.EXCLUSIVE))
            assert grant.mode is Mode.EXCLUSIVE
            await a.release(grant)


async def test_it_says_that_it_excludes_nobody_and_leaves_nothing(a: Station, storage: Path) -> None:
    assert a.backend.excludes is False
    assert list(await a.backend.hosts()) == []
    assert list(storage.iterdir()) == []
