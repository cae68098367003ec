"""A mount daemon dies at each of its steps, and right before and after each record of its journal, in each operation.

The call gets what it would have got, and its effect is there once.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import logs, mounts
from harness.host import Host, Mount, MountFailed
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_guard import test_lockd_steps
from t6_survival import test_vault
from t6_survival.successors import PATIENCE, kill, restarts, wait_for_restart
from t6_survival.test_handover_steps import AFTER_HOLDS, BEFORE_CONNECTION, BEFORE_HOLDS

import lockfs
from lockfs import steps

ALL = "LOCKFS_ROUNDS" in os.environ
"""Kill around each record in each operation, which takes minutes; else in one operation, which depends on the data."""
DATA = ("gated", "passthrough")
IN_BOTH = ("create", "truncating open", "close", "rename over")
AROUND = {"gated": "rename over", "passthrough": "create"}
LATER = 0.5
"""Seconds in which a daemon gets to what a call has caused that did not wait for it."""
MOST = 12
"""Records that one operation may write."""
AROUND_RECORDS = ("journal.before-write", "journal.after-write")
IN_MOUNT = ("mount.before-attachment", "mount.after-attachment")
IN_EFFECTS = ("effect.before", "effect.after")
IN_NAMELESS = ("nameless.before", "nameless.after")
IN_OPEN = ("open.before-journal", "open.after-journal")
IN_CLOSE = ("close.before-journal", "close.after-journal")
IN_RESUME = (
    "journal.before-replacement", "journal.after-replacement", "resume.before-registration", "resume.after-registration",
    "resume.before-take-over", "resume.after-take-over", "resume.after-resend",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An operation: what comes before it, itself, and what has to be true after it."""

    name: str
    before: str
    itself: str
    after: str
    steps: tuple[str, ...] = IN_EFFECTS
    data: tuple[str, ...] = DATA
    later: bool = False


