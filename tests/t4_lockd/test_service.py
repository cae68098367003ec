"""lockd as its clients see it: a real one, over its socket."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from harness import processes
from harness.host import Host
from harness.logs import Expected
from harness.waiting import wait_until
from t4_lockd.clients import FakeMount, bare, client, mounted

from lockfs.errors import MountError
from lockfs.linux import ofd
from lockfs.protocol import messages as m
from lockfs.protocol.client import CALLS
from lockfs.protocol.errors import HeldError, NotHeld, UnknownMount
from lockfs.protocol.varlink import MESSAGE_LIMIT

LOCKD = "io.lockfs.Lockd"


def open_in(lockd: Host) -> set[tuple[int, str]]:
    return set(processes.descriptors(lockd.lockd()).items())


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    with trio.fail_after(10):
        while not await condition():
            await trio.sleep(0.01)


# Mounts ------------------------------------------------------------------------------------------


async def test_a_mount_takes_and_gives_back(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        assert mount.registered.host == "host-a"
        assert mount.registered.excludes
        assert await mount.acquire("x") == []
        with (storage / "img").open("r+b") as file:
            assert ofd.test(file.fileno(), exclusive=True, start=0, length=1) is not None
        (lock,) = await mount.client.locks()
        assert (lock.source, lock.mountpoint, lock.mode, lock.backend) == (str(storage), "/mnt", "exclusive", "fcntl-lockd")
        assert [(owner.command, owner.here) for owner in lock.owners] == [("command-x", True)]
        assert lock.image == mount.image()
        status, _ = await mount.client.call(m.GetStatus(), m.Status)
        assert (status.host, status.locks, status.run_dir) == ("host-a", 1, str(lockd.run_dir))
        assert [(each.mount.source, each.pid, each.locks) for each in status.mounts] == [(str(storage), os.getpid(), 1)]
        await mount.release("x")
        assert await mount.client.locks() == []
        with pytest.raises(NotHeld):
            await mount.release("x")


async def test_two_mounts_of_one_share_on_a_host(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as one, mounted(lockd.run_dir, storage, mountpoint="/mnt2") as two:
        await one.acquire("x")
        with pytest.raises(HeldError) as caught:
            await two.acquire("y")
        assert caught.value.here
        assert caught.value.holder.command == "command-x"
        assert [each.here for each in await two.holders()] == [True]
        # The same owner shares, and gets what the lock lives in, since it may outlive the other mount.
        (kept,) = await two.acquire("x")
        await one.release("x")
        with pytest.raises(HeldError):
            await one.acquire("y")
        with (storage / "img").open("r+b") as file:
            assert ofd.test(kept, exclusive=True, start=0, length=1) is None
            assert ofd.test(file.fileno(), exclusive=True, start=0, length=1) is not None
        await two.release("x")
        os.close(kept)


async def test_two_hosts(lockd: Host, host_b: Host, storage: Path) -> None:
    host_b.run("python", "-P", "-c", "from lockfs.protocol.start import *; ensure_lockd(run_dir())")
    async with mounted(lockd.run_dir, storage) as a, mounted(host_b.run_dir, storage) as b:
        await a.acquire("x")
        with pytest.raises(HeldError) as caught:
            await b.acquire("y", wait=0.1)
        assert not caught.value.here
        assert caught.value.holder.host == "host-a"
        assert caught.value.holder.command == "command-x"
        assert [(each.host, each.here) for each in await b.holders()] == [("host-a", False)]

        async def let_go() -> None:
            await trio.sleep(0.3)
            await a.release("x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_go)
            with trio.fail_after(5):
                await b.acquire("y", wait=5)
        assert [(each.host, each.here) for each in await a.holders()] == [("host-b", False)]
        await b.release("y")
    assert "refused: /mnt/img for host host-b" in host_b.log()
    assert "it is held by host host-a, process" in host_b.log()


async def test_what_a_mount_held_is_free_when_it_is_gone(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage, mountpoint="/mnt2") as stays:
        async with mounted(lockd.run_dir, storage) as goes:
            for number in range(50):
                await goes.acquire("x", f"img{number}")
            await stays.acquire("z", "other")

        async def free() -> bool:
            return len(await stays.client.locks()) == 1

        await eventually(free, "the locks are free")
        await stays.acquire("y", "img7")
        assert sorted(path.name for path in (storage / ".lockfs" / "holders").iterdir()) == sorted(
            f"{stays.image(name).ino:x}.json" for name in ("img7", "other")
        )
    assert "unmounted: /mnt; it leaves 50 locks to release" in lockd.log()


async def test_a_lock_file_is_kept_open_by_the_mount_too(lockd: Host, storage: Path, tmp_path: Path) -> None:
    lockspace = tmp_path / "lockspace"
    lockspace.mkdir()
    async with mounted(lockd.run_dir, storage, lockspace=str(lockspace)) as mount:
        (kept,) = await mount.acquire("x")
        (file,) = lockspace.iterdir()
        assert os.fstat(kept).st_ino == file.stat().st_ino
        assert await mount.acquire("x") == []
        await mount.release("x")
        await mount.release("x")
        assert list(lockspace.iterdir()) == []
        os.close(kept)


async def test_the_ways_of_locking_one_share_must_agree(lockd: Host, storage: Path, tmp_path: Path) -> None:
    async with mounted(lockd.run_dir, storage):
        for backend, options, said in [
            ("nop", {}, "with backend fcntl-lockd, not nop"),
            ("fcntl-lockd", {"lockspace": str(tmp_path)}, "with other values of: lockspace"),
            ("fcntl-lockd", {"key": "path", "cards": "no"}, "with other values of: cards, key"),
        ]:
            with pytest.raises(MountError, match=f"is already mounted on /mnt {said}") as caught:
                async with mounted(lockd.run_dir, storage, backend, "/mnt2", **options):
                    pytest.fail("it came up")
            assert "unmount /mnt first" in caught.value.hint
        async with mounted(lockd.run_dir, storage, mountpoint="/mnt3", wait="7", cards="yes"):
            pass
    # It is another matter when nobody has it mounted.
    async with client(lockd.run_dir) as other:

        async def free() -> bool:
            return not (await other.call(m.GetStatus(), m.Status))[0].mounts

        await eventually(free, "nothing is mounted")
    async with mounted(lockd.run_dir, storage, "nop"):
        pass


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("magic", {}, "unknown backend 'magic'"),
        ("fcntl-lockd", {"cards": "maybe"}, "option cards=maybe: must be one of yes, no"),
        ("fcntl-lockd", {"lockspace": "relative"}, "option lockspace=relative: must be an absolute path"),
        ("fcntl-lockd", {"lockspace": "/nonexistent"}, "cannot open the lockspace /nonexistent"),
    ],
)
async def test_a_mount_that_cannot_be_is_refused_with_the_reason(
    lockd: Host, storage: Path, backend: str, options: dict[str, str], said: str
) -> None:
    before = open_in(lockd)
    with pytest.raises(MountError, match=said) as caught:
        async with mounted(lockd.run_dir, storage, backend, **options):
            pytest.fail("it came up")
    if not said.startswith("option"):
        assert caught.value.hint
    wait_until(lambda: open_in(lockd) <= before, 5, "nothing is left open")


async def test_nop_refuses_nobody(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage, "nop") as mount:
        assert not mount.registered.excludes
        for owner in "xyz":
            await mount.acquire(owner)
        (lock,) = await mount.client.locks()
        assert len(lock.owners) == 3
        for owner in "xyz":
            await mount.release(owner)


# Who may speak for whom --------------------------------------------------------------------------


async def test_a_mount_is_spoken_for_by_its_own_process_only(lockd: Host, storage: Path) -> None:
    code = """
