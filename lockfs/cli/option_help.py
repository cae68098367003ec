"""The option tables as people read them, made from the tables that the parser uses."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from lockfs import backend
from lockfs.errors import UsageError
from lockfs.options import OPTIONS, Option

WIDTH = 79

Table = tuple[str, Sequence[Option]]
"""A title and the options below it."""


def lines(options: Iterable[Option], indent: str = "  ") -> list[str]:
    """Return plain text: each option with its argument, below it what it does and its default."""
    found: list[str] = []
    for option in options:
        found.append(f"{indent}{typed(option)}")
        further = indent * 3
        found += textwrap.wrap(meaning(option), WIDTH, initial_indent=further, subsequent_indent=further)
    return found


def typed(option: Option) -> str:
    """Return an option as it is written."""
    return ", ".join(f"{name}={option.metavar}" for name in (option.name, *option.also))


def meaning(option: Option) -> str:
    """Return what an option does, and its default."""
    return f"{option.help} (default: {option.default or 'none'})"


def tables(only: str = "") -> list[Table]:
    """Return lockfs's own table and that of each installed backend, or only that of the backend *only*.

    Raises `UsageError` if there is no such backend.
    """
    if only:
        return [_table(backend.find(only))]
    found: list[Table] = [("Options of every mount", OPTIONS)]
    for name in sorted(backend.installed()):
        try:
            found.append(_table(backend.find(name)))
        except UsageError as error:
            found.append((f"Backend {name} cannot be used: {error.message}", ()))
    return found


def _table(spec: backend.Spec) -> Table:
    return f"Options of the backend {spec.name} ({spec.summary})", spec.options


def text(found: Iterable[Table]) -> str:
    """Return tables as plain text."""
    parts = ["\n".join([f"{title}:", *(lines(options) or ["  none"])]) for title, options in found]
    return "\n\n".join(parts) + "\n"


def markdown(found: Iterable[Table]) -> str:
    """Return tables as one Markdown table."""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for _title, options in found:
        rows += [f"| `{_cell(typed(each))}` | {_default(each)} | {_cell(each.help)} |" for each in options]
    return "\n".join(rows) + "\n"


def _default(option: Option) -> str:
    return f"`{_cell(option.default)}`" if option.default else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
