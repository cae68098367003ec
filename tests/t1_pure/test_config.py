"""The file of a host's own defaults for mount options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lockfs import config
from lockfs.errors import UsageError
from lockfs.options import parse


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lockfs.toml"


def refused(file: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        config.load(str(file))
    assert caught.value.message.startswith(str(file))
    return caught.value


def test_without_a_file_the_tables_count(file: Path) -> None:
    assert parse("wait=2", defaults=config.load(str(file))) == parse("wait=2")


def test_a_default_counts_unless_the_mount_says_otherwise(file: Path) -> None:
    file.write_text(
        '[options]\nbackend = "nop"\nwait = 2.5\nmanagers = ["libvirtd", "mine"]\nshareable = "*.shared"\n'
        '[backend.fcntl-lockd]\ncards = false\n[backend.paxos-lease]\ntakeover = 10\n'
    )
    defaults = config.load(str(file))
    options = parse("", defaults=defaults)
    assert options.text == {"backend": "nop", "wait": "2.5", "managers": "libvirtd:mine", "shared": "*.shared"}
    assert options.values["managers"] == ("libvirtd", "mine")
    options = parse("backend=fcntl-lockd,wait=3", defaults=defaults)
    assert (options.values["wait"], options.text["cards"], "takeover" in options.text) == (3.0, "no", False)
    options = parse("backend=paxos-lease,takeover=20", defaults=defaults)
    assert (options.text["takeover"], "cards" in options.text) == ("20", False)


def test_what_a_mount_was_made_with_needs_no_file_to_be_read_again(file: Path) -> None:
    file.write_text("[options]\nwait = 7\n")
    options = parse("backend=nop", defaults=config.load(str(file)))
    assert parse(",".join(f"{name}={value}" for name, value in options.text.items())) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wait = ", "cannot be understood"),
        ("[option]\nwait = 3\n", "unknown table [option]"),
        ("wait = 3\n", "unknown table [wait]"),
        ("options = 3\n", "[options] is not a table"),
        ("backend = 'nop'\n", "[backend] is not a table"),
        ("[options]\nwaitt = 3\n", "[options] has an unknown option 'waitt'"),
        ("[options]\ntakeover = 3\n", "[options] has an unknown option 'takeover'"),
        ("[options]\nwait = 'long'\n", "option wait=long: must be a number of seconds"),
        ("[options]\nwait = [1]\n", "[options] has for wait neither"),
        ("[options]\nmanagers = ['a:b']\n", "[options] has for managers neither"),
        ("[options]\nbackend = 'nope'\n", "unknown backend 'nope'"),
        ("[backend.nope]\n", "unknown backend 'nope'"),
        ("[backend.nop]\ntakeover = 3\n", "[backend.nop] has an unknown option 'takeover'"),
    ],
)
def test_an_error_names_file_and_key(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    assert message in refused(file).message


def test_a_file_that_cannot_be_read_is_an_error(file: Path) -> None:
    file.mkdir()
    assert "cannot be read" in refused(file).message


def test_a_file_that_is_not_utf8_is_an_error(file: Path) -> None:
    file.write_bytes(b"[options]\nbackend = '\xff'\n")
    assert "cannot be understood" in refused(file).message


def test_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCKFS_CONFIG", raising=False)
    assert config.path() == "/etc/lockfs/lockfs.toml"
    monkeypatch.setitem(os.environ, "LOCKFS_CONFIG", "/elsewhere")
    assert config.path() == "/elsewhere"
