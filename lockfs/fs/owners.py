"""Whose an open is: the options ``owner=`` and ``managers=``."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import cast

from lockfs.fs.work import Caller
from lockfs.linux import process
from lockfs.protocol.messages import Owner


class Owners:
    """Makes an owner from who calls.

    A caller that cannot be seen from here (it is in another pid namespace, or gone) owns what it opens open by open.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        self._rule = cast(str, values["owner"])
        self._managers = frozenset(cast(Sequence[str], values["managers"]))
        self._count = itertools.count(1)
        # What a daemon before this one has counted is held still.
        self._tag = secrets.token_hex(4)

    def of(self, caller: Caller) -> tuple[Owner, bool]:
        """Return the owner that an open by *caller* belongs to, and whether the caller is a manager.

        To be called before the first await of a request, while the caller is certain to wait for the answer.
        """
        found = process.of_thread(caller.pid)
        if found is None:
            return Owner(key=f"open:{self._tag}:{next(self._count)}", pid=0, command="", uid=caller.uid), False
        pid = found.pid
        if self._rule == "open":
            key = f"open:{self._tag}:{pid}:{next(self._count)}"
        elif self._rule == "cgroup" and (group := process.cgroup(pid)) not in ("", "/"):
            # Everything is in the root group of a host without groups: there, a process is an owner.
            key = f"cgroup:{group}"
        else:
            key = f"process:{pid}:{found.start}"
        manager = bool(self._managers) and process.program(pid) in self._managers
        owner = Owner(key=key, pid=pid, command=process.command(pid), vm=process.virtual_machine(pid), uid=caller.uid)
        return owner, manager
