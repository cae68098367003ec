"""Names of leases that libvirt and administrators give."""

from __future__ import annotations

import pytest
from lockfs_paxos_lease.given_names import GivenNames, checked, libvirt_name, parse_map

from lockfs.errors import UsageError

DEMO = b"/var/lib/libvirt/images/demo.img"


def test_libvirts_name_of_a_disk() -> None:
    assert libvirt_name(DEMO) == "bfa0240911bc17753e0b473688822159"


def test_who_comes_first() -> None:
    given = GivenNames({b"demo.img": "from-map"}, libvirt=True)
    assert given.of(b"demo.img", DEMO, b"from-attribute") == "from-attribute"
    assert given.of(b"demo.img", DEMO, None) == "from-map"
    assert given.of(b"other.img", DEMO, None) == libvirt_name(DEMO)
    assert GivenNames().of(b"demo.img", DEMO, None) is None


def test_a_map() -> None:
    text = """
    # path      name
    vm1.qcow2   vm1-disk      # the first
    "with blanks.img" vm2-disk
    'it''s'/x.img  vm3
    \\\\xff.img vm4
    """
    assert parse_map(text) == {
        b"vm1.qcow2": "vm1-disk", b"with blanks.img": "vm2-disk", b"its/x.img": "vm3", b"\xff.img": "vm4",
    }  # fmt: skip
    assert parse_map("") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a b c", "line 1 of the map of leases is not a path and a name"),
        ("one 1\ntwo", "line 2 .* is not a path and a name"),
        ("/absolute x", "is not a path and a name"),
        ("'open x", "No closing quotation"),
        ("a 1\na 2", "line 2 .*'a' has a name already"),
        ("a 1\nb 1", "line 2 .*line 1 has the name '1' already"),
        ("a x/y", "'x/y' cannot be the name of a lease"),
    ],
)
def test_a_map_that_is_wrong(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_map(text)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a:b", "a b", "a\\b", "a\nb", "\xe4", "n" * 48])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(UsageError):
        checked(name, "here")
    with pytest.raises(UsageError):
        GivenNames().of(b"x", b"/x", name.encode())


def test_what_can() -> None:
    assert checked("n" * 47, "here") == "n" * 47
    assert checked("vm-1.disk_0@site", "here") == "vm-1.disk_0@site"
