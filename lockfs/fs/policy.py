"""Which images are guarded, and how: the options ``images=``, ``shared=`` and ``pin=``.

A pattern without a slash is matched against the last component of the path below the source, one with a slash
against all of it; ``*`` and ``?`` do not match a slash, ``**`` does.  Where ``pin=`` and ``shared=`` both match,
``pin=`` counts: it is the stricter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import cast

from lockfs.backend import Mode


def compile_globs(patterns: Sequence[str]) -> re.Pattern[bytes] | None:
    """Return a regular expression that matches a whole relative path if one of the patterns does; None for no
    patterns.
    """
    if not patterns:
        return None
    alternatives = []
    for pattern in patterns:
        body = _translate(os.fsencode(pattern))
        alternatives.append(body if "/" in pattern else rb"(?:.*/)?" + body)
    return re.compile(rb"(?:" + rb"|".join(alternatives) + rb")\Z", re.DOTALL)


def _translate(pattern: bytes) -> bytes:
    out = b""
    at = 0
    while at < len(pattern):
        char = pattern[at : at + 1]
        at += 1
        if char == b"*":
            if pattern[at : at + 1] == b"*":
                at += 1
                out += rb".*"
            else:
                out += rb"[^/]*"
        elif char == b"?":
            out += rb"[^/]"
        elif char == b"[":
            end = pattern.find(b"]", at + 1 + (pattern[at : at + 1] in (b"!", b"^")))
            if end < 0:
                out += rb"\["
                continue
            inside = pattern[at:end].replace(b"\\", b"\\\\")
            at = end + 1
            out += b"[^/" + inside[1:] + b"]" if inside[:1] in (b"!", b"^") else b"[" + inside + b"]"
        else:
            out += re.escape(char)
    return out


class Policy:
    """What the options say about each path.

    *values* are those of `lockfs.options`.  Raises ValueError for a pattern that is none.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        images = cast(Sequence[str], values["images"])
        self._all = "*" in images
        self._images = None if self._all else self._compile(images)
        self._shared = self._compile(cast(Sequence[str], values["shared"]))
        self._pin = self._compile(cast(Sequence[str], values["pin"]))

    @staticmethod
    def _compile(patterns: Sequence[str]) -> re.Pattern[bytes] | None:
        try:
            return compile_globs(patterns)
        except re.error as error:
            raise ValueError(f"bad pattern in '{':'.join(patterns)}': {error}") from error

    def guarded(self, path: bytes) -> bool:
        """Tell whether the regular file at *path* is an image."""
        return self._all or (self._images is not None and self._images.match(path) is not None)

    def writer(self, path: bytes) -> Mode:
        """Return the mode in which a writer of the image at *path* holds it."""
        if self._shared is not None and self._shared.match(path) is not None and not self.pinned(path):
            return Mode.SHARED
        return Mode.EXCLUSIVE

    def pinned(self, path: bytes) -> bool:
        """Tell whether readers of the image at *path* keep writers away."""
        return self._pin is not None and self._pin.match(path) is not None and self.guarded(path)
