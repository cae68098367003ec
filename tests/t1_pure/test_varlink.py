"""The wire format, and the published interface against the types that are really sent."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.backend import Holder, Mode
from lockfs.errors import Denied, LockfsError, LockUnavailable, MountError
from lockfs.protocol import errors, interface, messages, varlink


def fed(data: bytes, limit: int = varlink.MESSAGE_LIMIT, chunk: int = 0) -> list[bytes]:
    splitter = varlink.Splitter(limit)
    for at in range(0, len(data), chunk or len(data) or 1):
        splitter.feed(data[at : at + (chunk or len(data))])
    found = []
    while (message := splitter.take()) is not None:
        found.append(message)
    return found


@given(st.lists(st.binary(max_size=40).map(lambda each: each.replace(b"\0", b""))), st.integers(1, 50))
def test_messages_come_out_as_they_went_in_however_they_are_cut(parts: list[bytes], chunk: int) -> None:
    assert fed(b"".join(part + b"\0" for part in parts), chunk=chunk) == parts


def test_a_message_may_be_as_long_as_the_limit_and_no_longer() -> None:
    assert fed(b"x" * 10 + b"\0" + b"y" * 10 + b"\0", limit=10, chunk=3) == [b"x" * 10, b"y" * 10]
    with pytest.raises(varlink.ProtocolError, match="longer than 10 bytes"):
        fed(b"x" * 11, limit=10, chunk=3)
    with pytest.raises(varlink.ProtocolError, match="longer than 10 bytes"):
        fed(b"x" * 11 + b"\0", limit=10)


def test_the_splitter_knows_when_a_message_has_begun() -> None:
    splitter = varlink.Splitter()
    assert splitter.between_messages
    splitter.feed(b"{")
    assert not splitter.between_messages
    splitter.feed(b"}\0")
    assert not splitter.between_messages
    splitter.take()
    assert splitter.between_messages


def test_a_call_comes_back() -> None:
    request = messages.Release("m", 1, 2**63, "shared", "key \0 with nul")
    data = varlink.encode_call("a.b.Release", request, more=True)
    assert data.count(b"\0") == 1
    call = varlink.decode_call(data[:-1])
    assert (call.method, call.more, call.oneway) == ("a.b.Release", True, False)
    assert varlink.decode_parameters(call.parameters, messages.Release) == request


def test_a_reply_comes_back() -> None:
    event = messages.Event("refused", 1.5, reason="x")
    reply = varlink.decode_reply(varlink.encode_reply(event, continues=True)[:-1])
    assert reply.continues
    assert not reply.error
    assert varlink.decode_parameters(reply.parameters, messages.Event) == event


def test_what_is_left_out_has_the_defaults_of_varlink() -> None:
    assert varlink.decode_call(b'{"method": "a.B"}') == varlink.Call("a.B")
    assert varlink.decode_reply(b"{}") == varlink.Reply()
    assert varlink.decode_parameters(varlink.decode_call(b'{"method": "a.B"}').parameters, messages.Watch)


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(varlink.ProtocolError, match="longer than"):
        varlink.encode_reply(messages.UnavailableError("x" * varlink.MESSAGE_LIMIT))


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"[]", b"{}", b'{"method": 1}', b'{"method": "a.b"', b'\xff', b'{"method": "\xff"}', b"[" * 100_000,
     b'{"method": "a.b", "more": "yes"}'],
)  # fmt: skip
def test_garbage_is_no_call(data: bytes) -> None:
    with pytest.raises(varlink.ProtocolError, match="not a varlink call"):
        varlink.decode_call(data)


@pytest.mark.parametrize("data", [b"[]", b'"x"', b'{"error": 1}', b'{"continues": 1}'])
def test_garbage_is_no_reply(data: bytes) -> None:
    with pytest.raises(varlink.ProtocolError, match="not a varlink reply"):
        varlink.decode_reply(data)


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for decode in (varlink.decode_call, varlink.decode_reply):
        try:
            decode(data)
        except varlink.ProtocolError:
            pass


def test_wrong_parameters_are_named() -> None:
    raw = msgspec.Raw(b'{"mount_id": "m", "dev": "x", "ino": 1, "mode": "shared", "owner": "o"}')
    with pytest.raises(varlink.ProtocolError, match=r"\$\.dev"):
        varlink.decode_parameters(raw, messages.Release)
    raw = msgspec.Raw(b'{"mount_id": "m", "dev": 1, "ino": 1, "mode": "mine", "owner": "o"}')
    with pytest.raises(varlink.ProtocolError, match=r"'mine'.*\$\.mode"):
        varlink.decode_parameters(raw, messages.Release)


# Errors ------------------------------------------------------------------------------------------

HOLDER = Holder("h", Mode.SHARED, 7, "qemu", "vm1", 3.5, "/x", 9)


@pytest.mark.parametrize(
    "error",
    [errors.HeldError(HOLDER, here=True), errors.HeldError(HOLDER, here=False), LockUnavailable("why"),
     MountError("why", hint="what to do"), Denied("why", hint="what to do"), errors.UnknownMount("m"), errors.NotHeld(1, 2)],
)  # fmt: skip
def test_an_error_comes_back_as_what_it_was(error: LockfsError) -> None:
    name, parameters = errors.to_wire(error)
    back = errors.from_wire(name, msgspec.Raw(msgspec.json.encode(parameters)))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_standard_error_says_that_the_call_was_not_understood() -> None:
    back = errors.from_wire(varlink.METHOD_NOT_FOUND, msgspec.Raw(b'{"method": "a.B"}'))
    assert isinstance(back, errors.InvalidCall)
    assert "MethodNotFound" in str(back)
    assert "a.B" in str(back)


def test_an_unknown_error_is_an_error_too() -> None:
    assert isinstance(errors.from_wire("x.y.Z", msgspec.Raw(b"{}")), varlink.ProtocolError)


# The published interface -------------------------------------------------------------------------

SCALARS = {int: "int", float: "float", str: "string", bool: "bool"}
ENUMERATIONS: dict[Any, str] = {messages.ModeName: "Mode", messages.DataPath: "DataPath"}


def described() -> tuple[dict[str, str], dict[str, tuple[str, str]], dict[str, str]]:
    """Return types, methods (call and reply) and errors of the description, each as its fields, in one spelling."""
    text = interface.description(messages.INTERFACE)
    assert text is not None
    bare = re.sub(r"\s+", " ", re.sub(r"#.*", "", text)).strip()
    assert bare.startswith(f"interface {messages.INTERFACE} ")
    kinds: dict[str, str] = dict(re.findall(r"type (\w+) \(([^)]*)\)", bare))
    found_errors: dict[str, str] = dict(re.findall(r"error (\w+) \(([^)]*)\)", bare))
    calls = {
        name: (call, reply) for name, call, reply in re.findall(r"method (\w+)\(([^)]*)\) -> \(([^)]*)\)", bare)
    }
    total = len(re.findall(r"\b(?:type|method|error) \w+ ?\(", bare))
    assert total == len(kinds) + len(found_errors) + len(calls)
    return kinds, calls, found_errors


def fields(text: str) -> dict[str, str]:
    return {name.strip(): kind.strip() for name, _, kind in (f.partition(":") for f in text.split(",") if f.strip())}


def spelled(kind: Any) -> str:
    """Return a Python type as varlink spells it."""
    if kind in SCALARS:
        return SCALARS[kind]
    if kind in ENUMERATIONS:
        return ENUMERATIONS[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return "[]" + spelled(arguments[0])
    if origin is dict:
        assert arguments[0] is str
        return "[string]" + spelled(arguments[1])
    if origin in (types.UnionType, typing.Union):
        (inner,) = (each for each in arguments if each is not type(None))
        return "?" + spelled(inner)
    return str(kind.__name__)


def of(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Return the fields of a type as the description should have them: what has a default may be left out."""
    hints = typing.get_type_hints(struct)
    found = {}
    for field in msgspec.structs.fields(struct):
        optional = not field.required
        kind = spelled(hints[field.name])
        found[field.name] = "?" + kind if optional and not kind.startswith("?") else kind
    return found


def test_the_description_has_the_methods_that_lockd_has() -> None:
    _, calls, _ = described()
    assert {name: (fields(call), fields(reply)) for name, (call, reply) in calls.items()} == {
        name: (of(call), of(reply)) for name, (call, reply) in messages.METHODS.items()
    }


def test_the_description_has_the_errors_that_lockd_has() -> None:
    _, _, found = described()
    assert {name: fields(text) for name, text in found.items()} == {
        name: of(kind) for name, kind in messages.ERRORS.items()
    }


def test_the_description_has_the_types_that_lockd_has() -> None:
    kinds, _, _ = described()
    for kind, name in ENUMERATIONS.items():
        assert tuple(kinds.pop(name).split(", ")) == typing.get_args(kind)
    assert {name: fields(text) for name, text in kinds.items()} == {
        name: of(getattr(messages, name)) for name in kinds
    }


def test_each_call_is_named_as_its_method() -> None:
    assert all(call.__name__ == name for name, (call, _) in messages.METHODS.items())


def test_the_standard_interface_is_described() -> None:
    assert "method GetInfo() ->" in (interface.description(varlink.SERVICE) or "")
    assert interface.description("no.such") is None
