"""The varlink wire format (https://varlink.org): one JSON object per message, ended by a NUL byte.

Pure: bytes in, objects out.  A call is ``{"method", "parameters", "more", "oneway"}``, a reply
``{"parameters", "continues"}`` or ``{"error", "parameters"}``.  A message is at most `MESSAGE_LIMIT` bytes,
so that no peer can fill the other's memory.
"""

from __future__ import annotations

from collections import deque
from typing import TypeVar

import msgspec

from lockfs.errors import LockUnavailable

MESSAGE_LIMIT = 1 << 20
"""Bytes of one message without its NUL.  The largest that lockfs sends is the list of all locks."""

SERVICE = "org.varlink.service"
INTERFACE_NOT_FOUND = f"{SERVICE}.InterfaceNotFound"
METHOD_NOT_FOUND = f"{SERVICE}.MethodNotFound"
INVALID_PARAMETER = f"{SERVICE}.InvalidParameter"
EXPECTED_MORE = f"{SERVICE}.ExpectedMore"

T = TypeVar("T")
_EMPTY = msgspec.Raw(b"{}")


class ProtocolError(LockUnavailable):
    """The peer sent what is no varlink message, or one that cannot be meant."""


class Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call as it stands on the wire."""

    method: str
    parameters: msgspec.Raw = _EMPTY
    more: bool = False
    oneway: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One reply as it stands on the wire; `error` is empty for a good one."""

    parameters: msgspec.Raw = _EMPTY
    continues: bool = False
    error: str = ""


class Splitter:
    """Cuts a stream of bytes into messages.  After a `ProtocolError` it is of no further use."""

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self._limit = limit
        self._partial = bytearray()
        self._whole: deque[bytes] = deque()

    @property
    def between_messages(self) -> bool:
        """True if nothing is waiting: neither a whole message nor the beginning of one."""
        return not self._partial and not self._whole

    def feed(self, data: bytes) -> None:
        """Take what was received.  Raises `ProtocolError` if a message is longer than the limit."""
        *whole, rest = data.split(b"\0")
        for part in whole:
            self._extend(part)
            self._whole.append(bytes(self._partial))
            self._partial.clear()
        self._extend(rest)

    def _extend(self, part: bytes) -> None:
        if len(self._partial) + len(part) > self._limit:
            raise ProtocolError(f"a message is longer than {self._limit} bytes")
        self._partial += part

    def take(self) -> bytes | None:
        """Return the next whole message, None if there is none yet."""
        return self._whole.popleft() if self._whole else None


def encode_call(method: str, parameters: object, *, more: bool = False, oneway: bool = False) -> bytes:
    """Return a call as bytes, its NUL included."""
    return _pack(Call(method, _raw(parameters), more, oneway))


def encode_reply(parameters: object, *, continues: bool = False) -> bytes:
    """Return a good reply as bytes, its NUL included."""
    return _pack(Reply(_raw(parameters), continues))


def encode_error(name: str, parameters: object) -> bytes:
    """Return an error reply as bytes, its NUL included."""
    return _pack(Reply(_raw(parameters), error=name))


def _raw(parameters: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(parameters))


def _pack(message: Call | Reply) -> bytes:
    # JSON escapes control characters, so the only NUL is the last byte.
    data = msgspec.json.encode(message)
    if len(data) > MESSAGE_LIMIT:
        raise ProtocolError(f"the message to send is longer than {MESSAGE_LIMIT} bytes")
    return data + b"\0"


_calls = msgspec.json.Decoder(Call)
_replies = msgspec.json.Decoder(Reply)


def decode_call(data: bytes) -> Call:
    """Read a call.  Raises `ProtocolError` if it is none."""
    return _decode(_calls, data, "call")


def decode_reply(data: bytes) -> Reply:
    """Read a reply.  Raises `ProtocolError` if it is none."""
    return _decode(_replies, data, "reply")


def _decode(decoder: msgspec.json.Decoder[T], data: bytes, what: str) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a varlink {what}: {error}") from None


def decode_parameters(raw: msgspec.Raw, kind: type[T]) -> T:
    """Read the parameters of a call or reply as *kind*.  Raises `ProtocolError` that names the field."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"wrong parameters: {error}") from None