import sys, trio
from lockfs.protocol import messages as m
from lockfs.protocol.client import LockdClient
from lockfs.protocol.errors import UnknownMount

async def main():
    client = await LockdClient.connect(sys.argv[1])
    release = m.Release(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), "exclusive", "x")
    try:
        await client.call(release, m.Released)
    except UnknownMount as error:
        print(error)
    await client.aclose()

trio.run(main)
"""
    async with mounted(lockd.run_dir, storage) as mount:
        await mount.acquire("x")
        image = mount.image()
        arguments = [str(lockd.run_dir), mount.registered.mount_id, str(image.dev), str(image.ino)]
        done = await trio.run_process([sys.executable, "-c", code, *arguments], capture_stdout=True)
        assert b"lockd knows no mount" in done.stdout
        assert len(await mount.client.locks()) == 1
        with pytest.raises(UnknownMount):
            await mount.client.call(m.Release("made-up", 1, 1, "shared", "x"), m.Released)
        await mount.release("x")


def test_another_user_gets_nothing(lockd: Host, expect_log: Expected) -> None:
    expect_log("refused a connection of user 65534")
    lockd.run_dir.chmod(0o711)
    (lockd.run_dir / "lockd.sock").chmod(0o666)
    code = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
s.connect(f"/proc/self/fd/{sys.argv[1]}/lockd.sock")
try:
    s.sendall(b'{"method": "io.lockfs.Lockd.GetStatus"}\\0')
    print(s.recv(100))
except (ConnectionResetError, BrokenPipeError):
    print(b"")
"""
    fd = os.open(lockd.run_dir, os.O_PATH)
    done = subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=[fd], capture_output=True, check=True)
    os.close(fd)
    assert done.stdout == b"b''\n"
    lockd.run_dir.chmod(0o700)


