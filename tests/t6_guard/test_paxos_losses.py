"""Who loses an image under a real mount, and what becomes of those who have it open: ``onloss``, and requests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from harness.actor import Actor
from harness.asker import asking
from harness.host import Host
from harness.waiting import wait_until
from lockfs_paxos_lease.format.request import FORCE, GRACEFUL

TAKEOVER = 6.0
LATER = 20.0
OPTIONS = f"backend=paxos-lease,takeover={TAKEOVER:g},wait=0.2"


def spoil_record(storage: Path) -> None:
    """Make the record of host id 1 one that is not its own any more: as if another host had taken its host id."""
    lockspace = storage / ".lockfs" / "leases" / "lockspace"
    with lockspace.open("r+b") as file:
        file.seek(40)
        byte = file.read(1)[0]
        file.seek(40)
        file.write(bytes([byte ^ 0xFF]))


@pytest.mark.parametrize("data", ["auto", "gated"])
def test_who_has_an_image_open_that_is_lost_is_killed_where_that_is_wished(
    host: Host, storage: Path, tmp_path: Path, expect_log, data: str
) -> None:
    expect_log("this host's record was overwritten")
    expect_log("lost the lock o[nf]")
    expect_log("fenced .*: its handles fail; process .* was killed, which had it open: the backend can no longer keep")
    expect_log("cannot join the lockspace|the record of host id 1 is damaged", optional=True)
    (storage / "img").write_text("content")
    (storage / "other").write_text("content")
    mount = host.mount(storage, tmp_path / "mnt", f"{OPTIONS},onloss=kill,data={data}")
    with Actor() as writer, Actor() as reader, Actor() as bystander:
        writer.call("open", mount / "img", os.O_RDWR)
        reader.call("open", mount / "img", os.O_RDONLY)
        bystander.call("open", mount / "other", os.O_RDONLY)
        spoil_record(storage)
        wait_until(lambda: not alive(writer), LATER, "the end of who has it open for writing")
        assert alive(reader)
        assert alive(bystander)
    assert f"process {writer.pid} " in host.log()


def alive(actor: Actor) -> bool:
    """Say whether an actor's process has not ended."""
    return actor.process.poll() is None


async def test_who_is_asked_by_force_is_ended_and_the_image_is_free(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, expect_log
) -> None:
    expect_log("host asker demands .*/img: it is fenced, and who has it open is killed")
    expect_log("lost the lock o[nf]")
    expect_log("fenced .*: its handles fail; process .* was killed")
    (storage / "img").write_text("content")
    (storage / "other").write_text("content")
    mount = host.mount(storage, tmp_path / "a", OPTIONS)
    with Actor() as asked, Actor() as other:
        asked.call("open", mount / "img", os.O_RDWR)
        fd = other.call("open", mount / "other", os.O_RDWR)
        name = f"i-{(storage / 'img').stat().st_ino:x}"
        async with asking(storage / ".lockfs" / "leases", name, FORCE, TAKEOVER):
            with trio.fail_after(LATER):
                while alive(asked):
                    await trio.sleep(0.05)
        other.call("write", fd, "written", 0)
        mount_b = host_b.mount(storage, tmp_path / "b", OPTIONS)
        wait_until(lambda: other.result("open", mount_b / "img", os.O_RDWR) == "ok", LATER, "the image is free")


async def test_who_is_asked_gracefully_goes_on_and_people_are_told(
    host: Host, storage: Path, tmp_path: Path, expect_log
) -> None:
    expect_log("host asker asks that .*/img be given up, which is held here")
    (storage / "img").write_text("content")
    mount = host.mount(storage, tmp_path / "a", OPTIONS)
    with Actor() as asked:
        fd = asked.call("open", mount / "img", os.O_RDWR)
        name = f"i-{(storage / 'img').stat().st_ino:x}"
        async with asking(storage / ".lockfs" / "leases", name, GRACEFUL, TAKEOVER):
            with trio.fail_after(LATER):
                while "host asker asks" not in host.log():
                    await trio.sleep(0.05)
            await trio.sleep(TAKEOVER / 4)
        asked.call("write", fd, "written", 0)
    assert host.log().count("host asker asks") == 1
