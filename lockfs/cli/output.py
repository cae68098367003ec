"""How the commands print: aligned plain text for people, JSON with every field for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

import msgspec

GREEN = "32"
RED = "31"
YELLOW = "33"


def coloured(text: str, colour: str) -> str:
    """Return *text* in a colour if a person looks at it and wants colours (no-color.org)."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[m"


def printable(text: str) -> str:
    """Return *text* fit for a terminal: what another host says of itself must not steer it."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Return rows as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{indent}{line}\n" for line in lines)


def moment(since: float) -> str:
    """Return a wall-clock time for people, and how long ago it was; empty if it is not known."""
    if since <= 0:
        return ""
    ago = max(0, int(time.time() - since))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if ago >= 2 * size:
            return f"{_clock(since)} ({ago // size} {unit} ago)"
    return f"{_clock(since)} ({ago} s ago)"


def _clock(since: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    except (OverflowError, ValueError, OSError):
        return str(since)


def fields(value: object) -> object:
    """Return a message as JSON types with all fields, those that have their default value too."""
    if isinstance(value, msgspec.Struct):
        return {name: fields(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list):
        return [fields(each) for each in value]
    return value


def print_json(value: object) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf")))
