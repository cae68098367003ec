"""What lockd keeps of a mount in order to fence its images without the mount daemon."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import trio

from lockfs.linux.closer import Closer
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.state import AttachedAs
from lockfs.lockd.threads import Threads
from lockfs.protocol.messages import Attach, DataPath

THREADS = 4
"""Calls of each kind on one mount at once: the daemon that answers has one thread, and is to have the next at hand."""


@dataclass(slots=True, eq=False)
class Attachment:
    """`dev` is the device number of the mount, `root` its root on a private clone, `fuse` the connection.

    `process` is a pidfd of the mount daemon: that process is killed, and never another one of its number.  `namespace`
    is its mount namespace; with `resumable` it keeps a journal from which a successor can go on.  `requests` are
    threads for calls that wait for the mount daemon, `drains` for such as wait for the storage.
    """

    dev: int
    data: DataPath
    root: Descriptor
    fuse: Descriptor
    process: Descriptor | None
    namespace: Descriptor
    resumable: bool
    requests: Threads
    drains: Threads
    closer: Closer
    scopes: set[trio.CancelScope] = field(default_factory=set)

    @classmethod
    def of(cls, call: Attach, root_fd: int, fuse_fd: int, pid: int, nursery: trio.Nursery) -> Attachment:
        """Make one from descriptors that are its own from here on; *pid* is waiting for our answer, so it lives.

        Raises OSError; then the descriptors are still the caller's.
        """
        process = os.pidfd_open(pid)
        try:
            namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(process)
            raise
        # The end of a mount may have to write back what is dirty, by a daemon that hangs: it has a closer of its own.
        closer = Closer(f"mount {os.major(call.dev)}:{os.minor(call.dev)}")
        root, fuse, daemon, view = (Descriptor(each, closer) for each in (root_fd, fuse_fd, process, namespace))
        requests, drains = Threads(nursery, THREADS), Threads(nursery, THREADS)
        return cls(call.dev, call.data, root, fuse, daemon, view, call.resumable, requests, drains, closer)

    @classmethod
    def inherited(
        cls, said: AttachedAs, fuse: int, root: int, namespace: int, pid: int, nursery: trio.Nursery
    ) -> Attachment:
        """Make one from what the vault has kept of a mount.  *pid* is its daemon, which is dying; 0 if it is dead."""
        closer = Closer(f"mount {os.major(said.dev)}:{os.minor(said.dev)}")
        try:
            process = Descriptor(os.pidfd_open(pid), closer) if pid else None
        except OSError:
            process = None
        return cls(
            said.dev, said.data, Descriptor(root, closer), Descriptor(fuse, closer), process,
            Descriptor(namespace, closer), True, Threads(nursery, THREADS), Threads(nursery, THREADS), closer,
        )  # fmt: skip

    def succeed(self, pid: int) -> None:
        """Take note of a successor of the mount daemon, which waits for our answer.  Raises OSError."""
        before, self.process = self.process, Descriptor(os.pidfd_open(pid), self.closer)
        if before is not None:
            before.close()

    @contextmanager
    def until_closed(self) -> Iterator[trio.CancelScope]:
        """Cancel what is done within the context when this is closed."""
        with trio.CancelScope() as scope:
            self.scopes.add(scope)
            try:
                yield scope
            finally:
                self.scopes.discard(scope)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep all open within the context, whatever becomes of the mount; but for a connection that ends with its
        daemon: who waits for an answer from it must not wait for us.
        """
        with ExitStack() as kept:
            process = [self.process] if self.process is not None else []
            for each in (self.root, *process, *([self.fuse] if self.data == "passthrough" else [])):
                kept.enter_context(each.in_use())
            yield

    def close(self) -> None:
        """Close all, the connection first: if the daemon is dead this ends it, and nothing waits for an answer."""
        for scope in list(self.scopes):
            scope.cancel()
        for each in (self.fuse, self.root, self.process, self.namespace):
            if each is not None:
                each.close()

    def connection_has_ended(self) -> bool:
        """Say whether the kernel has ended the connection: it was aborted, or is mounted nowhere any more."""
        poll = select.poll()
        poll.register(self.fuse.number, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    def kill_daemon(self) -> None:
        """Send SIGKILL to the mount daemon."""
        if self.process is None:
            return
        try:
            signal.pidfd_send_signal(self.process.number, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def daemon_has_died(self) -> bool:
        """Say whether the mount daemon has ended, with all its threads."""
        if self.process is None:
            return True
        poll = select.poll()
        poll.register(self.process.number, select.POLLIN)
        return bool(poll.poll(0))
