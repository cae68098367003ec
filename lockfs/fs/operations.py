"""All handlers of the mount in one object, as pyfuse3 wants them."""

from __future__ import annotations

import trio

from lockfs.fs.attributes import AttributeOperations
from lockfs.fs.base import Parts
from lockfs.fs.directories import DirectoryOperations
from lockfs.fs.files import FileOperations
from lockfs.fs.journal.effects import RESENT
from lockfs.fs.names import NameOperations
from lockfs.fs.opening import OpenOperations
from lockfs.fs.space import SpaceOperations


class Operations(
    NameOperations, AttributeOperations, OpenOperations, FileOperations, SpaceOperations, DirectoryOperations
):
    """The overlay.  `started` is set when the kernel's first request is being answered.

    `attached` says that lockd starts a successor if this daemon dies.
    """

    attached = False

    supports_dot_lookup = True
    enable_acl = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.started = trio.Event()
        self._one_at_a_time = trio.Lock()

    def init(self) -> None:
        """Note that the kernel has introduced itself."""
        self.started.set()

    def answered(self, unique: int) -> None:
        """Note that the kernel has taken an answer: what that has opened will be released."""
        self.handles.answered(unique & ~RESENT)

    async def close(self) -> None:
        """Close every handle, and give back every image: the connection has ended.

        But data that bypasses this daemon goes on.  Then nothing is given back: lockd frees an image when nobody can
        write to it any more.
        """
        for handle in self.handles.take_all():
            if self.backing is None:
                await self.close_handle(handle)
            elif handle.fd >= 0:
                self.work.close(handle.fd)
                if handle.direct >= 0:
                    self.work.close(handle.direct)
        self.effects.journal.remove()
        self.nodes.close()
        self.work.finish()
