"""The mount options: one typed table, and the parser of ``-o`` strings.

Pure but for the look at the installed backends; imports neither trio nor pyfuse3, so that the mount helper
starts fast.  The text form is that of mount(8): options separated by commas; a value may be quoted with ``"``
and may contain ``=``; a backslash takes the next character as it is (``\\,`` ``\\"`` ``\\\\``).  Text that is
not UTF-8 is carried through in Python's surrogate escapes, as in ``sys.argv``.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lockfs import backend
from lockfs import text as text_form
from lockfs.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `parse` turns its text into a value or raises ValueError with what it should be.

    `also` lists other names that are understood.
    """

    name: str
    parse: Callable[[str], object]
    default: str
    metavar: str
    help: str
    also: Sequence[str] = ()


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
    # mount(8) takes "shared", value and all, for mount propagation, and shows it to no mount helper.
    Option("shared", globs, "", "GLOB[:GLOB...]",
           "images that many owners may write at once (cluster-aware disks)", also=("shareable",)),
    Option("pin", globs, "", "GLOB[:GLOB...]", "images that must not be written while anyone reads them"),
    Option("owner", one_of("process", "cgroup", "open"), "process", "process|cgroup|open",
           "who counts as one owner: a process, all of a control group, or each open by itself"),
    Option("wait", seconds, "1", "SECONDS", "how long an open waits for the holder to let go before EBUSY"),
    Option("data", one_of("auto", "passthrough", "gated"), "auto", "auto|passthrough|gated",
           "data inside the kernel, through the daemon, or the first where the kernel can"),
    Option("key", one_of("inode", "path"), "inode", "inode|path",
           "what names an image among hosts: the file itself, or its path"),
    Option("managers", names, "libvirtd:virtqemud:virtlockd", "NAME[:NAME...]",
           "programs whose opens for write take the lock at their first write only"),
    Option("orphans", one_of("keep", "kill"), "keep", "keep|kill",
           "processes that can still write when all daemons have died: keep others out until they end, or kill them"),
    Option("onloss", one_of("fence", "kill"), "fence", "fence|kill",
           "when the lock of an image is lost: every I/O on what is open of it fails, and with kill those who have it "
           "open for writing are killed, too"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MountOptions:
    """A parsed ``-o`` string: typed values of lockfs's own options and the backend's, and what mount(2) gets.

    `values` and `backend` have a value for every option of their table.  `text` holds the lockfs and backend
    options that were given, to be passed on; `flags` the names of VFS flags in their order; `kernel` the
    SELinux labels that mount(2) takes as data.
    """

    values: Mapping[str, object]
    backend: Mapping[str, object]
    text: Mapping[str, str]
    flags: Sequence[str]
    kernel: Mapping[str, str]
    remount: bool = False


@dataclass(frozen=True, slots=True)
class Defaults:
    """What options are when a mount does not say: texts of lockfs's own, and of each backend's.

    What is not in here has the default of its table.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


NO_DEFAULTS = Defaults()

VFS_FLAGS = frozenset((
    "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "symfollow", "nosymfollow",
    "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
    "sync", "async", "dirsync",
))  # fmt: skip
SELINUX = ("context", "fscontext", "defcontext", "rootcontext")
IGNORED = frozenset((
    "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nogroup", "_netdev", "nofail",
    "silent", "loud", "mand", "nomand", "iversion", "noiversion", "lazytime", "nolazytime",
))  # fmt: skip
"""What mount(8) and systemd use among themselves, or a FUSE mount has no use for."""
IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")
ALWAYS_ON = frozenset(("allow_other", "default_permissions"))
"""Words that other FUSE programs need, and that say what every lockfs mount does."""
KERNEL_FUSE = ("user_id=", "group_id=", "rootmode=", "fd=", "max_read=", "blksize=")
"""What the kernel shows of a FUSE mount; mount(8) gives it back on a remount."""


def parse(text: str, *, sloppy: bool = False, defaults: Defaults = NO_DEFAULTS) -> MountOptions:
    """Parse an ``-o`` string.  Of equal options the last wins; *sloppy* skips unknown ones (``mount -s``).

    What of *defaults* is used counts as given.

    Raises `UsageError` for an unknown option, a bad value, and a backend that is not installed.
    """
    parts = split(text)
    remount = "remount" in parts
    words: dict[str, str | None] = {}
    flags: list[str] = []
    for part in parts:
        name, equals, value = part.partition("=")
        if name in VFS_FLAGS and not equals:
            flags.append(name)
        elif not _is_for_others(part, remount):
            words[name] = value if equals else None
    kernel = {name: _value(name, "LABEL", words.pop(name)) for name in SELINUX if name in words}
    own = _table(OPTIONS)
    usual = defaults.options.get("backend", own["backend"].default)
    chosen = _value("backend", own["backend"].metavar, words.get("backend", usual))
    of_backend = _table(backend.find(chosen).options)
    given: dict[str, str] = {**defaults.options, **defaults.backends.get(chosen, {})}
    for name, maybe in words.items():
        option = own.get(name) or of_backend.get(name)
        if option is not None:
            given[option.name] = _value(name, option.metavar, maybe)
        elif not sloppy:
            raise _unknown(name, [*own, *of_backend], chosen)
    return MountOptions(_parsed(own, given), _parsed(of_backend, given), given, flags, kernel, remount)


def is_remount(text: str) -> bool:
    """Say whether an ``-o`` string asks to change the mount that is there.  Raises `UsageError`."""
    return "remount" in split(text)


def _is_for_others(part: str, remount: bool) -> bool:
    """Say whether a part of the string is not for lockfs, or says what holds anyway."""
    if part in IGNORED or part in ALWAYS_ON or part == "remount" or part.startswith(IGNORED_PREFIXES):
        return True
    return remount and part.startswith(KERNEL_FUSE)


def _table(options: Iterable[Option]) -> dict[str, Option]:
    return {name: option for option in options for name in (option.name, *option.also)}


def _value(name: str, metavar: str, value: str | None) -> str:
    if value is None:
        raise UsageError(f"option '{name}' needs a value: {name}={metavar}")
    return value


def _parsed(table: Mapping[str, Option], given: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for option in table.values():
        values[option.name] = _parse_value(option, given.get(option.name, option.default))
    return values


def _parse_value(option: Option, value: str) -> object:
    try:
        return option.parse(value)
    except ValueError as error:
        what = f"option {option.name}={_shown(value)}"
        raise UsageError(f"{what}: must be {error}", hint=f"{option.name}: {option.help}.") from None


def checked(option: Option, value: str) -> str:
    """Return *value*, a text that *option* takes.  Raises `UsageError` if it does not."""
    _parse_value(option, value)
    return value


def _unknown(name: str, known: Iterable[str], backend_name: str) -> UsageError:
    shown = _shown(name)
    if name in VFS_FLAGS | IGNORED | ALWAYS_ON or name == "remount":
        return UsageError(f"option '{shown}' takes no value")
    for other in sorted(backend.installed()):
        if other != backend_name and name in _table(_options_of(other)):
            return UsageError(
                f"option '{shown}' belongs to the backend '{other}', but this mount uses '{backend_name}'",
                hint=f"Add backend={other}, or leave the option out.",
            )
    near = difflib.get_close_matches(name, [*known, *VFS_FLAGS], 1)
    suggestion = f"; did you mean '{near[0]}'?" if near else ""
    return UsageError(f"unknown option '{shown}'{suggestion}", hint="`lockfs options` lists them all.")


def _options_of(backend_name: str) -> Sequence[Option]:
    """Return the table of a backend for a hint; one that does not load must not hide the error at hand."""
    try:
        return backend.find(backend_name).options
    except UsageError:
        return ()


def _shown(text: str) -> str:
    return text_form.from_bytes(os.fsencode(text))


def split(text: str) -> list[str]:
    """Split an ``-o`` string at its commas and undo quotes and backslashes.  Raises `UsageError`."""
    parts: list[str] = []
    part: list[str] = []
    quoted = False
    chars = iter(text)
    for char in chars:
        if char == "\\":
            following = next(chars, "")
            # Only what is special here is unescaped: a value may hold other backslashes.
            part.append(following if following and following in ',"\\' else "\\" + following)
        elif char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            parts.append("".join(part))
            part = []
        else:
            part.append(char)
    if quoted:
        raise UsageError(f"a quote is not closed in the options '{_shown(text)}'")
    parts.append("".join(part))
    return [each for each in parts if each]


def join(values: Mapping[str, str]) -> str:
    """Return the ``-o`` string that `split` and `parse` read as *values*."""
    return ",".join(f"{name}={_escape(value)}" for name, value in values.items())


def _escape(value: str) -> str:
    return "".join("\\" + char if char in ',"\\' else char for char in value)
