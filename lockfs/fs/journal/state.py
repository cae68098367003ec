"""What a series of records amounts to.  Pure."""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from lockfs.errors import LockfsError
from lockfs.fs.journal import records


class JournalError(LockfsError):
    """A journal from which no mount can be resumed."""

    errno = errno.EIO


@dataclass(slots=True)
class Node:
    """A node that the kernel knows."""

    found: records.Found
    parent: int
    name: bytes
    lookups: int
    pinned: bool = False
    fenced: bool = False


@dataclass(slots=True)
class State:
    """All of it.

    `lingering` are closed files that may be mapped still.  `backed` has the backing id of a node; `abandoned` are ids
    that nothing uses any more and that may not have been given back.
    """

    begin: records.Begin
    nodes: OrderedDict[int, Node] = field(default_factory=OrderedDict)
    files: dict[int, records.Opened] = field(default_factory=dict)
    lingering: dict[int, records.Opened] = field(default_factory=dict)
    backed: dict[int, int] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)
    directories: dict[int, records.OpenedDirectory] = field(default_factory=dict)
    listings: dict[int, list[bytes]] = field(default_factory=dict)
    intended: dict[int, records.Intended] = field(default_factory=dict)
    done: dict[int, records.Done] = field(default_factory=dict)
    last_node: int = 0
    last_serial: int = 0
    last_number: int = 0
    last_backing_id: int = 0
    _backing: dict[int, int] = field(default_factory=dict)
    """The node of each backing id."""

    def apply(self, record: records.Any) -> None:
        """Take one more record into account.  One about what is not there says nothing."""
        match record:
            case records.Found():
                self.nodes[record.node] = Node(record, record.parent, record.name, record.lookups, record.pinned)
                self.last_node = max(self.last_node, record.node)
            case records.Looked() if node := self.nodes.get(record.node):
                node.lookups += record.count
            case records.Moved() if node := self.nodes.get(record.node):
                node.parent, node.name = record.parent, record.name
            case records.Pinned() if node := self.nodes.get(record.node):
                node.pinned = True
            case records.Fenced() if node := self.nodes.get(record.node):
                node.fenced = True
            case records.Forgotten():
                self.nodes.pop(record.node, None)
            case records.Backed():
                self._back(record)
            case records.Unbacked():
                self._unback(record.backing_id)
            case records.OpenedDirectory():
                self.directories[record.number] = record
                self.last_number = max(self.last_number, record.number)
            case records.Listed():
                self.listings[record.number] = record.names
            case records.ClosedDirectory():
                self.directories.pop(record.number, None)
                self.listings.pop(record.number, None)
            case records.Intended():
                self.intended[record.unique] = record
            case records.Done():
                self.done[record.unique] = record
                self.intended.pop(record.unique, None)
            case records.Undone():
                self.intended.pop(record.unique, None)
            case records.Opened() | records.Answered() | records.Took() | records.Closed() | records.Freed():
                self._apply_to_files(record)
            case _:
                pass

    def _apply_to_files(
        self, record: records.Opened | records.Answered | records.Took | records.Closed | records.Freed
    ) -> None:
        match record:
            case records.Opened():
                # Number 0 is that of a file which is closed already.
                (self.files if record.number else self.lingering)[record.serial] = record
                self.last_serial = max(self.last_serial, record.serial)
                self.last_number = max(self.last_number, record.number)
            case records.Answered() if record.serial in self.files:
                self.files[record.serial] = msgspec.structs.replace(self.files[record.serial], answered=True)
            case records.Took() if record.serial in self.files:
                opened = self.files[record.serial]
                self.files[record.serial] = msgspec.structs.replace(opened, hold=record.hold, manager=None)
            case records.Closed():
                opened_before = self.files.pop(record.serial, None)
                if opened_before is not None and record.lingers:
                    self.lingering[record.serial] = opened_before
            case records.Freed():
                self.lingering.pop(record.serial, None)
            case _:
                pass

    def _back(self, record: records.Backed) -> None:
        before = self.backed.get(record.node)
        if before is not None:
            self.abandoned.add(before)
        self.backed[record.node] = record.backing_id
        self._backing[record.backing_id] = record.node
        self.last_backing_id = max(self.last_backing_id, record.backing_id)

    def _unback(self, backing_id: int) -> None:
        self.abandoned.discard(backing_id)
        node = self._backing.pop(backing_id, 0)
        if self.backed.get(node) == backing_id:
            del self.backed[node]


def replay(data: bytes) -> State:
    """Return what a journal amounts to.  Raises `JournalError` if it is none, or one of another version."""
    try:
        return _replay(records.decode(data))
    except msgspec.DecodeError as error:
        raise JournalError(f"the journal of the mount was written by another version: {error}") from None


def _replay(series: Iterable[records.Any]) -> State:
    state: State | None = None
    for record in series:
        if state is not None:
            state.apply(record)
        elif isinstance(record, records.Begin):
            if record.format != records.FORMAT:
                raise JournalError(f"the journal of the mount has format {record.format}, not {records.FORMAT}")
            state = State(
                record, last_node=record.last_node, last_serial=record.last_serial, last_number=record.last_number,
                last_backing_id=record.last_backing_id,
            )  # fmt: skip
        else:
            break
    if state is None:
        raise JournalError("the journal of the mount has no beginning")
    used = {opened.node for opened in state.files.values() if opened.counted}
    for node in [node for node in state.backed if node not in used]:
        state.abandoned.add(state.backed.pop(node))
    return state
