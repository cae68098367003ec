"""The interface descriptions that lockd publishes, for clients that are not ours."""

from __future__ import annotations

from importlib.resources import files

import msgspec

from lockfs.protocol import messages, varlink

_FILES = {messages.INTERFACE: "io.lockfs.Lockd.varlink", varlink.SERVICE: "org.varlink.service.varlink"}


class Wanted(msgspec.Struct, frozen=True):
    """The parameters of ``GetInterfaceDescription``."""

    interface: str


def description(interface: str) -> str | None:
    """Return the description of an interface, None if lockd has no such interface."""
    if interface not in _FILES:
        return None
    return files(__package__).joinpath(_FILES[interface]).read_text(encoding="utf-8")
