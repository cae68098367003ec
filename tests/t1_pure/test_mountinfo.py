"""The reader of mountinfo and the table of mount flags."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.linux import mount, mountinfo
from lockfs.options import VFS_FLAGS

LINE = rb"36 35 98:3 /sub\040dir /mnt/a\134b rw,noatime master:1 propagate_from:2 - nfs4 srv:/x\011y rw,vers=4.2,hard"


def test_fields() -> None:
    [info] = mountinfo.parse(LINE + b"\n")
    assert info == mountinfo.MountInfo(
        mount_id=36,
        parent_id=35,
        dev=os.makedev(98, 3),
        root=b"/sub dir",
        mountpoint=b"/mnt/a\\b",
        options={"rw": "", "noatime": ""},
        fstype="nfs4",
        source=b"srv:/x\ty",
        super_options={"rw": "", "vers": "4.2", "hard": ""},
    )


def test_no_optional_fields_and_an_empty_source() -> None:
    [info] = mountinfo.parse(b"1 0 0:1 / / rw - tmpfs  rw,size=1k")
    assert (info.fstype, info.source, info.super_options["size"]) == ("tmpfs", b"", "1k")


def test_a_hyphen_among_the_first_fields_does_not_end_them() -> None:
    [info] = mountinfo.parse(b"1 0 0:1 - - rw shared:1 - ext4 - rw")
    assert (info.root, info.mountpoint, info.fstype, info.source) == (b"-", b"-", "ext4", b"-")


def test_a_comma_in_a_value_does_not_split_it() -> None:
    [info] = mountinfo.parse(rb"1 0 0:1 / /o rw - overlay o rw,lowerdir=/a\054b,upperdir=/c\075d")
    assert info.super_options["lowerdir"] == "/a,b"
    assert info.super_options["upperdir"] == "/c=d"


def test_a_read_only_mount_of_a_writable_filesystem_is_read_only() -> None:
    [info] = mountinfo.parse(b"1 0 0:1 / /o ro,nosuid - ext4 /dev/sda rw,errors=continue")
    assert info.fsoptions == {"ro": "", "nosuid": "", "errors": "continue"}


def test_a_writable_mount_of_a_read_only_filesystem_is_read_only() -> None:
    [info] = mountinfo.parse(b"1 0 0:1 / /o rw,nosuid - iso9660 /dev/sr0 ro")
    assert info.fsoptions == {"ro": "", "nosuid": ""}


def _escape(name: bytes) -> bytes:
    # As fs/proc_namespace.c does: mangle() with " \t\n\\#".
    return b"".join(b"\\%03o" % byte if bytes([byte]) in b" \t\n\\#" else bytes([byte]) for byte in name)


# The kernel's names hold neither NUL nor, unescaped, a line feed; other line-breaking bytes stand as they are.
@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_every_mountpoint_comes_back(name: bytes) -> None:
    [info] = mountinfo.parse(b"1 0 0:1 / /" + _escape(name) + b" rw - fuse.lockfs /" + _escape(name) + b" rw\n")
    assert (info.mountpoint, info.source) == (b"/" + name, b"/" + name)


def test_own_mounts() -> None:
    root = mountinfo.at(b"/")
    assert root is not None
    assert mountinfo.find("/") == root
    assert mountinfo.find(b"/proc/self/status").fstype == "proc"


def test_a_descriptor_is_found_too(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert mountinfo.find(fd) == mountinfo.find(tmp_path.as_posix())
    finally:
        os.close(fd)


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mountinfo.find(str(tmp_path / "no"))


def test_every_flag_of_the_options_has_its_bits() -> None:
    assert set(mount.MS_FLAGS) == VFS_FLAGS


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        ("", 0),
        ("ro nosuid nodev", mount.MS_RDONLY | mount.MS_NOSUID | mount.MS_NODEV),
        ("nosuid nodev suid", mount.MS_NODEV),
        ("suid nosuid", mount.MS_NOSUID),
        ("ro rw", 0),
        ("noatime relatime", mount.MS_RELATIME),
        ("relatime noatime nodiratime", mount.MS_NOATIME | mount.MS_NODIRATIME),
        ("strictatime nostrictatime sync async", 0),
    ],
)
def test_the_last_of_two_opposites_wins(names: str, flags: int) -> None:
    assert mount.flags_of(names.split()) == flags


def test_flags_on_top_of_others() -> None:
    assert mount.flags_of(["rw"], mount.MS_RDONLY | mount.MS_NODEV) == mount.MS_NODEV


def test_an_unknown_flag() -> None:
    with pytest.raises(KeyError, match="quick"):
        mount.flags_of(["quick"])