OPERATIONS = [
    Operation("create", "", "fd = os.open(p, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)",
              "os.fstat(fd).st_size == 0 and os.pwrite(fd, b'x', 0) == 1 and os.close(fd) is None and os.stat(p).st_mode & 0o777 == 0o640",
              (*IN_EFFECTS, *IN_OPEN)),
    Operation("open", "make(p)", "fd = os.open(p, os.O_RDWR)", "os.pread(fd, 9, 0) == b'content' and os.close(fd) is None", IN_OPEN),
    Operation("truncating open", "make(p)", "fd = os.open(p, os.O_RDWR | os.O_TRUNC)", "os.fstat(fd).st_size == 0 and os.close(fd) is None", IN_OPEN),
    Operation("close", "make(p); fd = os.open(p, os.O_RDWR)", "os.close(fd)", "os.path.exists(p)", IN_CLOSE, later=True),
    Operation("write", "make(p); fd = os.open(p, os.O_RDWR | os.O_APPEND)", "os.write(fd, b'more')",
              "os.pread(fd, 99, 0) == b'contentmore' and os.close(fd) is None", (), ("gated",)),
    Operation("append only", "make(p); subprocess.check_call(['chattr', '+a', s]); fd = os.open(p, os.O_WRONLY | os.O_APPEND)", "os.write(fd, b'more')",
              "open(s, 'rb').read() == b'contentmore' and os.close(fd) is None and subprocess.check_call(['chattr', '-a', s]) == 0", IN_EFFECTS, ("gated",)),
    Operation("truncate", "make(p)", "os.truncate(p, 3)", "open(s, 'rb').read() == b'con'", ()),
    Operation("mkdir", "", "os.mkdir(p, 0o750)", "os.stat(p).st_mode & 0o777 == 0o750 and os.listdir(p) == []"),
    Operation("rmdir", "os.mkdir(p)", "os.rmdir(p)", "not os.path.exists(p)"),
    Operation("symlink", "", "os.symlink('target', p)", "os.readlink(p) == 'target'"),
    Operation("mknod", "", "os.mkfifo(p)", "stat.S_ISFIFO(os.stat(p).st_mode)"),
    Operation("link", "make(p)", "os.link(p, p + '2')", "os.stat(p).st_nlink == 2 and os.path.samefile(p, p + '2')"),
    Operation("unlink", "make(p); os.link(p, p + '2')", "os.unlink(p)", "not os.path.exists(p) and os.stat(p + '2').st_nlink == 1"),
    Operation("rename", "make(p); ino = os.stat(p).st_ino", "os.rename(p, p + '2')", "not os.path.exists(p) and os.stat(p + '2').st_ino == ino"),
    Operation("rename over", "make(p); make(p + '2'); ino = os.stat(p).st_ino", "os.rename(p, p + '2')", "not os.path.exists(p) and os.stat(p + '2').st_ino == ino"),
    Operation("exchange", "make(p); make(p + '2'); inos = os.stat(p).st_ino, os.stat(p + '2').st_ino",
              "checked(libc.renameat2(-100, p.encode(), -100, (p + '2').encode(), 2))", "(os.stat(p + '2').st_ino, os.stat(p).st_ino) == inos"),
    Operation("unlink of what is read", "make(p); fd = os.open(p, os.O_RDONLY)", "os.unlink(p)", "is_nameless(fd)", (*IN_EFFECTS, *IN_NAMELESS), ("gated",)),
    Operation("rename over what is read", "make(p); make(p + '2'); fd = os.open(p + '2', os.O_RDONLY)", "os.rename(p, p + '2')", "is_nameless(fd)",
              (*IN_EFFECTS, *IN_NAMELESS), ("gated",)),
    Operation("rmdir of an open one", "os.mkdir(p); fd = os.open(p, os.O_RDONLY)", "os.rmdir(p)",
              "os.listdir(fd) == [] and stat.S_ISDIR(os.fstat(fd).st_mode) and os.close(fd) is None", (*IN_EFFECTS, *IN_NAMELESS)),
    Operation("close of a nameless one", "make(p); fd = os.open(p, os.O_RDONLY); os.unlink(p)", "os.close(fd)", "is_gone(s)",
              ("nameless.before-forgotten",), ("gated",), later=True),
    Operation("setxattr", "make(p)", "os.setxattr(p, 'user.x', b'1', os.XATTR_CREATE)", "os.getxattr(p, 'user.x') == b'1'"),
    Operation("removexattr", "make(p); os.setxattr(p, 'user.x', b'1')", "os.removexattr(p, 'user.x')", "os.listxattr(p) == []"),
    Operation("list", "os.mkdir(p); [make(f'{p}/{n:04}') for n in range(100)]", "found = os.listdir(p)", "sorted(found) == [f'{n:04}' for n in range(100)]", ()),
]  # fmt: skip
CASES = [
    (data, each) for data in DATA for each in OPERATIONS if data in each.data and (ALL or data == "gated" or each.name in IN_BOTH)
]  # fmt: skip
HELPERS = r"""
import stat, subprocess, time
def make(path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600); os.write(fd, b"content"); os.close(fd)
def is_nameless(fd):
    there = os.pread(fd, 9, 0) == b"content" and os.fstat(fd).st_nlink == 0
    os.close(fd)
    return there
def is_gone(path):
    # Say that no daemon has it open any more, within some seconds.
    end = f"/{os.path.basename(path)} (deleted)"
    def has(pid):
        try:
            return any(os.readlink(f"/proc/{pid}/fd/{fd}").endswith(end) for fd in os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            return False
    until = time.monotonic() + 20
    while any(has(pid) for pid in os.listdir("/proc") if pid.isdecimal()):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
def done(code):
    exec(code, globals())
"""


class Scene:
    """A mount whose daemons heed steps, and a program."""

    def __init__(self, mount: Mount, data: str, puppet: Puppet, directory: Path) -> None:
        self.mount, self.data, self.puppet, self.directory = mount, data, puppet, directory
        self.count = 0

    def arm(self, step: str, passes: int = 0) -> None:
        (self.directory / step).write_text(str(passes) if passes else "")

    def armed(self, step: str) -> bool:
        return (self.directory / step).exists()

    def comes_to(self, step: str) -> bool:
        """Wait for a step that is taken after the call has returned, if it is."""
        try:
            return wait_until(lambda: not self.armed(step), LATER, step)
        except TimeoutError:
            return False

    def perform(self, operation: Operation, step: str, passes: int = 0) -> bool:
        """Perform an operation in which the daemon is to die; return whether it did."""
        self.count += 1
        name = f"file{self.count}"
        self.puppet.tell(operation.before or "None", p=str(self.mount / name), s=str(self.mount.source / name))
        before = restarts(self.mount)
        self.arm(step, passes)
        self.puppet.tell(operation.itself)
        died = not self.armed(step) or (operation.later and self.comes_to(step))
        if died:
            wait_for_restart(self.mount, before)
        else:
            (self.directory / step).unlink()
        assert self.puppet.tell(operation.after), f"{operation.name}, {step} after {passes}"
        return died


