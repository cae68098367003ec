"""Fixtures for backends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from harness.lockless import Lockless
from t3_backends.stations import Open, Station, station


@pytest.fixture
def lockspace(tmp_path: Path) -> Path:
    """A directory for lock files, which the hosts share too."""
    directory = tmp_path / "lockspace"
    directory.mkdir()
    return directory


@pytest.fixture(params=["direct", "lockspace", "lockspace-inode", "paxos-lease"])
def way(request: pytest.FixtureRequest) -> str:
    """A backend that excludes, and how it is used."""
    return str(request.param)


@pytest.fixture
def open_host(way: str, storage: Path, lockspace: Path, tmp_path: Path) -> Open:
    """Start hosts on one share, with each way of each backend."""
    if way == "paxos-lease":
        return partial(station, share=storage, name=way, options={"takeover": "8"}, run_dirs=tmp_path / "run")
    options = {
        "direct": {},
        "lockspace": {"lockspace": str(lockspace), "key": "path"},
        "lockspace-inode": {"lockspace": str(lockspace), "key": "inode"},
    }[way]
    return partial(station, share=storage, name="fcntl-lockd", options=options)


@pytest.fixture
async def a(leaves_nothing: None, open_host: Open) -> AsyncIterator[Station]:
    """A host."""
    async with open_host("host-a") as made:
        yield made


@pytest.fixture
async def b(leaves_nothing: None, open_host: Open) -> AsyncIterator[Station]:
    """Another host."""
    async with open_host("host-b") as made:
        yield made


@pytest.fixture
def lockless_fs(leaves_nothing: None, tmp_path: Path) -> Iterator[Callable[[int, str], Lockless]]:
    """Mount a filesystem whose locks fail."""
    made: list[Lockless] = []

    def make(error: int, where: str) -> Lockless:
        made.append(Lockless(tmp_path / "lockless", error, where))
        return made[-1]

    yield make
    for each in made:
        each.close()
