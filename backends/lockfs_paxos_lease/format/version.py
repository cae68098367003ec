"""The version words of records, and how a lockspace with a timing of lockfs's own is marked.

A reader compares the upper half.  sanlock's records have those of sanlock, and are used with sanlock's timing.  A
lockspace whose hosts agree on another timing has `OWN_MAJOR` there in all its records, delta and paxos alike, and the
takeover time in the lower half, in tenths of a second.  So sanlock refuses to join it (-224, checked before anything is
written), and so does a lockfs whose `takeover=` differs.  The word is covered by the checksum and lies in every
record, so no host can join without having seen it.
"""

from __future__ import annotations

from lockfs_paxos_lease.format.errors import BadRecord, Code

DELTA = 0x00030004
"""sanlock's delta leases."""
PAXOS = 0x00060004
"""sanlock's paxos leases."""
REQUEST = 0x00010001
RINDEX = 0x00010002
OWN_MAJOR = 0x4C46_0000
TENTHS = 10
"""Units of the takeover time in a second."""
MAX_TAKEOVER = 0xFFFF / TENTHS

_MAJOR = 0xFFFF0000


def own(takeover: float) -> int:
    """Return the version word for a takeover time in seconds.  Raises ValueError if it does not fit."""
    tenths = round(takeover * TENTHS)
    if not 0 < tenths <= 0xFFFF:
        raise ValueError(f"from {1 / TENTHS:g} to {MAX_TAKEOVER:g} seconds")
    return OWN_MAJOR | tenths


def takeover_of(version: int) -> float | None:
    """Return the takeover time in seconds that a version word tells; None if it is not one of lockfs's own."""
    return (version & ~_MAJOR) / TENTHS if version & _MAJOR == OWN_MAJOR else None


def check(found: int, wanted: int, code: Code) -> None:
    """Raise `BadRecord` if a record of version *found* must not be used by who goes by *wanted*."""
    if found & _MAJOR == wanted & _MAJOR and (found == wanted or wanted & _MAJOR != OWN_MAJOR):
        return
    theirs, ours = takeover_of(found), takeover_of(wanted)
    if theirs is not None:
        what = f"it is used with takeover={theirs:g}, not with " + ("sanlock's timing" if ours is None else f"{ours:g}")
    elif ours is not None and found & _MAJOR in (DELTA & _MAJOR, PAXOS & _MAJOR):
        what = f"it is used with takeover=sanlock, not with {ours:g}"
    else:
        what = f"its version is {found >> 16}.{found & 0xFFFF}, not {wanted >> 16}"
    raise BadRecord(code, what)
