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
from lockfs.lockd.threads import Threads
from lockfs.protocol.messages import DataPath

THREADS = 4
"""Calls of each kind on one mount at once: the daemon that answers has one thread, and is to have the next at hand."""


@dataclass(slots=True, eq=False)
class Attachment:
    """`dev` is the device number of the mount, `root` its root on a private clone, `fuse` the connection.

    `process` is a pidfd of the mount daemon: that process is killed, and never another one of its number.  `requests`
    are threads for calls that wait for the mount daemon, `drains` for such as wait for the storage.
    """

    dev: int
    data: DataPath
    root: Descriptor
    fuse: Descriptor
    process: Descriptor
    requests: Threads
    drains: Threads
    ended: trio.CancelScope = field(default_factory=trio.CancelScope)

    @classmethod
    def of(
        cls, dev: int, data: DataPath, root_fd: int, fuse_fd: int, pid: int, nursery: trio.Nursery
    ) -> Attachment:
        """Make one from descriptors that are its own from here on; *pid* is waiting for our answer, so it lives.

        Raises OSError; then the descriptors are still the caller's.
        """
        process = os.pidfd_open(pid)
        # The end of a mount may have to write back what is dirty, by a daemon that hangs: it has a closer of its own.
        closer = Closer(f"mount {os.major(dev)}:{os.minor(dev)}")
        root, fuse, daemon = (Descriptor(each, closer) for each in (root_fd, fuse_fd, process))
        return cls(dev, data, root, fuse, daemon, Threads(nursery, THREADS), Threads(nursery, THREADS))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep all open within the context, whatever becomes of the mount; but for a connection that ends with its
        daemon: who waits for an answer from it must not wait for us.
        """
        with ExitStack() as kept:
            for each in (self.root, self.process, *([self.fuse] if self.data == "passthrough" else [])):
                kept.enter_context(each.in_use())
            yield

    def close(self) -> None:
        """Close all, the connection first: if the daemon is dead this ends it, and nothing waits for an answer."""
        self.ended.cancel()
        for each in (self.fuse, self.root, self.process):
            each.close()

    def kill_daemon(self) -> None:
        """Send SIGKILL to the mount daemon."""
        try:
            signal.pidfd_send_signal(self.process.number, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def daemon_has_died(self) -> bool:
        """Say whether the mount daemon has ended, with all its threads."""
        poll = select.poll()
        poll.register(self.process.number, select.POLLIN)
        return bool(poll.poll(0))
