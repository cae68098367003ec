"""The client of a sanlock daemon, with real daemons: two hosts that share files."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.sanlock.client import Client
from lockfs_paxos_lease.sanlock.daemon import Daemon
from lockfs_paxos_lease.sanlock.errors import DaemonGone, SanlockError
from lockfs_paxos_lease.sanlock.link import SOCKET
from lockfs_paxos_lease.sanlock.wire import (
    AcquireFlag,
    Disk,
    HostState,
    Lockspace,
    Rentry,
    Resource,
    ResourceFlag,
    Rindex,
)
from t3_backends import sanlock_daemon

MIB = 1 << 20
MOST = 47
"""Bytes of a name: the daemon (3.8.5) garbles one of 48, without a zero at the end, when it is asked what is held."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two daemons that are in the lockspace ``LS``, as hosts 1 and 2.  Joining takes seconds: all tests share them."""
    shared = tmp_path_factory.mktemp("share")
    with ExitStack() as stack:
        runs = []
        for name in ("alpha", "beta"):
            runs.append(tmp_path_factory.mktemp("s") / "run")
            stack.callback(sanlock_daemon.Daemon(name, runs[-1]).close)

        async def join() -> None:
            first, second = (Daemon(str(run_dir)) for run_dir in runs)
            (shared / "LS").write_bytes(b"")
            os.truncate(shared / "LS", MIB)
            await first.write_lockspace(space(shared), 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.add_lockspace, space(shared, 1), 1)
                nursery.start_soon(second.add_lockspace, space(shared, 2), 1)

        trio.run(join)
        for run_dir in runs:
            (run_dir / "share").symlink_to(shared)
        yield runs[0], runs[1]


@pytest.fixture(scope="module")
def shared(two: tuple[Path, Path]) -> Path:
    return (two[0] / "share").resolve()


@pytest.fixture
def alpha(two: tuple[Path, Path]) -> Daemon:
    return Daemon(str(two[0]))


@pytest.fixture
def beta(two: tuple[Path, Path]) -> Daemon:
    return Daemon(str(two[1]))


@pytest.fixture
async def a(leaves_nothing: None, alpha: Daemon) -> AsyncIterator[Client]:
    client = await Client.register(alpha.directory)
    yield client
    client.close()


@pytest.fixture
async def b(leaves_nothing: None, beta: Daemon) -> AsyncIterator[Client]:
    client = await Client.register(beta.directory)
    yield client
    client.close()


@pytest.fixture
async def lease(request: pytest.FixtureRequest, alpha: Daemon, shared: Path) -> Resource:
    """A fresh lease for each test."""
    path = shared / request.node.name
    path.write_bytes(b"")
    os.truncate(path, MIB)
    # With a name of its own: of the last one the daemon may still be giving back what a closed connection had.
    made = Resource(b"LS", path.name.encode()[-MOST:], Disk(os.fsencode(path)))
    await alpha.write_resource(made)
    return made


def space(shared: Path, host_id: int = 0) -> Lockspace:
    return Lockspace(b"LS", host_id, Disk(os.fsencode(shared / "LS")))


def sharing(lease: Resource) -> Resource:
    return Resource(lease.lockspace, lease.name, lease.disk, flags=ResourceFlag.SHARED)


async def refused(client: Client, lease: Resource, flags: AcquireFlag = AcquireFlag.OWNER_NOWAIT) -> int:
    with pytest.raises(SanlockError) as caught:
        await client.acquire([lease], flags)
    return caught.value.code


async def released(daemon: Daemon, lease: Resource) -> None:
    """Wait until a lease whose connection has ended is free: the daemon gives it back in its own time."""
    with trio.fail_after(10):
        while (await daemon.owners(lease))[1]:
            await trio.sleep(0.05)


async def test_what_the_daemon_says_of_itself(alpha: Daemon, shared: Path) -> None:
    assert await alpha.version() >= 0x03080000
    assert await alpha.name() == b"alpha"
    assert await alpha.ids() == (os.getuid(), os.getgid())
    assert await alpha.lockspaces() == [space(shared, 1)]


async def test_a_lockspace_that_is_made_can_be_read_and_joined(alpha: Daemon, shared: Path) -> None:
    found, io_timeout = await alpha.read_lockspace(Disk(os.fsencode(shared / "LS")))
    assert (found.name, io_timeout) == (b"LS", 1)
    assert await alpha.joined(space(shared, 1)) is True
    assert await alpha.joined(space(shared, 3)) is False
    with pytest.raises(SanlockError) as caught:
        await alpha.add_lockspace(space(shared, 1), 1)
    assert caught.value.code == -17


@pytest.mark.long
async def test_a_host_joins_and_leaves(alpha: Daemon, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(MIB))
    other = Lockspace(b"OTHER", 7, Disk(os.fsencode(tmp_path / "other")))
    await alpha.write_lockspace(other, 1)
    await alpha.add_lockspace(other, 1, wait=False)
    assert await alpha.joined(other) is None
    assert await alpha.joined(other, wait=True) is True
    assert other in await alpha.lockspaces()
    await alpha.remove_lockspace(other, if_unused=True)
    assert await alpha.joined(other) is False


async def test_hosts_and_their_names(alpha: Daemon) -> None:
    states: dict[int, HostState] = {}
    with trio.fail_after(15):
        while states.get(2) is not HostState.LIVE:
            await trio.sleep(0.2)
            try:
                states = {host.host_id: host.state for host in await alpha.hosts(b"LS")}
            except SanlockError as error:
                if error.code != -11:  # it has not looked yet
                    raise
    assert states[1] is HostState.LIVE
    (only,) = await alpha.hosts(b"LS", 2)
    assert (only.host_id, only.generation, only.io_timeout) == (2, 1, 1)
    names = {state.data32: state.words["owner_name"] for state in await alpha.host_status(b"LS")}
    assert names == {1: "alpha", 2: "beta"}


