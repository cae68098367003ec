"""Descriptors of what is open on a mount and has no name any more: its daemon's successor finds it by them alone.

They are kept by the number by which the kernel knows the file, until the mount daemon says that it knows it no more, or
the mount is gone.  Nothing is done with them here.
"""

from __future__ import annotations

from collections.abc import Sequence

from lockfs.errors import LockUnavailable
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.share import Mounted
from lockfs.protocol.wire import MAX_FDS
from lockfs.vault.wire import nameless_key

MOST = 50_000
"""Of one mount; a tenth of the descriptors that lockd may have, which locks need, too."""


def keep(mounted: Mounted, nodes: Sequence[int], fds: Sequence[int]) -> None:
    """Keep a descriptor of each node; they are lockd's from here on.  Raises `LockUnavailable`."""
    closer = mounted.share.storage.closer
    if len(mounted.nameless) + len(nodes) > MOST:
        closer.close(fds)
        raise LockUnavailable(f"lockd keeps {MOST} nameless files of {mounted.mount.mountpoint} already")
    for node, fd in zip(nodes, fds, strict=True):
        if (before := mounted.nameless.get(node)) is not None:
            before.close()
        mounted.nameless[node] = Descriptor(fd, closer)
        mounted.share.vault.put(nameless_key(mounted.mount_id, node), [fd])


def dispose(mounted: Mounted, nodes: Sequence[int]) -> None:
    """Close those of some nodes, where there are any."""
    for node in nodes:
        if (descriptor := mounted.nameless.pop(node, None)) is not None:
            mounted.share.vault.drop(nameless_key(mounted.mount_id, node))
            descriptor.close()


def inherit(mounted: Mounted) -> None:
    """Keep on what the last lockd has kept, and nobody has entrusted to this one."""
    for node, fd in mounted.share.vault.take_nameless(mounted.mount_id).items():
        mounted.nameless[node] = Descriptor(fd, mounted.share.storage.closer)


def after(mounted: Mounted, last: int) -> tuple[list[int], list[int]]:
    """Return the lowest nodes above *last* for which one is kept, as many as fit into one message, and these."""
    nodes = sorted(node for node in mounted.nameless if node > last)[:MAX_FDS]
    return nodes, [mounted.nameless[node].number for node in nodes]
