"""Descriptors that clients sent."""

from __future__ import annotations

import os

from harness.waiting import wait_until

from lockfs.linux.closer import Closer
from lockfs.lockd.descriptor import Descriptor


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_it_is_closed_once_and_not_while_in_use() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    closer = Closer("test")
    descriptor = Descriptor(fd, closer)
    with descriptor.in_use(), descriptor.in_use():
        descriptor.close()
        assert is_open(fd)
    wait_until(lambda: not is_open(fd), 10, "it to be closed")
    # Somebody else gets the number, which late users and second closes must leave alone.
    fence = os.open("/dev/null", os.O_RDONLY)
    os.dup2(fence, fd)
    with descriptor.in_use():
        pass
    descriptor.close()
    last = os.dup(fence)
    closer.close([last])  # closed after whatever came before
    wait_until(lambda: not is_open(last), 10, "the closer")
    assert is_open(fd)
    for each in {fence, fd}:
        os.close(each)
