"""The parser of mount options, with backends installed for the test the way that anybody's are."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockfs.errors import EXIT_USAGE, UsageError
from lockfs.options import OPTIONS, MountOptions, is_remount, join, parse, split

PLUGIN = '''
from lockfs.backend import Spec
from lockfs.options import Option, seconds, word

SPEC = Spec("testing", "for tests", "nowhere:make", [Option("lease", seconds, "16", "SECONDS", "how long a lease is")])
OTHER = Spec("plain", "has no options", "nowhere:make")
'''
ENTRY_POINTS = """
[lockfs.backends]
testing = lockfs_testing:SPEC
plain = lockfs_testing:OTHER
broken = lockfs_testing:MISSING
"""


@pytest.fixture(scope="module", autouse=True)
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install the backends testing, plain and broken."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "lockfs_testing.py").write_text(PLUGIN)
    info = directory / "lockfs_testing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lockfs-testing\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield


def refused(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value


def test_defaults() -> None:
    options = parse("backend=testing")
    assert options.values == {
        "backend": "testing",
        "images": ("*",),
        "shared": (),
        "pin": (),
        "owner": "process",
        "data": "auto",
        "wait": 1.0,
        "key": "inode",
        "managers": ("libvirtd", "virtqemud", "virtlockd"),
        "orphans": "keep",
        "onloss": "fence",
    }
    assert options.backend == {"lease": 16.0}
    assert options.text == {"backend": "testing"}
    assert (options.flags, options.kernel, options.remount) == ([], {}, False)


def test_the_default_backend_is_installed() -> None:
    assert parse("").values["backend"] == "fcntl-lockd"


def test_no_option_of_a_first_party_backend_hides_behind_one_of_every_mount() -> None:
    own = {name for option in OPTIONS for name in (option.name, *option.also)}
    for name in ("nop", "fcntl-lockd"):
        assert own.isdisjoint(parse(f"backend={name}").backend)


def test_values_of_every_kind() -> None:
    options = parse("backend=testing,images=*.img:vm/**,wait=2.5,owner=cgroup,managers=,lease=8")
    assert options.values["images"] == ("*.img", "vm/**")
    assert options.values["wait"] == 2.5
    assert options.values["owner"] == "cgroup"
    assert options.values["managers"] == ()
    assert options.backend == {"lease": 8.0}
    assert options.text == {
        "backend": "testing",
        "images": "*.img:vm/**",
        "wait": "2.5",
        "owner": "cgroup",
        "managers": "",
        "lease": "8",
    }


def test_the_last_of_equal_options_wins() -> None:
    assert parse("backend=nope,wait=1,backend=testing,wait=3").values["wait"] == 3.0


@pytest.mark.parametrize("name", ["shared", "shareable"])
def test_another_name_of_an_option(name: str) -> None:
    options = parse(f"backend=plain,{name}=a:b")
    assert options.values["shared"] == ("a", "b")
    assert options.text["shared"] == "a:b"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('images="a,b"', "a,b"),
        (r"images=a\,b", "a,b"),
        (r"images=a\"b", 'a"b'),
        (r"images=a\\b", "a\\b"),
        (r"images=a\xffb", r"a\xffb"),
        ("images=a=b", "a=b"),
        ('images="a,b"c', "a,bc"),
        ("images=a\\", "a\\"),
    ],
)
def test_special_characters_in_a_value(text: str, pattern: str) -> None:
    assert parse(f"backend=plain,ro,{text}").values["images"] == (pattern,)


def test_bytes_that_are_not_utf8_survive() -> None:
    pattern = os.fsdecode(b"caf\xe9-*.img")
    options = parse(f"backend=plain,images={pattern}")
    assert options.values["images"] == (pattern,)
    assert parse(join(options.text)).values["images"] == (pattern,)


def test_mount_flags_keep_their_order() -> None:
    assert parse("rw,backend=plain,noatime,suid,nosuid").flags == ["rw", "noatime", "suid", "nosuid"]


def test_what_is_meant_for_others_is_dropped() -> None:
    text = (
        "defaults,_netdev,nofail,noauto,user=joe,users,owner,group,x-systemd.automount,x-systemd.idle-timeout=5,"
        "X-mount.mkdir=0755,comment=hello there,uhelper=udisks2,allow_other,backend=plain"
    )
    options = parse(text)
    assert (options.text, options.flags) == ({"backend": "plain"}, [])
    assert options.values["owner"] == "process"


def test_selinux_labels_go_to_the_kernel() -> None:
    options = parse('context="system_u:object_r:virt_image_t:s0:c1,c2",backend=plain')
    assert options.kernel == {"context": "system_u:object_r:virt_image_t:s0:c1,c2"}


def test_a_remount_takes_what_the_kernel_shows_of_a_mount() -> None:
    text = "ro,nosuid,nodev,relatime,remount,user_id=0,group_id=0,default_permissions,allow_other,max_read=131072"
    options = parse(text + ",backend=plain")
    assert (options.remount, options.text) == (True, {"backend": "plain"})
    assert options.flags == ["ro", "nosuid", "nodev", "relatime"]
    assert is_remount(text)
    assert not is_remount("images=remount,ro")


def test_no_other_mount_takes_what_only_the_kernel_says() -> None:
    assert "unknown option 'user_id'" in refused("backend=plain,user_id=0").message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend=plain,waitt=3", "unknown option 'waitt'; did you mean 'wait'?"),
        ("backend=testing,leese=3", "unknown option 'leese'; did you mean 'lease'?"),
        ("backend=plain,noatimes", "unknown option 'noatimes'; did you mean 'noatime'?"),
        ("backend=plain,=3", "unknown option ''"),
        ("backend=plain,zzzzzz", "unknown option 'zzzzzz'"),
        ("backend=plain,a\nb=3", "unknown option 'a\\x0ab'"),
        ("backend=plain,wait=abc", "option wait=abc: must be a number of seconds, 0 or more"),
        ("backend=plain,wait=-1", "option wait=-1: must be a number of seconds, 0 or more"),
        ("backend=plain,wait=inf", "option wait=inf: must be a number of seconds, 0 or more"),
        ("backend=plain,wait=", "option wait=: must be a number of seconds, 0 or more"),
        ("backend=plain,owner=proces", "must be one of process, cgroup, open; did you mean process?"),
        ("backend=plain,images=/abs", "option images=/abs: must be patterns relative to the source"),
        ("backend=testing,lease=x", "option lease=x: must be a number of seconds, 0 or more"),
        ("backend=plain,wait", "option 'wait' needs a value: wait=SECONDS"),
        ("backend", "option 'backend' needs a value: backend=NAME"),
        ("backend=plain,context", "option 'context' needs a value: context=LABEL"),
        ("backend=plain,ro=1", "option 'ro' takes no value"),
        ("backend=plain,nofail=1", "option 'nofail' takes no value"),
        ("backend=plain,remount=1", "option 'remount' takes no value"),
        ("backend=plain,lease=3", "option 'lease' belongs to the backend 'testing', but this mount uses 'plain'"),
        ("backend=nope", "unknown backend 'nope'"),
        ("backend=", "unknown backend ''"),
        ("backend=broken", "the backend 'broken' does not load"),
        ('images="a', "a quote is not closed"),
    ],
)
def test_errors_say_what_is_wrong(text: str, message: str) -> None:
    assert message in refused(text).message


def test_errors_say_what_to_do() -> None:
    assert "lockfs options" in refused("backend=plain,waitt=3").hint
    assert "backend=testing" in refused("backend=plain,lease=3").hint
    assert "testing" in refused("backend=nope").hint


def test_sloppy_skips_unknown_options_but_no_bad_values() -> None:
    options = parse("backend=plain,waitt=3,lease=3,zzz,wait=2", sloppy=True)
    assert options.text == {"backend": "plain", "wait": "2"}
    with pytest.raises(UsageError, match="must be a number"):
        parse("backend=plain,wait=abc", sloppy=True)


# What argv can hold: any bytes but NUL, in surrogate escapes.
argument = st.binary().map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
names = st.from_regex(r"[a-z_]+", fullmatch=True)


@given(st.dictionaries(names, argument))
def test_split_undoes_join(values: dict[str, str]) -> None:
    assert split(join(values)) == [f"{name}={value}" for name, value in values.items()]


@given(argument.filter(lambda text: not text.startswith("/") and ":/" not in text))
def test_parse_undoes_join(pattern: str) -> None:
    given_ = {"backend": "testing", "images": pattern, "lease": "4"}
    options = parse(join(given_))
    assert options.text == given_
    assert options.values["images"] == tuple(part for part in pattern.split(":") if part)
    assert parse(join(options.text)) == options


likely = st.sampled_from([
    "backend=testing", "backend=", "backend", "wait=1", "wait", "ro", "ro=", "remount", "x-", "=", ",", '"', "\\",
    "images=", "user_id=0", "lease=2", "context=", "context",
])  # fmt: skip


@given(st.lists(st.one_of(likely, argument)).map(",".join), st.booleans())
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_anything_parses_or_is_a_usage_error(text: str, sloppy: bool) -> None:
    try:
        assert isinstance(parse(text, sloppy=sloppy), MountOptions)
    except UsageError as error:
        error.message.encode()
