"""Who this host is among those that share a lockspace, whatever it is called and wherever its address moves.

A host writes a name of its own into the record of its host id: 16 digits that stand for the machine, a dot, and the
host name for people.  The digits stay the same when the host is renamed or started again, so it finds its record;
they come from what the machine is (its machine-id and the UUID of its hardware, which also tells most clones apart)
and the run directory, of which each "host" on one machine has its own.
"""

from __future__ import annotations

import hashlib
import re

from lockfs.linux import procfs

NAME_BYTES = 47
DIGITS = 16
_SOURCES = ("/etc/machine-id", "/sys/class/dmi/id/product_uuid")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_OURS = re.compile(rb"[0-9a-f]{%d}\." % DIGITS)


def machine_digits(run_dir: str, host: str) -> str:
    """Return the digits of this machine; *host* stands in where it has no identity at all."""
    known = [_contents(path) for path in _SOURCES]
    if not any(known):
        known.append(host.encode(errors="surrogateescape"))
    known.append(run_dir.encode(errors="surrogateescape"))
    return hashlib.sha256(b"lockfs\0" + b"\0".join(known)).hexdigest()[:DIGITS]


def name(digits: str, host: str) -> bytes:
    """Return the name for the record of this host."""
    text = f"{digits}.{host}".encode(errors="replace")[:NAME_BYTES]
    return text.decode(errors="ignore").encode()


def is_of(record_name: bytes, digits: str) -> bool:
    """Say whether a record's name is that of the machine with these digits."""
    return record_name.startswith(digits.encode() + b".")


def shown(record_name: bytes) -> str:
    """Return the host name in a record's name, for people; of a sanlock host all there is."""
    text = record_name.partition(b"\0")[0]
    if _OURS.match(text):
        text = text[DIGITS + 1 :]
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text.decode(errors="backslashreplace")
    )


def boot_id() -> str:
    """Return what is different at each boot of this machine.  Raises OSError."""
    return procfs.contents(_BOOT_ID).decode().strip()


def _contents(path: str) -> bytes:
    try:
        return procfs.contents(path).strip()
    except OSError:
        return b""