# Callers that hang up ----------------------------------------------------------------------------


async def test_a_caller_that_hangs_up_waits_no_longer(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        await mount.acquire("x")
        with trio.move_on_after(0.2) as scope:
            await mount.acquire("y", wait=60)
        assert scope.cancelled_caught
        await mount.release("x")
        await trio.sleep(0.1)
        assert await mount.client.locks() == []


async def test_whenever_a_call_is_cancelled_it_holds_nothing(lockd: Host, storage: Path) -> None:
    dice = random.Random(7)
    granted = cancelled = 0
    async with mounted(lockd.run_dir, storage) as mount:
        for _ in range(150):
            with trio.move_on_after(dice.random() * 0.004) as scope:
                await mount.acquire("x")
                granted += 1
                with trio.CancelScope(shield=True):
                    await mount.release("x")
            cancelled += scope.cancelled_caught
        assert await mount.client.locks() == []
    assert granted
    assert cancelled


def acquire_call(mount: FakeMount, **more: object) -> dict[str, object]:
    owner = {"key": "x"}
    return {
        "mount_id": mount.registered.mount_id,
        "image": msgspec.to_builtins(mount.image()),
        "mode": "exclusive",
        "owner": owner,
        **more,
    }


async def test_a_caller_that_is_gone_before_the_answer_holds_nothing(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        await mount.acquire("y")
        for _ in range(20):
            with (storage / "img").open("r+b") as file, bare(lockd.run_dir) as connection:
                call = acquire_call(mount, wait=30.0)
                message = msgspec.json.encode({"method": f"{LOCKD}.Acquire", "parameters": call})
                connection.send(message + b"\0", [file.fileno()])
        await mount.release("y")
        await trio.sleep(0.2)
        assert await mount.client.locks() == []
        await mount.acquire("z")
        await mount.release("z")


async def test_releases_have_room_when_acquires_take_up_all(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        await mount.acquire("holder", mode="shared")
        granted = []

        async def wait(number: int) -> None:
            await mount.acquire(f"o{number}", wait=60)
            granted.append(number)
            with trio.CancelScope(shield=True):
                await mount.release(f"o{number}")

        async with trio.open_nursery() as nursery:
            for number in range(CALLS + 10):
                nursery.start_soon(wait, number)
            await trio.sleep(1)
            with trio.fail_after(5):
                await mount.release("holder", mode="shared")
            # They follow one another, and are not 60 s in it.
            with trio.fail_after(40):
                while len(granted) < 20:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert await mount.client.locks() == []


# What cannot be meant ----------------------------------------------------------------------------


def garbage() -> dict[str, tuple[bytes, int]]:
    """Return what is sent, and how many descriptors with it."""
    status = b'{"method": "io.lockfs.Lockd.GetStatus"}\0'
    inspect = b'{"method": "io.lockfs.Lockd.Inspect", "parameters": {"mount_id": "m", "image": {"dev": 1, "ino": 1, '
    inspect += b'"relative": "x", "path": "x"}, "lock_fd": 5}}\0'
    return {
        "no json": (b"\xff\xfe\0", 0),
        "empty": (b"\0", 0),
        "no call": (b"[1]\0", 0),
        "wrong types": (b'{"method": "io.lockfs.Lockd.Release", "parameters": {"mount_id": 7}}\0', 0),
        "missing parameters": (b'{"method": "io.lockfs.Lockd.Register"}\0', 0),
        "no such mode": (
            b'{"method": "io.lockfs.Lockd.Release", "parameters": {"mount_id": "m", "dev": 1, "ino": 1, '
            b'"mode": "mine", "owner": "x"}}\0', 0,
        ),
        "too long": (b"x" * (MESSAGE_LIMIT + 1), 0),
        "deep": (b'{"method": "a.b", "parameters": ' + b"[" * 100_000 + b"\0", 0),
        "too many descriptors": (status, 251),
        "pipelined descriptors": (status + status, 1),
        "a list that ended nowhere": (b'{"method": "io.lockfs.Lockd.ListLocks", "parameters": {"after": "x"}}\0', 0),
        "no method of the service": (b'{"method": "org.varlink.service.GetInterfaceDescription"}\0', 0),
        "a descriptor that did not come": (inspect, 0),
    }  # fmt: skip


@pytest.mark.parametrize("what", garbage())
def test_what_cannot_be_meant_is_refused_and_changes_nothing(lockd: Host, expect_log: Expected, what: str) -> None:
    unknown_mount = what == "a descriptor that did not come"
    if not unknown_mount:
        expect_log(rf"refused a call of process {os.getpid()} and hung up: ")
    before = open_in(lockd)
    data, count = garbage()[what]
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    with bare(lockd.run_dir) as connection:
        connection.send(data, fds)
        reply = connection.receive()
        if unknown_mount:
            assert reply["error"] == "io.lockfs.Lockd.UnknownMount"
        else:
            assert reply["error"] == "org.varlink.service.InvalidParameter"
            assert reply["parameters"]["parameter"]
            assert connection.receive() is None
    for fd in fds:
        os.close(fd)
    wait_until(lambda: open_in(lockd) <= before, 5, "nothing is left open")
    with bare(lockd.run_dir) as connection:
        connection.call(f"{LOCKD}.GetStatus")
        assert connection.receive()["parameters"]["mounts"] == []


async def test_a_descriptor_that_did_not_come_is_missed(lockd: Host, storage: Path, expect_log: Expected) -> None:
    expect_log("descriptor 0 did not come with the call")
    async with mounted(lockd.run_dir, storage) as mount:
        with bare(lockd.run_dir) as connection:
            connection.call(f"{LOCKD}.Acquire", acquire_call(mount))
            assert connection.receive()["error"] == "org.varlink.service.InvalidParameter"
        assert await mount.client.locks() == []


def test_a_message_may_come_in_pieces_and_end_in_the_middle(lockd: Host) -> None:
    with bare(lockd.run_dir) as connection:
        for byte in b'{"method": "io.lockfs.Lockd.GetStatus"}\0':
            connection.send(bytes([byte]))
        assert connection.receive()["parameters"]["host"] == "host-a"
        connection.send(b'{"method": "io.lo')
    with bare(lockd.run_dir) as connection:
        connection.call(f"{LOCKD}.GetStatus")
        assert connection.receive()["parameters"]["host"] == "host-a"


def test_calls_may_be_pipelined(lockd: Host) -> None:
    with bare(lockd.run_dir) as connection:
        connection.send(b'{"method": "io.lockfs.Lockd.GetStatus"}\0' * 50)
        for _ in range(50):
            assert connection.receive()["parameters"]["host"] == "host-a"


def test_who_has_said_all_still_gets_the_answer(lockd: Host) -> None:
    """As ``printf ... | nc -N -U lockd.sock`` does it."""
    with bare(lockd.run_dir) as connection:
        connection.call(f"{LOCKD}.GetStatus")
        connection.socket.shutdown(1)
        assert connection.receive()["parameters"]["host"] == "host-a"
        assert connection.receive() is None


def test_it_describes_itself_to_any_varlink_client(lockd: Host) -> None:
    with bare(lockd.run_dir) as connection:
        connection.call("org.varlink.service.GetInfo")
        info = connection.receive()["parameters"]
        assert info["interfaces"] == ["org.varlink.service", LOCKD]
        connection.call("org.varlink.service.GetInterfaceDescription", {"interface": LOCKD})
        assert "method Acquire(" in connection.receive()["parameters"]["description"]


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("no.such.Thing", {}, {"error": "org.varlink.service.InterfaceNotFound", "parameters": {"interface": "no.such"}}),
        (f"{LOCKD}.Nothing", {}, {"error": "org.varlink.service.MethodNotFound", "parameters": {"method": f"{LOCKD}.Nothing"}}),
        ("org.varlink.service.Nothing", {},
         {"error": "org.varlink.service.MethodNotFound", "parameters": {"method": "org.varlink.service.Nothing"}}),
        ("org.varlink.service.GetInterfaceDescription", {"interface": "no.such"},
         {"error": "org.varlink.service.InterfaceNotFound", "parameters": {"interface": "no.such"}}),
        (f"{LOCKD}.Watch", {}, {"error": "org.varlink.service.ExpectedMore", "parameters": {}}),
    ],
)  # fmt: skip
def test_what_it_does_not_have_is_said_as_varlink_says_it(
    lockd: Host, method: str, parameters: object, error: object
) -> None:
    with bare(lockd.run_dir) as connection:
        connection.call(method, parameters)
        reply = connection.receive()
        assert {"parameters": {}, **reply} == error
        connection.call(f"{LOCKD}.GetStatus")
        assert connection.receive()["parameters"]["host"] == "host-a"


def test_a_call_that_wants_no_answer_gets_none(lockd: Host) -> None:
    with bare(lockd.run_dir) as connection:
        connection.call(f"{LOCKD}.GetStatus", oneway=True)
        connection.call(f"{LOCKD}.ListLocks")
        assert connection.receive()["parameters"] == {"locks": []}


# Watching ----------------------------------------------------------------------------------------


async def test_who_watches_is_told(lockd: Host, storage: Path) -> None:
    told = []
    async with client(lockd.run_dir) as watcher, watcher.watch() as events:
        async with mounted(lockd.run_dir, storage) as mount:
            await mount.acquire("x")
            with pytest.raises(HeldError):
                await mount.acquire("y")
            await mount.release("x")
        with trio.fail_after(5):
            async for event in events:
                told.append(event)
                if event.kind == "unmounted":
                    break
    assert [event.kind for event in told] == ["mounted", "acquired", "refused", "released", "unmounted"]
    assert {event.mountpoint for event in told} == {"/mnt"}
    refused = told[2]
    assert refused.image == "/mnt/img"
    assert refused.holder
    assert refused.owner
    assert (refused.holder.command, refused.owner.command) == ("command-x", "command-y")


async def test_who_does_not_read_is_dropped_and_holds_up_nobody(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage, "nop") as mount:
        with bare(lockd.run_dir) as sleepy:
            sleepy.call(f"{LOCKD}.Watch", more=True)
            assert sleepy.receive()["parameters"]["kind"] == "watching"
            with trio.fail_after(60):
                while "watches too slowly and is dropped" not in lockd.log():
                    for _ in range(50):
                        await mount.acquire("x")
                        await mount.release("x")
            # What was under way can still be read, then it ends.
            seen = 0
            while sleepy.receive() is not None:
                seen += 1
            assert seen > 100
        await mount.acquire("x")
        await mount.release("x")
