"""What lockd answers the kernel in place of a dead mount daemon."""

from __future__ import annotations

import errno
import stat
import struct

import pytest

from lockfs.lockd.keeper import answer

LOOKUP, FORGET, GETATTR, OPEN, READ, WRITE, RELEASE, FSYNC, RELEASEDIR = 1, 2, 3, 14, 15, 16, 18, 20, 29
INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 36, 38, 42, 43
FENCED, OTHER = 7, 8
RESENT = 1 << 63


def request(opcode: int, node: int = OTHER, body: bytes = b"", unique: int = 42) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 1, 0, 0) + body


def parsed(reply: bytes | None) -> tuple[int, int, bytes]:
    """Return unique, error and body."""
    assert reply is not None
    size, error, unique = struct.unpack_from("=IiQ", reply)
    assert size == len(reply)
    return unique, -error, reply[16:]


@pytest.mark.parametrize("opcode", [GETATTR, OPEN, READ, WRITE, FSYNC, FALLOCATE, 99])
def test_all_fails_as_on_a_connection_that_has_ended(opcode: int) -> None:
    assert parsed(answer(request(opcode), {FENCED})) == (42, errno.ENOTCONN, b"")


def test_what_was_sent_again_is_answered_by_its_own_number() -> None:
    assert parsed(answer(request(OPEN, unique=RESENT | 5), set())) == (RESENT | 5, errno.ENOTCONN, b"")


@pytest.mark.parametrize("opcode", [FORGET, BATCH_FORGET, INTERRUPT])
def test_some_get_no_answer(opcode: int) -> None:
    assert answer(request(opcode), set()) is None


@pytest.mark.parametrize("opcode", [RELEASE, RELEASEDIR, DESTROY])
def test_to_close_works(opcode: int) -> None:
    assert parsed(answer(request(opcode), {OTHER})) == (42, 0, b"")


def test_the_type_of_a_fenced_inode_has_changed() -> None:
    unique, error, body = parsed(answer(request(GETATTR, FENCED, bytes(16)), {FENCED}))
    assert (unique, error, len(body)) == (42, 0, 104)  # struct fuse_attr_out
    valid, ino, mode = struct.unpack_from("=Q", body)[0], struct.unpack_from("=Q", body, 16)[0], struct.unpack_from("=I", body, 76)[0]
    assert (valid, ino) == (0, FENCED)
    assert stat.S_ISSOCK(mode)


def test_all_else_of_a_fenced_inode_is_an_error() -> None:
    assert parsed(answer(request(FALLOCATE, FENCED), {FENCED})) == (42, errno.EIO, b"")


@pytest.mark.parametrize(("name", "error"), [(b".\0", errno.ESTALE), (b"..\0", errno.ENOTCONN), (b"name\0", errno.ENOTCONN)])
def test_a_lost_inode_is_not_found_again(name: bytes, error: int) -> None:
    assert parsed(answer(request(LOOKUP, OTHER, name), set()))[1] == error


def test_what_is_no_request() -> None:
    with pytest.raises(struct.error):
        answer(b"short", set())
