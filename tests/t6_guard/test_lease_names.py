"""Leases that somebody has named, under a real mount: by an attribute of the image, or in a map."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, MountFailed

OPTIONS = "backend=paxos-lease,takeover=6,wait=0.2"
NAME = "user.lockfs.lease"


def leases(storage: Path) -> set[str]:
    """Return the names of the leases that there are."""
    return {path.name.removesuffix(".lease") for path in (storage / ".lockfs" / "leases").glob("*.lease")}


def test_the_attribute_of_an_image_names_its_lease(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, expect_log
) -> None:
    expect_log("cannot be the name of a lease", optional=True)
    for name in "one", "same", "other", "bad":
        (storage / name).write_text(name)
    os.setxattr(storage / "one", NAME, b"vm1-disk")
    os.setxattr(storage / "same", NAME, b"vm1-disk")
    os.setxattr(storage / "bad", NAME, b"no/name")
    a, b = host.mount(storage, tmp_path / "a", OPTIONS), host_b.mount(storage, tmp_path / "b", OPTIONS)
    inode = f"i-{(storage / 'other').stat().st_ino:x}"
    with Actor() as one, Actor() as two:
        fd = one.call("open", a / "one", os.O_RDWR)
        assert leases(storage) == {"vm1-disk"}
        # Two images with one name have one lock, also on one host and for one process.
        for image in b / "one", b / "same":
            assert two.result("open", image, os.O_RDWR) == "EBUSY"
        assert one.result("open", a / "same", os.O_RDWR) == "EBUSY"
        assert one.result("open", a / "bad", os.O_RDWR) == "ENOLCK"
        # While it is held it keeps its name, whoever asks.
        for actor, image in (one, a / "one"), (two, b / "one"):
            assert actor.result("setxattr", image, NAME, "another") == "EBUSY"
            assert actor.result("removexattr", image, NAME) == "EBUSY"
        one.call("close", fd)
        two.call("close", two.call("open", b / "same", os.O_RDWR))
        two.call("close", two.call("open", b / "other", os.O_RDWR))
        assert leases(storage) == {"vm1-disk", inode}
        # It is given, changed and taken away through the mount, too.
        two.call("setxattr", b / "other", NAME, "renamed")
        assert two.call("getxattr", b / "other", NAME) == "renamed"
        fd = one.call("open", a / "other", os.O_RDWR)
        assert leases(storage) == {"vm1-disk", inode, "renamed"}
        assert two.result("open", b / "other", os.O_RDWR) == "EBUSY"
        one.call("close", fd)
        for bad in "", "a/b", ".hidden", "n" * 48, "a b":
            assert two.result("setxattr", b / "other", NAME, bad) == "EINVAL"
        two.call("removexattr", b / "other", NAME)
        assert two.result("getxattr", b / "other", NAME) == "ENODATA"
        assert two.result("setxattr", b / "other", "user.lockfs.else", "x") == "EPERM"
        assert NAME not in os.listxattr(a / "one")


def test_a_map_names_leases_and_all_hosts_must_have_the_same(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, expect_log
) -> None:
    (storage / "sub").mkdir()
    for name in "plain", "sub/mapped", "both":
        (storage / name).write_text(name)
    os.setxattr(storage / "both", NAME, b"from-attribute")
    given = tmp_path / "map"
    given.write_text("# images of ours\nsub/mapped vm2-disk\nboth from-map\n")
    a = host.mount(storage, tmp_path / "a", f"{OPTIONS},lease_map={given}")
    with Actor() as one:
        for name in "plain", "sub/mapped", "both":
            one.call("open", a / name, os.O_RDWR)
    assert leases(storage) == {"vm2-disk", "from-attribute", f"i-{(storage / 'plain').stat().st_ino:x}"}
    expect_log("are named in another way than this mount would")
    with pytest.raises(MountFailed, match=r"lease_map: .*, not none"):
        host_b.mount(storage, tmp_path / "b", OPTIONS)
    given.write_text("both from-map\n# in another order\nsub/mapped vm2-disk\n")
    b = host_b.mount(storage, tmp_path / "b", f"{OPTIONS},lease_map={given}")
    with Actor() as one, Actor() as two:
        one.call("open", a / "sub/mapped", os.O_RDWR)
        assert two.result("open", b / "sub/mapped", os.O_RDWR) == "EBUSY"
