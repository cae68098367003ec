"""Processes at the moment they splice into a file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.waiting import wait_until
from t2_linux.kernel_fs.mounted import MiniMount, serving
from t2_linux.puppet import Puppet

from lockfs.linux import splicing


@pytest.fixture
def mini(storage: Path, tmp_path: Path) -> Iterator[MiniMount]:
    (storage / "f").write_bytes(bytes(8192))
    with serving(storage, tmp_path / "mnt") as served:
        yield served


@pytest.fixture
def puppet(mini: MiniMount) -> Iterator[Puppet]:
    with Puppet() as puppet:
        puppet.tell("fd = os.open(path, os.O_RDWR); out, into = os.pipe()", path=str(mini.path / "f"))
        yield puppet


def seen(mini: MiniMount, puppet: Puppet) -> dict[int, set[int]]:
    node = os.stat(mini.source / "f").st_ino
    return splicing.into(os.stat(mini.path).st_dev, {node}, [puppet.pid])


def test_one_that_waits_inside(mini: MiniMount, puppet: Puppet) -> None:
    assert seen(mini, puppet) == {}
    puppet.begin("os.splice(out, fd, 4096, None, 0)")
    wait_until(lambda: seen(mini, puppet), 10, "the splice to be seen")
    assert seen(mini, puppet) == {puppet.pid: {os.stat(mini.source / "f").st_ino}}


def test_one_in_a_thread(mini: MiniMount, puppet: Puppet) -> None:
    puppet.tell("threading.Thread(target=os.splice, args=(out, fd, 4096, None, 0), daemon=True).start()")
    wait_until(lambda: seen(mini, puppet), 10, "the splice to be seen")


@pytest.mark.parametrize("call", ["os.read(out, 1)", "os.splice(out, other, 4096, None, 0)", "time.sleep(100)"])
def test_others(mini: MiniMount, puppet: Puppet, tmp_path: Path, call: str) -> None:
    puppet.tell("other = os.open(name, os.O_RDWR | os.O_CREAT)", name=str(tmp_path / "other"))
    puppet.begin(call)
    time.sleep(0.2)
    assert seen(mini, puppet) == {}


def test_who_has_gone_is_left_out(mini: MiniMount, puppet: Puppet) -> None:
    puppet.end()
    assert seen(mini, puppet) == {}
    assert splicing.run_times([puppet.pid]) == {}


def test_who_runs_and_who_does_not(puppet: Puppet) -> None:
    def ran(how: str) -> int:
        before = splicing.run_times([puppet.pid])[puppet.pid]
        puppet.tell(how)
        return splicing.run_times([puppet.pid])[puppet.pid] - before

    assert ran("until = time.monotonic() + 0.2\nwhile time.monotonic() < until: pass") > 10_000_000
    puppet.tell("pass")
    time.sleep(0.2)  # it has answered, and may be about to wait for the next order only
    before = splicing.run_times([puppet.pid])
    time.sleep(0.2)
    assert splicing.run_times([puppet.pid]) == before
