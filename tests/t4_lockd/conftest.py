"""Fixtures for lockd: a table on a backend in memory, and a real lockd."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from harness import processes
from harness.host import Host
from harness.waiting import wait_until
from t4_lockd.fakes import FakeBackend, Lab

from lockfs.linux import closer
from lockfs.protocol.start import ensure_lockd


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


@pytest.fixture
def environment(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Make this process a part of the host: a lockd that it starts is that host's."""
    for name, value in host.environment.items():
        if name.startswith(("LOCKFS_", "PYTHON")):
            monkeypatch.setenv(name, value)
    return host


@pytest.fixture
def lockd(environment: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose lockd runs, and does not leave while a test takes its time."""
    monkeypatch.setenv("LOCKFS_IDLE_EXIT", "60")
    ensure_lockd(str(environment.run_dir))
    # It says that it is ready just before it closes the pipe; tests compare what it has open.
    wait_until(lambda: "pipe:" not in str(processes.descriptors(environment.lockd())), 5, "the pipe is closed")
    return environment
