"""Calls on ``/dev/fuse`` beside pyfuse3: backing ids and notifications.  Any process that has the descriptor may make
them.

A notification may wait for a page or an inode that a request is holding, and so for the mount daemon: never make one
on its event loop.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence

from lockfs.kernel import wire


def backing_open(fuse_fd: int, fd: int, flags: int = 0) -> int:
    """Make the kernel keep the open file *fd* as the backing of files of this mount; return its backing id.

    An O_PATH or O_RDONLY descriptor will do: the kernel opens the file once more with the flags of each user, and does
    the I/O with the credentials of the *thread* that makes this call.  A backing id outlives its mount daemon with the
    connection, counts against no limit, and keeps the storage from being unmounted.

    Raises OSError: ELOOP for a file on a stacked filesystem such as overlayfs, EINVAL or EISDIR for what is no regular
    file, EPERM without CAP_SYS_ADMIN or if passthrough was not agreed on.
    """
    # The id is what ioctl(2) returns, which fcntl.ioctl() only tells with a mutable argument.
    backing_id: int = fcntl.ioctl(fuse_fd, wire.BACKING_OPEN, bytearray(wire.backing_map(fd, flags)))
    return backing_id


def backing_close(fuse_fd: int, backing_id: int) -> None:
    """Give a backing id back; what is open with it stays so.  Raises OSError(ENOENT) for one that there is not.

    If the inode is still open, every further open of it gets EIO: close an id after the last RELEASE.
    """
    fcntl.ioctl(fuse_fd, wire.BACKING_CLOSE, wire.backing_id(backing_id))


def notify_inval_inode(fuse_fd: int, node: int, offset: int = -1, length: int = 0) -> bool:
    """Make the kernel ask again for the attributes of a node, and drop cached data from *offset* on unless it is
    negative.

    *length* 0 means to the end.  Return False if the kernel does not know the node.  Raises OSError.
    """
    try:
        os.write(fuse_fd, wire.inval_inode(node, offset, length))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def notify_resend(fuse_fd: int) -> None:
    """Make the kernel send again what it has sent and got no answer to.

    For a daemon that takes over a connection.  Such a request has bit 63 set in its unique, and may have been carried
    out before.  Raises OSError: EINVAL before Linux 6.9.
    """
    os.write(fuse_fd, wire.resend())


def notify_prune(fuse_fd: int, nodes: Sequence[int]) -> None:
    """Make the kernel forget nodes that nobody has open or mapped: a FORGET follows for each of these, for others
    nothing.

    Raises OSError: EINVAL before Linux 6.18.
    """
    os.write(fuse_fd, wire.prune(nodes))
