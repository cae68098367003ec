"""Detached mounts: a private view of one filesystem that no later mount can change (open_tree(2), mount_setattr(2))."""

from __future__ import annotations

import os
import struct

from lockfs.linux.libc import AT_EMPTY_PATH, AT_FDCWD, failed, libc

_SYS_OPEN_TREE = 428
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_MOUNT_SETATTR = 442
_OPEN_TREE_CLONE = 1
_FSCONFIG_CMD_CREATE = 6
_MS_PRIVATE = 1 << 18


def clone(path: bytes) -> int:
    """Return a directory descriptor on a detached, private clone of the mount at *path*, rooted there.

    Mounts below *path* are not part of it, and none that is made later can appear in it: what a walk from the
    descriptor finds is that one filesystem.  Needs CAP_SYS_ADMIN; Linux 5.12.
    """
    tree = libc.syscall(_SYS_OPEN_TREE, AT_FDCWD, path, _OPEN_TREE_CLONE | os.O_CLOEXEC)
    if tree < 0:
        raise failed(path)
    try:
        # A clone of a shared mount is in its peer group, and would get every mount made below the source.
        attributes = struct.pack("QQQQ", 0, 0, _MS_PRIVATE, 0)
        if libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes)) != 0:
            raise failed(path)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)


def detached(fstype: bytes) -> int:
    """Return a directory descriptor on a new, detached mount of a filesystem that needs no source (as fusectl)."""
    context = libc.syscall(_SYS_FSOPEN, fstype, 1)
    if context < 0:
        raise failed(fstype)
    try:
        if libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) != 0:
            raise failed(fstype)
        mount = libc.syscall(_SYS_FSMOUNT, context, 1, 0)
        if mount < 0:
            raise failed(fstype)
        try:
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        finally:
            os.close(mount)
    finally:
        os.close(context)


