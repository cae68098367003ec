"""What a mount promises where the extension was not built, or is switched off; `LOCKFS_KERNEL=off` runs all tests so."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness.actor import Actor
from harness.host import Host
from harness.logs import Expected
from harness.waiting import wait_until
from t6_guard.fencing import fence

SET_ID = stat.S_ISUID | stat.S_ISGID


def test_it_guards_and_says_what_is_missing(make_host: Callable[..., Host], storage: Path, tmp_path: Path, expect_log: Expected) -> None:
    for pattern in ("lost the lock o[nf]", "fenced .*: its handles fail"):
        expect_log(pattern)
    here = make_host("host-a", LOCKFS_KERNEL="off")
    there = make_host("host-b")
    mount = here.mount(storage, tmp_path / "here")
    other = there.mount(storage, tmp_path / "there", "wait=0")
    missing = [line for line in here.log().splitlines() if "switched off" in line]
    assert any("no sparse files, allocation or copies inside the storage" in line for line in missing)
    assert any("all data goes through the mount daemon" in line for line in missing)
    with Actor() as owner, Actor() as rival, Actor() as away:
        fd = owner.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        assert owner.call("write", fd, "content", 0) == 7
        assert rival.result("open", mount / "image", os.O_WRONLY) == "EBUSY"
        assert away.result("open", other / "image", os.O_WRONLY | os.O_TRUNC) == "EBUSY"
        assert away.call("cat", other / "image") == "content"
        (result,) = fence(here, mount / "image").values()
        assert result["fenced"]
        assert (owner.result("write", fd, "x", 0), owner.result("read", fd, 1, 0)) == ("EIO", "EIO")
        owner.result("close", fd)
        wait_until(lambda: not here.locks(), 10, "the image to be free")
        fd = away.call("open", other / "image", os.O_RDWR)
        assert away.call("write", fd, "c", 0) == 1
        away.call("close", fd)
        assert owner.call("cat", mount / "image") == "content"


def test_a_truncation_by_who_does_not_own_a_file_clears_its_set_id_bits(
    make_host: Callable[..., Host], storage: Path, tmp_path: Path
) -> None:
    (storage / "file").write_text("content")
    os.chmod(storage / "file", 0o6777)
    mount = make_host("host-a", LOCKFS_KERNEL="off").mount(storage, tmp_path / "mnt", "suid")
    stranger = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
    # By its working directory: it may not pass those above.
    subprocess.run([*stranger, "sh", "-c", ": > file"], cwd=mount.path, check=True)
    assert (storage / "file").stat().st_size == 0
    assert (storage / "file").stat().st_mode & (SET_ID | 0o777) == 0o777
