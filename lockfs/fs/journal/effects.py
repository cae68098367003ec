"""Requests whose effect must not happen twice: what this daemon, or the one before it, has made of them.

The kernel sends a request again that a daemon took and did not answer before it died.  If that has carried it out, its
result is in the journal, and is the answer.  If it died in between, there is an intent without result; each handler
then looks whether it has happened:

| request | it has happened if |
|---|---|
| create, mknod, mkdir, symlink, link | the name is there; it was not when the intent was written |
| unlink, rmdir | the name does not lead to that inode any more |
| rename | the new name leads to the inode, and the old one does not |
| removexattr | the attribute is not there; it was when the intent was written |
| setxattr that has to create | (it is set once more) |
| write at the end of an append-only file | those bytes are there, where the kernel meant them to be |

What remains is another host that does the very same to the same name in that moment: then one of the two is told of a
success that was the other's.  All other requests may be carried out twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from lockfs.fs.journal import records
from lockfs.fs.journal.file import Journal
from lockfs.fs.journal.state import State
from lockfs.kernel import session
from lockfs.kernel.session import Current
from lockfs.steps import step

RESENT = 1 << 63
"""Set in the number of a request that the kernel has sent before."""
KEPT = 10_000
"""Results of requests that have been answered, as far as is known, and that are kept all the same.  More than requests
can be under way at once, since it is not seen when the kernel has taken an answer."""


class Effect:
    """One request.  `done` is its result, `intended` an intent without result, both from the daemon before.

    `resent` says that the kernel has sent it before.
    """

    def __init__(self, effects: Effects, unique: int) -> None:
        self._effects = effects
        self.unique = unique & ~RESENT
        self.resent = bool(unique & RESENT)
        self.done = effects.results.get(self.unique) if self.resent else None
        self.intended = effects.intents.get(self.unique) if self.resent else None

    @contextmanager
    def intend(
        self, *, identity: tuple[int, int] = (0, 0), other: tuple[int, int] = (0, 0), size: int = 0
    ) -> Iterator[None]:
        """Write an intent, and within the context do it; if that raises an error, nothing has happened."""
        effects = self._effects
        if not effects.journal.begun:
            yield
            return
        intent = records.Intended(self.unique, identity, other, size)
        effects.intents[self.unique] = intent
        if len(effects.intents) > KEPT:
            effects.intents.popitem(last=False)
        effects.journal.note(intent)
        effects.journal.flush()
        step("effect.before")
        try:
            yield
        except OSError:
            effects.intents.pop(self.unique, None)
            effects.journal.note(records.Undone(self.unique))
            raise
        step("effect.after")

    def finish(self, *, node: int = 0, value: int = 0) -> None:
        """Note the result."""
        self._effects.finish(records.Done(self.unique, node, value))


class Effects:
    """All requests with an effect."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.intents: OrderedDict[int, records.Intended] = OrderedDict()
        self.results: OrderedDict[int, records.Done] = OrderedDict()

    def begin(self, current: Current | None = None) -> Effect:
        """Take up the request that a handler was called for; before its first await."""
        if current is None and self.journal.begun:
            current = session.current()
        return Effect(self, current.unique if current is not None else 0)

    def finish(self, done: records.Done) -> None:
        """Note a result."""
        if not self.journal.begun:
            return
        self.intents.pop(done.unique, None)
        self.results[done.unique] = done
        self.journal.note(done)
        if len(self.results) > KEPT:
            self.results.popitem(last=False)

    def restore(self, state: State) -> None:
        """Take over what the daemon before has noted."""
        self.intents.update(state.intended)
        for unique in sorted(state.done)[-KEPT:]:
            self.results[unique] = state.done[unique]

    def records(self) -> Iterator[records.Record]:
        """Yield what there is."""
        yield from self.intents.values()
        yield from self.results.values()
