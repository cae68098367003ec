"""A lockfs mount and a host that has only virtlockd keep each other's virtual machines from one image."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host
from harness.waiting import wait_until
from t8_system.virtlockd import PROGRAM, Client, Refused, client, virtlockd

pytestmark = pytest.mark.skipif(not os.path.exists(PROGRAM), reason="virtlockd is not installed")


@pytest.fixture
def other_host(leaves_nothing: None, tmp_path: Path) -> Iterator[Client]:
    """A virtlockd, with a process that stands for its virtual machine."""
    with (
        subprocess.Popen(["sleep", "infinity"]) as owner,
        virtlockd(tmp_path) as (run_dir, _pid),
        client(run_dir, owner.pid) as made,
    ):
        yield made
        owner.kill()


@pytest.mark.parametrize("mode", ["direct", "indirect"])
def test_both_ways(mode: str, other_host: Client, host: Host, storage: Path, tmp_path: Path) -> None:
    (storage / "img").write_text("image")
    mountpoint, lockspace = tmp_path / "mnt", tmp_path / "lockspace"
    if mode == "direct":
        where, name, options = "", str(storage / "img"), "wait=0.2"
    else:
        other_host.create_lockspace(lockspace)
        name = hashlib.sha256(os.fsencode(mountpoint / "img")).hexdigest()
        where, options = str(lockspace), f"wait=0.2,key=path,lockspace={lockspace}"
    mount = host.mount(storage, mountpoint, options)
    with Actor() as machine:
        other_host.acquire(name, lockspace=where)
        for call in (("open", os.O_RDWR), ("truncate", 0), ("unlink",)):
            assert machine.result(call[0], mount / "img", *call[1:]) == "EBUSY"
        holder = json.loads(machine.call("getxattr", mount / "img", "user.lockfs.holder"))["holders"][0]
        assert holder["command"] == "virtlockd"
        assert "it is held by host host-a, process" in host.log()
        assert machine.call("cat", mount / "img") == "image"
        other_host.release(name, lockspace=where)

        fd = machine.call("open", mount / "img", os.O_RDWR)
        with pytest.raises(Refused):
            other_host.acquire(name, lockspace=where)
        machine.call("close", fd)

        def taken() -> bool:
            try:
                other_host.acquire(name, lockspace=where)
            except Refused:
                return False
            return True

        wait_until(taken, 10, "virtlockd got the image")
        other_host.release(name, lockspace=where)
