"""The file of a host's own defaults for mount options, /etc/lockfs/lockfs.toml.

What is in it counts for every mount that this host makes from then on, unless its ``-o`` string says otherwise; mounts
that are there stay as they are.  A file that cannot be understood is an error, not a warning: a default that is
skipped by mistake may be the one that kept two hosts apart.

    [options]                   # as with -o
    backend = "paxos-lease"
    managers = ["libvirtd"]     # a list, where -o has colons

    [backend.paxos-lease]       # counts for mounts with this backend
    takeover = 10
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping

from lockfs import backend, options
from lockfs.errors import UsageError

PATH = "/etc/lockfs/lockfs.toml"


def path() -> str:
    """Return where the file is looked for: LOCKFS_CONFIG, or the usual place."""
    return os.environ.get("LOCKFS_CONFIG") or PATH


def load(file: str) -> options.Defaults:
    """Return the defaults in *file*; none if there is no such file.

    Raises `UsageError`, which names file and key, if it cannot be read, is not TOML, or has what no option takes.
    """
    try:
        with open(file, "rb") as stream:
            document = tomllib.load(stream)
    except FileNotFoundError:
        return options.Defaults()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, and of UTF-8
        hint = "It is TOML; lockfs.toml(5) has an example."
        raise UsageError(f"{file} cannot be understood: {error}", hint=hint) from None
    try:
        return _defaults(document)
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}", hint=error.hint) from None


def _defaults(document: Mapping[str, object]) -> options.Defaults:
    for name in document.keys() - {"options", "backend"}:
        raise UsageError(f"unknown table [{name}]", hint="There are [options] and [backend.NAME].")
    own = _texts("[options]", document.get("options", {}), options.OPTIONS)
    if "backend" in own:
        backend.find(own["backend"])
    of_backends: dict[str, Mapping[str, str]] = {}
    for name, table in _table("[backend]", document.get("backend", {})).items():
        of_backends[name] = _texts(f"[backend.{name}]", table, backend.find(name).options)
    return options.Defaults(own, of_backends)


def _table(where: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a table")
    return value


def _texts(where: str, value: object, known: Iterable[options.Option]) -> dict[str, str]:
    """Return a table as texts of options, each of which its option takes."""
    table = {name: option for option in known for name in (option.name, *option.also)}
    found: dict[str, str] = {}
    for name, each in _table(where, value).items():
        option = table.get(name)
        if option is None:
            raise UsageError(f"{where} has an unknown option '{name}'", hint="`lockfs options` lists them all.")
        found[option.name] = options.checked(option, _text(where, name, each))
    return found


def _text(where: str, name: str, value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case int() | float():
            return str(value)
        case list() if all(isinstance(part, str) and ":" not in part for part in value):
            return ":".join(value)
    raise UsageError(f"{where} has for {name} neither a string, a number, a truth value, nor a list of words")