async def test_one_excludes_the_other(a: Client, b: Client, beta: Daemon, lease: Resource) -> None:
    await a.acquire([lease])
    assert await refused(b, lease) == Code.ACQUIRE_ID_LIVE
    record, owners = await beta.owners(lease)
    assert (record.name, [host.host_id for host in owners]) == (lease.name, [1])
    (held,) = await a.inquire()
    assert (held.lockspace, held.name, held.disk, held.lver) == (b"LS", lease.name, lease.disk, 1)
    await a.release([lease])
    assert await a.inquire() == []
    await b.acquire([lease])
    assert (await b.inquire())[0].lver == 2
    await b.release()
    assert (await beta.owners(lease))[1] == []


async def test_sharing_and_converting(a: Client, b: Client, alpha: Daemon, lease: Resource) -> None:
    await a.acquire([sharing(lease)])
    await b.acquire([sharing(lease)])
    assert sorted(host.host_id for host in (await alpha.owners(lease))[1]) == [1, 2]
    assert (await a.inquire())[0].lver is None
    with pytest.raises(SanlockError) as caught:
        await a.convert(lease)
    assert caught.value.code == -11
    await b.release([lease])
    await a.convert(lease)
    assert await refused(b, sharing(lease)) == Code.ACQUIRE_ID_LIVE
    await a.convert(sharing(lease))
    await b.acquire([sharing(lease)])


async def test_one_host_has_it_once(a: Client, alpha: Daemon, lease: Resource) -> None:
    await a.acquire([lease])
    second = await Client.register(alpha.directory)
    assert await refused(second, lease) == -17
    second.close()


async def test_the_end_of_the_connection_gives_the_lease_back(a: Client, beta: Daemon, lease: Resource) -> None:
    await a.acquire([lease])
    a.close()
    await released(beta, lease)


async def test_whoever_has_a_descriptor_keeps_the_lease_and_can_go_on(
    a: Client, b: Client, beta: Daemon, lease: Resource
) -> None:
    await a.acquire([lease])
    kept = os.dup(a.fileno())
    a.close()
    await trio.sleep(0.5)
    assert await refused(b, lease) == Code.ACQUIRE_ID_LIVE
    heir = Client.of(kept)
    os.close(kept)
    assert [held.name for held in await heir.inquire()] == [lease.name]
    await heir.release()
    await b.acquire([lease])
    heir.close()


async def test_a_command_that_is_cancelled_ends_the_connection(
    a: Client, b: Client, alpha: Daemon, lease: Resource
) -> None:
    """Nobody could tell to what the next answer belongs; and whatever it has got is given back."""
    pid = int((Path(alpha.directory) / "sanlock.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.acquire, [lease])
            await trio.testing.wait_all_tasks_blocked()
            assert a.fileno() >= 0
            nursery.cancel_scope.cancel()
        assert a.fileno() == -1
    finally:
        os.kill(pid, signal.SIGCONT)
    with pytest.raises(DaemonGone):
        await a.inquire()
    # The daemon carries the command out, sees that nobody is there any more, and gives the lease back.
    with trio.fail_after(20):
        while True:
            try:
                await b.acquire([lease], AcquireFlag.OWNER_NOWAIT)
            except SanlockError:
                await trio.sleep(0.1)
            else:
                break


async def test_an_index_of_leases(alpha: Daemon, shared: Path) -> None:
    path = shared / "volume"
    path.write_bytes(b"")
    os.truncate(path, 8 * MIB)
    index = Rindex(b"LS", Disk(os.fsencode(path), MIB), max_resources=4)
    await alpha.format_rindex(index)
    offset = await alpha.create(index, b"one")
    assert offset == 3 * MIB
    assert await alpha.lookup(index, Rentry(b"one")) == Rentry(b"one", offset)
    assert (await alpha.read_resource(Disk(index.disk.path, offset))).name == b"one"
    await alpha.delete(index, b"one")
    with pytest.raises(SanlockError) as caught:
        await alpha.lookup(index, Rentry(b"one"))
    assert caught.value.code == -2


async def test_a_refusal_says_what_and_why(alpha: Daemon, shared: Path) -> None:
    path = shared / "nothing"
    path.write_bytes(bytes(MIB))
    with pytest.raises(SanlockError, match="sanlock refuses 'read_resource': there is no lease at that place") as caught:
        await alpha.read_resource(Disk(os.fsencode(path)))
    assert caught.value.code == Code.LEADER_MAGIC


async def test_without_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonGone, match="no sanlock daemon answers in"):
        await Daemon(str(tmp_path)).version()


@pytest.mark.parametrize("answer", [b"", b"\0" * 40, b"short"], ids=["hangs-up", "no-magic", "cut-off"])
async def test_a_daemon_that_makes_no_sense(tmp_path: Path, answer: bytes, nursery: trio.Nursery) -> None:
    with socket.socket(socket.AF_UNIX) as plain:
        plain.bind(str(tmp_path / SOCKET))
        plain.listen()
        plain.setblocking(False)
        listener = trio.socket.from_stdlib_socket(plain)

        async def serve() -> None:
            peer, _ = await listener.accept()
            await peer.recv(32)
            await peer.send(answer)
            peer.close()

        nursery.start_soon(serve)
        with pytest.raises(DaemonGone):
            await Daemon(str(tmp_path)).version()
        await trio.testing.wait_all_tasks_blocked()

