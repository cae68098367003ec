"""How leases are named: who is let in, and what is looked at again after a lease was got."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from lockfs_paxos_lease.naming import Naming
from t3_backends.stations import Open, station

from lockfs.backend import Image
from lockfs.errors import LockUnavailable, MountError

NAME = "user.lockfs.lease"


@pytest.fixture
def host(leaves_nothing: None, storage: Path, tmp_path: Path) -> Callable[..., Open]:
    def with_options(**options: str) -> Open:
        return partial(
            station, share=storage, name="paxos-lease", options={"takeover": "6", **options}, run_dirs=tmp_path / "run"
        )

    return with_options


async def test_all_hosts_must_name_leases_alike(host: Callable[..., Open], storage: Path, tmp_path: Path) -> None:
    given, same, other = (tmp_path / name for name in ("given", "same", "other"))
    given.write_text("a one\nb two\n")
    same.write_text("# in another order\nb two\na 'one'\n")
    other.write_text("a one\nb three\n")
    async with host(lease_map=str(given))("host-a"):
        for options, says in (
            ({}, "lease_map: .*, not none"),
            ({"lease_map": str(other)}, "lease_map: "),
            ({"key": "path"}, "leases are named by: key=inode, not key=path"),
            ({"lease_map": str(tmp_path / "missing")}, "No such file"),
            ({"lease_map": str(tmp_path)}, "Is a directory"),
        ):
            with pytest.raises(MountError, match=says):
                async with host(**options)("host-b"):
                    pass
        async with host(lease_map=str(same))("host-b"):
            pass
    rule = storage / ".lockfs" / "naming"
    assert "key=inode" in rule.read_text()
    with pytest.raises(MountError, match=r"remove .*/\.lockfs/naming"):
        async with host()("host-a"):
            pass
    rule.unlink()
    async with host(key="path")("host-a"):
        assert "mountpoint: /mnt/images" in rule.read_text()


@pytest.mark.parametrize(
    ("text", "says"), [("a one\na two\n", "line 2 of the map"), ("a no/name\n", "cannot be the name"), ("a rindex_lease\n", "something else")]
)
async def test_a_map_that_is_wrong_mounts_nothing(host: Callable[..., Open], tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "map").write_text(text)
    with pytest.raises(MountError, match=says):
        async with host(lease_map=str(tmp_path / "map"))("host-a"):
            pass


async def test_a_name_that_changes_while_its_lease_is_got_is_seen(
    host: Callable[..., Open], storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host()("host-a") as a, host()("host-b") as b:
        image = a.image()
        real = Naming.now
        asked: list[str] = []

        def now(self: Naming, image: Image) -> str:
            asked.append(real(self, image))
            if len(asked) == 1:
                os.setxattr(storage / "img", NAME, b"named")
            return asked[-1]

        with monkeypatch.context() as patched:
            patched.setattr(Naming, "now", now)
            grant = await a.acquire()
        # The old lease first, which turned out to be the image's no more.
        assert [asked[0], *asked[-3:]] == [f"i-{image.ino:x}", "named", "named", "named"]
        os.removexattr(storage / "img", NAME)
        await b.release(await b.acquire())
        os.setxattr(storage / "img", NAME, b"named")
        await a.release(grant)
        await b.release(await b.acquire())


async def test_an_attribute_that_is_no_name_refuses(host: Callable[..., Open], storage: Path) -> None:
    async with host()("host-a") as a:
        a.image()
        for bad in b"", b"a/b", b"\xff", b"n" * 48, b"rindex_lease", b"__LIBVIRT__DISKS__":
            os.setxattr(storage / "img", NAME, bad)
            with pytest.raises(LockUnavailable, match=r"user\.lockfs\.lease"):
                await a.acquire()
        os.setxattr(storage / "img", NAME, b"n" * 47)
        await a.release(await a.acquire())
