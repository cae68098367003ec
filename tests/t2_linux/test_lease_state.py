"""What a lockd leaves for its successor, and who a host is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lockfs_paxos_lease import identity
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.size import MIB, Geometry
from lockfs_paxos_lease.late import Memory
from lockfs_paxos_lease.place import Space
from lockfs_paxos_lease.state import State, StateFile

BOOT = "a boot"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    made = StateFile(str(tmp_path), b"space")
    assert made.lock()
    yield made
    made.unlock()


def path_of(tmp_path: Path) -> Path:
    return tmp_path / "paxos-lease" / f"{b'space'.hex()}.json"


def test_it_comes_back(file: StateFile, tmp_path: Path) -> None:
    file.save(BOOT, 7, 3, b"name\xff", 5.5)
    said = file.load(BOOT)
    assert said == State(b"space".hex(), BOOT, 7, 3, b"name\xff", 5.5)
    file.save(BOOT, 7, 4, b"name", 5.5)
    assert file.load(BOOT) == State(b"space".hex(), BOOT, 7, 4, b"name", 5.5)
    file.forget()
    assert file.load(BOOT) is None
    file.forget()


def test_leases_are_written_down(file: StateFile, tmp_path: Path) -> None:
    assert file.held() == set()
    file.note("i-1", (7, 100))
    file.note("i-2", (7, 200))
    file.note("i-1", (7, 1))
    assert file.held() == {"i-1", "i-2"}
    assert file.names() == {(7, 1): "i-1", (7, 200): "i-2"}
    file.drop("i-1")
    file.drop("i-1")
    assert file.held() == {"i-2"}
    for damaged in (b"", b"7", b"7 -1", b"7 1 1", b"\xff"):
        (tmp_path / "paxos-lease" / f"{b'space'.hex()}.held" / "i-2").write_bytes(damaged)
        assert file.names() == {}


def test_nothing_is_said_about_another_boot_or_lockspace(file: StateFile, tmp_path: Path) -> None:
    assert file.load(BOOT) is None
    file.save(BOOT, 7, 3, b"name", 5.5)
    assert file.load("another boot") is None
    path_of(tmp_path).rename(path_of(tmp_path).with_name(f"{b'other'.hex()}.json"))
    assert StateFile(str(tmp_path), b"other").load(BOOT) is None


def test_what_is_damaged_says_nothing(file: StateFile, tmp_path: Path) -> None:
    file.save(BOOT, 7, 3, b"name", 5.5)
    good = path_of(tmp_path).read_bytes()
    for damaged in (
        *(good[:length] for length in range(len(good))),
        good.replace(b":7", b":0"), good.replace(b":3", b":-3"), good.replace(b'"version":1', b'"version":2'),
        good.replace(b":7", b":true"), b"\xff" * 50, b"[]",
    ):  # fmt: skip
        path_of(tmp_path).write_bytes(damaged)
        assert file.load(BOOT) is None, damaged


def test_only_one_has_it(file: StateFile, tmp_path: Path) -> None:
    other = StateFile(str(tmp_path), b"space")
    assert not other.lock()
    another = StateFile(str(tmp_path), b"another space")
    assert another.lock()
    another.unlock()
    file.unlock()
    assert other.lock()
    other.unlock()


def test_a_machine_stays_the_same_and_its_hosts_differ() -> None:
    digits = identity.machine_digits("/run/lockfs", "node1")
    assert identity.machine_digits("/run/lockfs", "node1") == digits
    assert identity.machine_digits("/run/elsewhere", "node1") != digits


def test_the_name_has_room_and_is_text_again() -> None:
    digits = identity.machine_digits("/run/lockfs", "node1")
    for host in ("node1", "x" * 100, "ü" * 40, "node\udcff", ""):
        name = identity.name(digits, host)
        assert len(name) <= identity.NAME_BYTES
        assert identity.is_of(name, digits)
        name.decode()
    assert identity.shown(identity.name(digits, "node1")) == "node1"
    assert identity.shown(b"3f2b.of-sanlock") == "3f2b.of-sanlock"
    assert identity.shown(b"evil\x1b[31m\0rest") == "evil\\x1b[31m"
    assert not identity.is_of(b"other.node1", digits)


def test_a_boot_is_known() -> None:
    assert len(identity.boot_id()) == 36


@pytest.mark.parametrize("gone", ["", "the leases", "the boot", "the timing", "the share", "the file"])
def test_a_share_is_known_to_a_successor_while_leases_are_held(
    file: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Otherwise it must look for itself, or tell whoever mounts it that the storage does not answer."""
    space = Space(b"space", Geometry(4096, 8 * MIB), (1, 2, 3))
    timing = Timing.own(16)
    Memory(str(tmp_path), b"/srv/images", "", timing).save(space)
    if gone != "the leases":
        file.note("lease", (7, 1))
    if gone == "the boot":
        monkeypatch.setattr(identity, "boot_id", lambda: "another boot")
    if gone == "the file":
        for path in (tmp_path / "paxos-lease").glob("*.share"):
            path.write_bytes(b'{"boot": 1}')
    source = b"/srv/others" if gone == "the share" else b"/srv/images"
    heir = Memory(str(tmp_path), source, "", Timing.sanlock() if gone == "the timing" else timing)
    assert heir.load() == (None if gone else space)
