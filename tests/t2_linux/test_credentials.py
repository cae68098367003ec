"""Acting as another user in one thread."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from lockfs.linux import credentials


def in_thread(action: Callable[[], object]) -> object:
    """Run in a fresh thread: what it becomes, no other thread does."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(action()))
    thread.start()
    thread.join()
    return result[0] if result else None


def status(name: str) -> str:
    with open("/proc/thread-self/status") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith(name + ":"))


def test_a_new_file_belongs_to_whom_the_thread_is(storage: Path) -> None:
    storage.chmod(0o777)

    directory = os.open(storage, os.O_RDONLY)  # others may not come here by the path

    def make() -> None:
        credentials.become(1234, 4321)
        os.mknod("mine", dir_fd=directory)

    in_thread(make)
    os.close(directory)
    made = (storage / "mine").stat()
    assert (made.st_uid, made.st_gid) == (1234, 4321)
    (storage / "root's").touch()
    assert (storage / "root's").stat().st_uid == 0


def test_groups_are_those_of_one_thread() -> None:
    before = os.getgroups()

    def groups() -> str:
        credentials.become(1234, 4321, (7, 8))
        return status("Groups")

    assert in_thread(groups) == "7 8"
    assert os.getgroups() == before


def test_capabilities_go_without_and_stay_with_the_securebit(storage: Path) -> None:
    storage.chmod(0o700)

    def reach(keep: bool) -> bool:
        if keep:
            credentials.keep_capabilities()
        credentials.become(1234, 4321)
        return os.access(storage / "x", os.F_OK) or os.access(storage, os.X_OK, effective_ids=True)

    def write(keep: bool) -> bool:
        reach(keep)
        try:
            (storage / f"by {keep}").touch()
        except PermissionError:
            return False
        return True

    assert in_thread(lambda: write(False)) is False
    assert in_thread(lambda: write(True)) is True


def test_a_dropped_capability_is_gone_in_that_thread_only() -> None:
    def drop() -> int:
        credentials.drop_capability(27)  # CAP_MKNOD
        return int(status("CapEff"), 16)

    dropped = in_thread(drop)
    assert isinstance(dropped, int)
    assert int(status("CapEff"), 16) & ~dropped == 1 << 27
