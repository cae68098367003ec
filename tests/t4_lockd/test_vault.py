"""What lockd gives to the vault the next one finds there, however much, and whatever happened to the vault meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from harness import processes
from harness.host import Host
from harness.waiting import wait_until

import lockfs
from lockfs.lockd.vault import Vault
from lockfs.protocol import start
from lockfs.protocol.wire import close_all
from lockfs.vault import starter, wire
from lockfs.vault.wire import Item

HOLDER = [sys.executable, "-S", "-E", "-c", "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"]
MANY = 3000
"""More than the buffer of a socket holds."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "run"
    directory.mkdir()
    yield directory
    host = Host("vault", directory)
    assert processes.wait_until_gone(host.processes(), 10) == []


@pytest.fixture
def fd() -> Iterator[int]:
    read, write = os.pipe()
    os.close(write)
    yield read
    os.close(read)


@asynccontextmanager
async def lockd(run_dir: Path, everything: Callable[[], list[tuple[str, list[int]]]] = list) -> AsyncIterator[Vault]:
    """A lockd's part, which is killed in the end."""
    vault = Vault(str(run_dir))
    await vault.open()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vault.keep, everything)
            await vault.begun()
            yield vault
            nursery.cancel_scope.cancel()
    finally:
        vault.close()
        for fds in vault.inherited.values():
            close_all(fds)


def of(run_dir: Path) -> int:
    return Host("vault", run_dir).vault()


async def test_the_next_one_finds_all_that_was_put_and_not_dropped(run_dir: Path, fd: int) -> None:
    async with lockd(run_dir) as vault:
        assert vault.inherited == {}
        for number in range(MANY):
            vault.put(wire.lock_key(1, number), [fd] * (number % 4))
        vault.drop(wire.lock_key(1, 5))
        vault.put(wire.lock_key(1, 6), [fd])
        await vault.flushed()
    async with lockd(run_dir) as vault:
        expected = {wire.lock_key(1, number): number % 4 for number in range(MANY)} | {wire.lock_key(1, 6): 1}
        del expected[wire.lock_key(1, 5)]
        assert {key: len(fds) for key, fds in vault.inherited.items()} == expected
        assert os.path.sameopenfile(vault.inherited[wire.lock_key(1, 6)][0], fd)
        info = (run_dir / wire.SOCKET).stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o600, os.geteuid())
        await vault.end()


async def test_one_that_is_slow_gets_all_in_its_order(run_dir: Path, fd: int) -> None:
    """What is said waits, and who says it does not."""
    async with lockd(run_dir) as vault:
        pid = of(run_dir)
        os.kill(pid, signal.SIGSTOP)
        for number in range(MANY):
            vault.put(wire.lock_key(1, number), [fd])
            if number % 2:
                vault.drop(wire.lock_key(1, number))
        with trio.move_on_after(0.1) as scope:
            await vault.flushed()
        assert scope.cancelled_caught
        os.kill(pid, signal.SIGCONT)
        await vault.flushed()
    async with lockd(run_dir) as vault:
        assert set(vault.inherited) == {wire.lock_key(1, number) for number in range(0, MANY, 2)}
        await vault.end()


@pytest.mark.parametrize("answered", [True, False], ids=["an answer unread", "an answer to come"])
async def test_the_last_words_of_one_that_dies_are_heard(run_dir: Path, fd: int, answered: bool) -> None:
    """A socket that is closed with something unread in it makes the other side get an error before what was sent."""
    async with lockd(run_dir) as vault:
        vault.put(wire.mount_key("a"), [fd])
        await vault.flushed()
    pid = of(run_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(10)
        with start.short_path(str(run_dir), wire.SOCKET) as address:
            sock.connect(address)
        alive = wire.encode([Item(wire.ALIVE)])
        wire.send(sock, alive, [])
        sock.recvmsg(100)
        if answered:
            wire.send(sock, alive, [])
            assert await trio.to_thread.run_sync(sock.recv, 1, socket.MSG_PEEK)
        os.kill(pid, signal.SIGSTOP)
        if not answered:
            wire.send(sock, alive, [])
        wire.send(sock, wire.encode([Item(wire.PUT, 1, wire.lock_key(1, 1))]), [fd])
    os.kill(pid, signal.SIGCONT)
    async with lockd(run_dir) as vault:
        assert set(vault.inherited) == {wire.mount_key("a"), wire.lock_key(1, 1)}
        assert of(run_dir) == pid
        await vault.end()


async def test_one_that_dies_is_replaced_and_filled(run_dir: Path, fd: int) -> None:
    everything = [(wire.lock_key(1, number), [fd]) for number in range(10)]
    async with lockd(run_dir, lambda: everything) as vault:
        before = of(run_dir)
        os.kill(before, signal.SIGKILL)
        host = Host("vault", run_dir)
        await trio.to_thread.run_sync(wait_until, lambda: set(host.processes()) - {before}, 10, "another one")
        with trio.fail_after(10):
            while len(processes.descriptors(of(run_dir))) < 10:
                await trio.sleep(0.01)
    async with lockd(run_dir) as vault:
        assert set(vault.inherited) == {key for key, _ in everything}
        await vault.end()


async def test_one_of_another_version_is_replaced(run_dir: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lockd(run_dir) as vault:
        vault.put(wire.mount_key("a"), [fd, fd])
        vault.put(wire.whole_key("a"), [])
        before = of(run_dir)
    monkeypatch.setattr(lockfs, "__version__", "0.0.0")
    async with lockd(run_dir) as vault:
        assert processes.wait_until_gone([before], 10) == []
        assert {key: len(fds) for key, fds in vault.inherited.items()} == {"mount/a": 2, "whole/a": 0}
    monkeypatch.undo()
    async with lockd(run_dir) as vault:
        assert vault.is_whole("a")
        vault.forget("a")
        assert vault.inherited == {}
        await vault.end()


def test_who_starts_lockd_is_ended_only_if_that_takes_too_long_at_a_stretch(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "STUCK", 0.3)
    mine = starter.Starter()
    mine.recipe = starter.Recipe(["/bin/true"], {}, str(run_dir), start.SOCKET, start.START_LOCK, start.LOCKD_LOCK)

    def look_for(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and other.poll() is None:
            mine.look()
            time.sleep(0.01)

    (run_dir / start.START_LOCK).touch()
    with subprocess.Popen([*HOLDER, run_dir / start.START_LOCK], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "\n"
        for _ in range(3):
            look_for(0.2)
            mine.serves()  # the one that it has started
            mine.gone()
        assert other.poll() is None
        look_for(10)
        assert other.wait(10) == -signal.SIGKILL
    assert mine.tries == 0


async def test_one_without_mounts_leaves_soon_after_lockd(run_dir: Path, fd: int) -> None:
    async with lockd(run_dir) as vault:
        vault.put(wire.lock_key(1, 1), [fd])
        pid = of(run_dir)
    assert await trio.to_thread.run_sync(processes.wait_until_gone, [pid], 10) == []


async def test_what_cannot_be_understood_ends_the_connection(run_dir: Path, fd: int) -> None:
    async with lockd(run_dir) as vault:
        vault.put(wire.lock_key(1, 1), [fd])
    for message in (b"nonsense", wire.encode([Item(wire.PUT, 7, "lock/1/2")]), wire.encode([Item("unheard-of")])):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(str(run_dir / wire.SOCKET))
            stranger.send(message)
            assert stranger.recv(100) == b""
    async with lockd(run_dir) as vault:
        assert set(vault.inherited) == {wire.lock_key(1, 1)}
        await vault.end()
    assert "said what cannot be understood" in Host("vault", run_dir).log()
