"""After a fence nothing that is open of an image can change it, whatever became of the mount daemon."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from harness import logs
from harness.host import Host, without_kernel_module
from t6_guard.fencing import DEAD, REPLACED, SERVING, STOPPED, Scene
from t6_guard.ways import AFTER, BUSY, FORCED, PLAIN, SPLICED, Way

CASES = [("gated", SERVING), ("gated", STOPPED), ("passthrough", SERVING), ("passthrough", STOPPED), ("passthrough", DEAD),
         ("gated", REPLACED), ("passthrough", REPLACED)]  # fmt: skip
"""How data gets to the storage, and how the mount daemon is.  A dead one gets no gated data anywhere."""

LOGGED = [r"lost the lock o[nf] ", r"fenced .*: ", r"does not fence .*: it is killed", r"the daemon of .* is dead"]
REFUSED = {"EIO", "ENOTCONN", "ECONNABORTED"}
"""What a caller gets; the latter two once there is no daemon, from what the kernel leaves to it."""


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    data, how = request.param
    if how == REPLACED:
        request.getfixturevalue("succession")
    ways = [way for way in (*PLAIN, *FORCED, *SPLICED) if not way.needs_kernel_module or not without_kernel_module()]
    base = tmp_path_factory.mktemp("fence")
    storage = base / "storage"
    storage.mkdir()
    host = Host("host-a", tmp_path_factory.mktemp("h"), variables={} if how == REPLACED else {"LOCKFS_RESTARTS": "0"})
    scene = Scene(host.mount(storage, base / "mnt", f"data={data}"), storage, data, how, ways)
    try:
        scene.play(repeating=[*SPLICED, *BUSY])
        yield scene
    finally:
        scene.end()
        complaints = host.close()
    assert not complaints
    expected = logs.Expected(dict.fromkeys(LOGGED, False))
    assert not expected.complaints(logs.alarms(host.log()))


def refused(scene: Scene, way: Way) -> None:
    attempt = scene.attempts[way.name]
    outcome = attempt.act_after()
    assert outcome in (REFUSED if scene.how not in (SERVING, REPLACED) else {"EIO"})
    assert attempt.alive()
    assert scene.results[way.name]["killed"] == []


@pytest.mark.parametrize("way", PLAIN, ids=lambda way: way.name)
def test_an_error_stops_who_can_be_stopped_so(scene: Scene, way: Way) -> None:
    if way.name not in scene.attempts:
        pytest.skip(f"without the kernel module there is no {way.name}")
    refused(scene, way)
    assert scene.attempts[way.name].content() == scene.content[way.name]


@pytest.mark.parametrize("way", FORCED, ids=lambda way: way.name)
def test_who_has_it_mapped_is_killed(scene: Scene, way: Way) -> None:
    attempt = scene.attempts[way.name]
    assert not attempt.alive()
    assert [each["pid"] for each in scene.results[way.name]["killed"]] == [attempt.puppet.pid]
    assert AFTER not in attempt.content()[1]


@pytest.mark.parametrize("way", SPLICED, ids=lambda way: way.name)
def test_who_splices_is_killed_where_no_error_stops_it(scene: Scene, way: Way) -> None:
    attempt = scene.attempts[way.name]
    if scene.data == "gated":
        refused(scene, way)
        return
    assert not attempt.alive()
    assert [each["pid"] for each in scene.results[way.name]["killed"]] == [attempt.puppet.pid]


@pytest.mark.parametrize("way", BUSY, ids=lambda way: way.name)
def test_who_goes_on_gets_one_error_after_the_other(scene: Scene, way: Way) -> None:
    attempt = scene.attempts[way.name]
    before = attempt.puppet.tell("again.outcomes")
    time.sleep(0.05)
    after = attempt.puppet.tell("again.outcomes")
    assert before["ok"] == after["ok"]
    assert sum(after.values()) > sum(before.values())


def test_all_is_told(scene: Scene) -> None:
    for name, result in scene.results.items():
        assert result["fenced"], name
        assert result["problems"] == []
        assert result["daemon_killed"] == (scene.how in (STOPPED, REPLACED))


def test_nothing_reaches_the_storage_later(scene: Scene) -> None:
    os.sync()
    time.sleep(0.1)
    for name, attempt in scene.attempts.items():
        assert attempt.content() == scene.content[name], name


def test_reading_by_name_goes_on_and_writing_waits_for_the_end(scene: Scene) -> None:
    path = scene.mount / scene.attempts["pwrite"].name
    if scene.how not in (SERVING, REPLACED):
        with pytest.raises(OSError):
            path.read_bytes()
        return
    assert path.read_bytes() == scene.attempts["pwrite"].content()[1]
    with pytest.raises(OSError, match="locks"):
        os.open(path, os.O_RDWR)
    scene.attempts["pwrite"].puppet.end()
    deadline = time.monotonic() + 10
    while True:
        try:
            fd = os.open(path, os.O_RDWR)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert os.write(fd, b"again") == 5
    os.close(fd)
    assert scene.attempts["pwrite"].content()[1].startswith(b"again")
