"""Fixtures for lockd: a table on a backend in memory, and a real lockd."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from harness.waiting import wait_until
from t4_lockd.fakes import FakeBackend, Lab

from lockfs.linux import closer


@pytest.fixture
async def lab(
    leaves_nothing: None, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Lab]:
    """A table on a backend in memory.  A test must leave no lock and no descriptor.

    A test asks for `autojump_clock` itself: pytest-trio does not find a clock that only a fixture asks for.
    """
    monkeypatch.setattr(closer, "LINGER", 0.01)
    lab = Lab(nursery, FakeBackend())
    try:
        yield lab
    finally:
        for hanging in lab.backend.hang.values():
            hanging.set()
    assert lab.backend.wrong == []
    assert lab.table.locks == {}
    assert lab.backend.granted == {}
    wait_until(lambda: not lab.closer._running, 5, "descriptors are closed")
    assert lab.open_fds() == []
