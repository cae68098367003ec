"""The table of who gets what, row by row: image free, held by the same owner, held by another, here or on another host."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, Mount

READ, WRITE, READ_WRITE = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
CONTENT = "content of the image"
MODE, UID, GID = 0o640, 1000, 1000

SAME, HERE, HERE_OTHER_MOUNT, ELSEWHERE, FREE = "same owner", "here", "here, other mount", "elsewhere", "free"
OTHERS = (HERE, HERE_OTHER_MOUNT, ELSEWHERE)


@dataclass
class Scene:
    """Storage with an image, mounted twice on host A and once on host B."""

    storage: Path
    a: Mount
    a2: Mount
    b: Mount
    host_a: Host
    host_b: Host


@pytest.fixture(scope="module", params=["gated", "passthrough"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Shared by the rows of the table, which put back what they change."""
    base = tmp_path_factory.mktemp("scene")
    storage = base / "storage"
    storage.mkdir()
    hosts = [Host(name, tmp_path_factory.mktemp("h")) for name in ("host-a", "host-b")]
    options = f"wait=0.05,data={request.param}"
    try:
        yield Scene(
            storage,
            hosts[0].mount(storage, base / "a", options),
            hosts[0].mount(storage, base / "a2", options),
            hosts[1].mount(storage, base / "b", options),
            hosts[0],
            hosts[1],
        )
    finally:
        complaints = [complaint for host in hosts for complaint in host.close()]
    assert not complaints


@pytest.fixture
def image(scene: Scene) -> Iterator[str]:
    path = scene.storage / "image"
    path.write_text(CONTENT)
    path.chmod(MODE)
    os.chown(path, UID, GID)
    (scene.storage / "other").write_text("another file")
    yield "image"
    for each in scene.storage.iterdir():
        if each.is_file():
            each.unlink()


@pytest.fixture
def actor() -> Iterator[Actor]:
    with Actor() as each:
        yield each


@pytest.fixture
def other() -> Iterator[Actor]:
    with Actor() as each:
        yield each


Action = Callable[[Actor, Path], str]


def opens(flags: int) -> Action:
    return lambda who, image: who.result("open", image, flags)


ACTIONS: dict[str, Action] = {
    "open read-only": opens(READ),
    "open for write": opens(WRITE),
    "open for read and write": opens(READ_WRITE),
    "open to append": opens(WRITE | os.O_APPEND),
    "open and truncate": opens(WRITE | os.O_TRUNC),
    "open read-only and truncate": opens(READ | os.O_TRUNC),
    "open or create": opens(READ_WRITE | os.O_CREAT),
    "open or create, and truncate": opens(READ_WRITE | os.O_CREAT | os.O_TRUNC),
    "open synchronously": opens(READ_WRITE | os.O_SYNC),
    "open for direct I/O": opens(READ_WRITE | os.O_DIRECT),
    "truncate by path": lambda who, image: who.result("truncate", image, 0),
    "unlink": lambda who, image: who.result("unlink", image),
    "rename away": lambda who, image: who.result("rename", image, image.parent / "new name"),
    "be replaced": lambda who, image: who.result("rename", image.parent / "other", image),
    "exchange": lambda who, image: who.result("renameat2", image.parent / "other", image, 2),
    "exchange back": lambda who, image: who.result("renameat2", image, image.parent / "other", 2),
    "link": lambda who, image: who.result("link", image, image.parent / "second name"),
    "utimes": lambda who, image: who.result("utime", image),
    "user xattr": lambda who, image: who.result("setxattr", image, "user.note", "x"),
    "chmod": lambda who, image: who.result("chmod", image, 0o600),
    "chown": lambda who, image: who.result("chown", image, 0, 0),
    "chmod to the same": lambda who, image: who.result("chmod", image, MODE),
    "chown to the same": lambda who, image: who.result("chown", image, UID, GID),
    "security xattr": lambda who, image: who.result("setxattr", image, "security.lockfs-test", "x"),
    "read": lambda who, image: who.result("cat", image),
    "holder": lambda who, image: who.result("getxattr", image, "user.lockfs.holder"),
}

WRITERS = {
    "open for write", "open for read and write", "open to append", "open and truncate", "open read-only and truncate",
    "open or create", "open or create, and truncate", "open synchronously", "open for direct I/O", "truncate by path", "unlink",
    "rename away", "be replaced", "exchange", "exchange back",
}  # fmt: skip
OWNERSHIP = {"chmod", "chown", "security xattr"}


