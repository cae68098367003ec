"""The mount options: one typed table, the parser of ``-o`` strings, and the help text made from the table.

Pure but for the look at the installed backends; imports neither trio nor pyfuse3, so that the mount helper starts fast.
The text form is that of mount(8): options separated by commas; a value may be quoted with ``"`` and may contain ``=``;
a backslash takes the next character as it is (``\\,`` ``\\"`` ``\\\\``).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lockfs.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `parse` turns its text into a value or raises ValueError with what it should be."""

    name: str
    parse: Callable[[str], object]
    default: str
    metavar: str
    help: str


def one_of(*names: str) -> Callable[[str], str]:
    """Return a parser that accepts only *names*."""

    def parse(text: str) -> str:
        if text not in names:
            near = difflib.get_close_matches(text, names, 1)
            raise ValueError(f"one of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else ""))
        return text

    return parse


def seconds(text: str) -> float:
    """Parse a number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or value < 0:
        raise ValueError("a number of seconds, 0 or more")
    return value


def names(text: str) -> tuple[str, ...]:
    """Parse a list of names, separated by colons; empty for none."""
    return tuple(part for part in text.split(":") if part)


def globs(text: str) -> tuple[str, ...]:
    """Parse a list of glob patterns, separated by colons; empty for none.

    A pattern without a slash is matched against the last component of a path at any depth, one with a slash
    against the whole path below the source.
    """
    for pattern in names(text):
        if pattern.startswith("/"):
            raise ValueError("patterns relative to the source, without a leading slash")
    return names(text)


def word(text: str) -> str:
    """Parse a word that must not be empty."""
    if not text:
        raise ValueError("not empty")
    return text


def absolute_path(text: str) -> str:
    """Parse an absolute path."""
    if not text.startswith("/"):
        raise ValueError("an absolute path")
    return text


OPTIONS: Sequence[Option] = (
    Option("backend", word, "fcntl-lockd", "NAME", "how hosts agree on locks: an installed backend"),
    Option("images", globs, "*", "GLOB[:GLOB...]", "which regular files are guarded"),
    Option("shared", globs, "", "GLOB[:GLOB...]", "images that many owners may write at once (cluster-aware disks)"),
    Option("pin", globs, "", "GLOB[:GLOB...]", "images that must not be written while anyone reads them"),
    Option("owner", one_of("process", "cgroup", "open"), "process", "process|cgroup|open",
           "who counts as one owner: a process, all of a control group, or each open by itself"),
    Option("wait", seconds, "1", "SECONDS", "how long an open waits for the holder to let go before EBUSY"),
    Option("key", one_of("inode", "path"), "inode", "inode|path",
           "what names an image among hosts: the file itself, or its path (for lock managers that lock by path)"),
    Option("managers", names, "libvirtd:virtqemud:virtlockd", "NAME[:NAME...]",
           "programs whose opens for write take the lock at their first write only"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MountOptions:
    """A parsed ``-o`` string: the typed values of lockfs's own options and of the backend's, and what mount(2) gets.

    `text` holds the lockfs and backend options that were given, to be passed on; `flags` the names of VFS flags in
    their order; `ignored` what mount(8) and systemd use among themselves.
    """

    values: Mapping[str, object]
    backend: Mapping[str, object]
    text: Mapping[str, str]
    flags: Sequence[str]
    remount: bool = False


VFS_FLAGS = frozenset(
    "ro rw suid nosuid dev nodev exec noexec atime noatime diratime nodiratime relatime norelatime strictatime "
    "nostrictatime sync async dirsync".split()
)
IGNORED = frozenset(
    "defaults auto noauto user nouser users owner group nogroup _netdev nofail silent loud mand nomand iversion "
    "noiversion lazytime nolazytime".split()
)
IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")


def split(text: str) -> list[str]:
    """Split an ``-o`` string at its commas and undo quotes and backslashes.  Raises `UsageError`."""
    parts: list[str] = []
    part: list[str] = []
    quoted = False
    chars = iter(text)
    for char in chars:
        if char == "\\":
            following = next(chars, "")
            # Only what is special here is unescaped: a value may hold other backslashes, as in \x41 of a file name.
            part.append(following if following and following in ',"\\' else "\\" + following)
        elif char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            parts.append("".join(part))
            part = []
        else:
            part.append(char)
    if quoted:
        raise UsageError(f"a quote is not closed in the options '{text}'")
    parts.append("".join(part))
    return [each for each in parts if each]


def join(values: Mapping[str, str]) -> str:
    """Return the ``-o`` string that `split` and `parse` read as *values*."""
    return ",".join(f"{name}={_escape(value)}" for name, value in values.items())


def _escape(value: str) -> str:
    return "".join("\\" + char if char in ',"\\' else char for char in value)
