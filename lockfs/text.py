"""File names as text that can be logged, sent as JSON and turned back into the same bytes.

A name on Linux is bytes.  In text, what prints as UTF-8 stays as it is, a backslash is doubled, and every
other byte becomes ``\\xNN``; so a name with a newline cannot forge a log line, and none is ever lost.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(rb"\\(?:\\|x[0-9a-f]{2})")


def from_bytes(name: bytes) -> str:
    """Return the text form of a file name or path."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = name.decode(errors="surrogateescape")
    if "\\" not in text and text.isprintable():
        return text
    return "".join(_escape(char) for char in text)


def _escape(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if char.isprintable():
        return char
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))


def to_bytes(text: str) -> bytes:
    """Return the file name that `from_bytes` made *text* from.

    A backslash that starts no escape is taken as it stands, so that a person may type one.
    """
    return _ESCAPE.sub(_unescape, text.encode(errors="surrogateescape"))


def _unescape(match: re.Match[bytes]) -> bytes:
    found = match.group()
    return b"\\" if found == b"\\\\" else bytes([int(found[2:], 16)])
