"""Fixtures of all layers.

A test fails if it leaves a mount, a process, a descriptor or an undeclared warning behind.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from harness import logs, mounts
from harness.host import Host, Mount, close_all, without_kernel_module
from harness.leaks import Watch

HOSTS = pytest.StashKey[list[Host]]()
EXPECTED = pytest.StashKey[logs.Expected]()


def pytest_configure() -> None:
    """Let programs under test be interrupted, also where a shell started the tests in the background without job control."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless LOCKFS_LONG is set: shorter forms of the same run always."""
    if os.environ.get("LOCKFS_LONG"):
        return
    left_out = [each for each in items if each.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [each for each in items if each not in left_out]


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves a descriptor or a mount behind.  Set up before all other fixtures of a test."""
    watch = Watch(tmp_path_factory.getbasetemp())
    yield
    if complaints := watch.complaints():
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture
def expect_log(leaves_nothing: None) -> logs.Expected:
    """Declare a log record of level WARNING or above: ``expect_log(pattern, optional=False)``.

    It may be in the log of any host of the test.
    """
    return logs.Expected()


@pytest.fixture
def make_host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, expect_log: logs.Expected
) -> Iterator[Callable[..., Host]]:
    """Make hosts: ``make_host(name, **environment)``.  Their mounts and daemons are ended after the test."""
    if os.geteuid() != 0:
        pytest.fail("mounting needs root: run the tests as root", pytrace=False)
    hosts = request.node.stash.setdefault(HOSTS, [])
    request.node.stash[EXPECTED] = expect_log

    def make(name: str = "", **variables: str) -> Host:
        # A short path: the address of a Unix socket holds 107 bytes.
        run_dir = tmp_path_factory.mktemp("h")
        host = Host(name or f"host-{'abcdefgh'[len(hosts) % 8]}", run_dir, variables=variables)
        hosts.append(host)
        return host

    yield make
    if complaints := close_all(hosts, expect_log):
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host."""
    return make_host("host-a")


@pytest.fixture
def host_b(make_host: Callable[..., Host]) -> Host:
    """Another host."""
    return make_host("host-b")


@pytest.fixture(scope="session")
def succession() -> None:
    """For tests of what becomes of a mount daemon that dies: another one needs the kernel module."""
    if without_kernel_module():
        pytest.skip("without the kernel module a mount daemon has no successor")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """An empty directory to be the source of mounts, on a real filesystem."""
    directory = tmp_path / "storage"
    directory.mkdir()
    if mounts.holding(directory).fstype == "tmpfs":
        pytest.fail(f"{directory} is on tmpfs; give pytest a --basetemp on a disk", pytrace=False)
    return directory


@pytest.fixture
def mount(host: Host, storage: Path, tmp_path: Path) -> Mount:
    """The directory `storage`, mounted with default options on `host`."""
    return host.mount(storage, tmp_path / "mnt")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Stop after a layer (a directory) with failures: they explain those that would follow above it."""
    result = yield
    if nextitem and item.session.testsfailed and item.path.parent != nextitem.path.parent:
        item.session.shouldstop = f"{item.path.parent.name} failed, so the layers above it are not run"
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the hosts with each failure; a test that is skipped half-way need not log what it declared."""
    report = yield
    if report.skipped and EXPECTED in item.stash:
        patterns = item.stash[EXPECTED].patterns
        patterns.update(dict.fromkeys([*patterns, "no data=passthrough here"], False))
    if report.failed:
        for each in item.stash.get(HOSTS, []):
            report.sections.append((f"log of {each.name}", each.log()))
    return report