@contextmanager
def staged(data: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    base = tmp_path_factory.mktemp("steps")
    for name in ("storage", "steps"):
        (base / name).mkdir()
    variables = {"LOCKFS_STEPS": str(base / "steps"), "LOCKFS_RESTARTS": "1000000"}
    host = Host("host-a", tmp_path_factory.mktemp("h"), variables=variables)
    mount = host.mount(base / "storage", base / "mnt", f"data={data}")
    with Puppet() as puppet:
        puppet.tell(HELPERS)
        yield Scene(mount, data, puppet, base / "steps")
    wait_until(lambda: not host.locks(), PATIENCE, "all images to be free")
    complaints = host.close()
    assert not complaints
    assert not logs.Expected({"did not come up: status -9": False}).complaints(logs.alarms(host.log()))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scene]]:
    """One for each way of data, for all tests: a fixture with parameters would be made anew for each of them."""
    with ExitStack() as stack:
        yield {data: stack.enter_context(staged(data, tmp_path_factory)) for data in DATA}


@pytest.fixture
def scene(request: pytest.FixtureRequest, scenes: dict[str, Scene]) -> Scene:
    return scenes[request.param]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("scene", "operation"), CASES, indirect=["scene"], ids=lambda each: getattr(each, "name", each))
def test_it_dies_in_an_operation(scene: Scene, operation: Operation) -> None:
    for step in operation.steps:
        assert scene.perform(operation, step), f"the daemon did not come to {step}"
    if not ALL and AROUND[scene.data] != operation.name:
        return
    for step in AROUND_RECORDS:
        for passes in range(MOST):
            if not scene.perform(operation, step, passes):
                break
        else:
            raise AssertionError(f"more than {MOST} records")


@pytest.mark.parametrize("scene", DATA if ALL else DATA[1:], indirect=True)
@pytest.mark.parametrize("step", IN_RESUME)
def test_a_successor_dies(scene: Scene, step: str) -> None:
    scene.puppet.tell("make(p); fd = os.open(p, os.O_RDWR)", p=str(scene.mount / f"file-{step}"))
    scene.arm(step)
    before = restarts(scene.mount)
    kill(scene.mount)
    assert scene.puppet.tell("os.fstat(fd).st_size") == 7
    wait_until(lambda: not scene.armed(step), PATIENCE, "the successor to die")
    wait_for_restart(scene.mount, before)
    assert scene.puppet.tell("os.pwrite(fd, b'new', 0)") == 3
    assert scene.puppet.tell("os.close(fd), open(p).read()")[1] == "newtent"


@pytest.mark.parametrize("step", IN_MOUNT)
def test_it_dies_while_it_mounts(
    make_host: Callable[..., Host], storage: Path, tmp_path: Path, step: str, request: pytest.FixtureRequest
) -> None:
    if step != "mount.before-attachment":
        request.getfixturevalue("succession")
    (tmp_path / "steps").mkdir()
    host = make_host("host-a", LOCKFS_STEPS=str(tmp_path / "steps"))
    (tmp_path / "steps" / step).touch()
    if step == "mount.before-attachment":
        with pytest.raises(MountFailed, match="died while it started"):
            host.mount(storage, tmp_path / "mnt")
        assert not mounts.is_mounted(tmp_path / "mnt")
        wait_until(lambda: not (host.run_dir / "mounts").exists() or not list((host.run_dir / "mounts").iterdir()), PATIENCE, "the journal to go")
    mount = host.mount(storage, tmp_path / "mnt")
    assert list((tmp_path / "steps").iterdir()) == []
    (mount / "file").write_text("content")
    assert (storage / "file").read_text() == "content"


def test_each_step_has_a_test_and_is_there() -> None:
    tested = {*IN_MOUNT, *AROUND_RECORDS, *IN_RESUME, *(step for operation in OPERATIONS for step in operation.steps)}
    assert tested == set(steps.MOUNT_DAEMON)
    tested |= {*test_lockd_steps.ACTS, *BEFORE_CONNECTION, *BEFORE_HOLDS, *AFTER_HOLDS, *test_vault.AT}
    assert tested == set(steps.STEPS)
    source = Path(lockfs.__file__).parent
    found = subprocess.run(["grep", "-rhoE", r"\bstep\(\"[^\"]+\"\)", source, "--include=*.py"], capture_output=True, text=True, check=True)
    assert set(re.findall(r'"([^"]+)"', found.stdout)) == set(steps.STEPS)