def expected(action: str, held: str) -> str:
    if action in WRITERS and held in OTHERS:
        return "EBUSY"
    if action in OWNERSHIP and held == ELSEWHERE:
        return "EBUSY"
    return "ok"


@pytest.mark.parametrize("held", [FREE, SAME, *OTHERS])
@pytest.mark.parametrize("action", ACTIONS)
def test_the_table(scene: Scene, image: str, actor: Actor, other: Actor, action: str, held: str) -> None:
    place = {SAME: scene.a, HERE: scene.a, HERE_OTHER_MOUNT: scene.a2, ELSEWHERE: scene.b}.get(held)
    if place is not None:
        (actor if held == SAME else other).call("open", place / image, READ_WRITE)
    before = scene.storage / image
    status = before.stat()
    assert ACTIONS[action](actor, scene.a / image) == expected(action, held)
    if expected(action, held) == "EBUSY":
        now = before.stat()
        assert before.read_text() == CONTENT
        assert (now.st_ino, now.st_mode, now.st_uid, now.st_gid) == (status.st_ino, MODE | 0o100000, UID, GID)
        assert (scene.storage / "other").read_text() == "another file"


@pytest.mark.parametrize("action", sorted(WRITERS))
def test_a_call_leaves_no_lock_behind(scene: Scene, image: str, actor: Actor, other: Actor, action: str) -> None:
    """Whatever one owner did, and closed, the next one may do on another host."""
    assert ACTIONS[action](actor, scene.a / image) == "ok"
    actor.end()
    for name in ("image", "other", "new name"):
        if (scene.storage / name).exists():
            assert other.result("open", scene.b / name, READ_WRITE) == "ok"


def test_create_takes_the_lock(scene: Scene, image: str, actor: Actor, other: Actor) -> None:
    fd = actor.call("open", scene.a / "new", READ_WRITE | os.O_CREAT | os.O_EXCL)
    assert other.result("open", scene.b / "new", READ_WRITE) == "EBUSY"
    actor.call("close", fd)
    assert other.result("open", scene.b / "new", READ_WRITE) == "ok"


def test_an_owner_counts_its_handles(scene: Scene, image: str, actor: Actor, other: Actor) -> None:
    first = actor.call("open", scene.a / image, READ_WRITE)
    second = actor.call("open", scene.a2 / image, WRITE)
    actor.call("close", first)
    assert other.result("open", scene.b / image, WRITE) == "EBUSY"
    actor.call("close", second)
    assert other.result("open", scene.b / image, WRITE) == "ok"


def test_a_hard_link_is_the_same_image(scene: Scene, image: str, actor: Actor, other: Actor) -> None:
    actor.call("link", scene.a / image, scene.a / "second")
    actor.call("open", scene.a / image, WRITE)
    for mount in (scene.a, scene.a2, scene.b):
        assert other.result("open", mount / "second", WRITE) == "EBUSY"


def test_a_rename_by_the_owner_keeps_the_lock(scene: Scene, image: str, actor: Actor, other: Actor) -> None:
    actor.call("open", scene.a / image, WRITE)
    actor.call("rename", scene.a / image, scene.a / "renamed")
    assert other.result("open", scene.b / "renamed", WRITE) == "EBUSY"
    assert other.result("unlink", scene.b / "renamed") == "EBUSY"


def test_an_unlinked_image_stays_with_its_owner(scene: Scene, image: str, actor: Actor, other: Actor) -> None:
    fd = actor.call("open", scene.a / image, READ_WRITE)
    actor.call("unlink", scene.a / image)
    actor.call("write", fd, "after", 0)
    assert actor.call("read", fd, 5, 0) == "after"
    new = other.call("open", scene.b / image, READ_WRITE | os.O_CREAT)
    other.call("write", new, "fresh", 0)
    assert actor.call("read", fd, 5, 0) == "after"


def test_a_child_writes_through_what_it_inherited_but_opens_as_itself(scene: Scene, image: str, actor: Actor) -> None:
    fd = actor.call("open", scene.a / image, READ_WRITE)
    assert actor.call("fork_and", "write", fd, "child", 0) == 0
    assert actor.call("fork_and", "open", str(scene.a / image), WRITE) == errno.EBUSY


def test_a_killed_owner_frees_its_image_at_once(scene: Scene, image: str, other: Actor) -> None:
    victim = Actor()
    victim.call("open", scene.a / image, READ_WRITE)
    assert other.result("open", scene.b / image, WRITE) == "EBUSY"
    victim.kill()
    deadline = time.monotonic() + 5
    while other.result("open", scene.b / image, WRITE) == "EBUSY":
        assert time.monotonic() < deadline
